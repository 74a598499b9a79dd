"""Settings of prediction and evaluation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from celldetr.config.base import MOST, PRECISION, BatchSize, Count, Positive, Precision, Settings, Share
from celldetr.config.classes import PANNUKE_CLASSES


class InferenceSettings(Settings):
    """How a trained model predicts."""

    nucleus_threshold: Share = Field(0.4, description="smallest nucleus score of a detection")
    batch_size: BatchSize = Field(64, description="patches per batch; stage segmentation takes those of its training")
    precision: Precision = Field("tf32", description=PRECISION)
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile of the model; auto: on GPUs with a C compiler, for 50,000 patches or more",
    )
    embeddings: bool = Field(
        False, description="keep the embeddings of the detections with the predictions (mode baseline has none)"
    )


class _CountingSettings(Settings):
    """Which detections count, and how far from a true nucleus."""

    score: Literal["both_thresholds", "class", "product"] = Field(
        "both_thresholds",
        description="which detections count; both_thresholds: nucleus and class score reach their thresholds; class: "
        "the class score does; product: the product of both scores reaches class_threshold (mode baseline: the class "
        "score, which is its nucleus score)",
    )
    class_threshold: Share = Field(0.4, description="smallest class score of a classified detection")
    radius_um: Positive = Field(
        3.0, description="largest distance between the centres of a matched pair, um (paper: 12 px of 0.25 um)"
    )


class EvaluationSettings(_CountingSettings):
    """How predictions are scored, in validation and test."""

    metric: Literal["strict", "hovernet_compat"] = Field(
        "strict",
        description="metric of the tables; the files *_splits.tsv hold both. hovernet_compat: as published, with a "
        "point at (0, 0) on an empty side of an image, and a value wherever the formula gives one; strict: without "
        "the point, and without a value for a class without truth",
    )
    centres: Literal["box", "mask"] = Field(
        "box",
        description="centres in the test: of the box, or of the mask (of the true nuclei, and of the detections of "
        "systems that segment nuclei; other detections have their box alone)",
    )
    resamples: int = Field(1000, ge=0, le=1_000_000, description="bootstrap resamples of the confidence intervals")


class ScoringSettings(_CountingSettings):
    """What validation and test share: see `celldetr.evaluation.counting.Evaluator`."""

    nucleus_threshold: Share = 0.4


class FrozenFeatureSettings(Settings):
    """Simple classifiers on the frozen embeddings of true boxes: k nearest neighbours and logistic regression."""

    k: Count = Field(20, description="nearest training nuclei that vote on the class")
    max_nuclei: Annotated[int, Field(ge=len(PANNUKE_CLASSES), le=MOST)] = Field(
        20_000, description="most training nuclei; more are subsampled in the proportions of their classes"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.k > self.max_nuclei:
            raise ValueError(f"k: got {self.k}, expected at most max_nuclei ({self.max_nuclei})")
        return self
