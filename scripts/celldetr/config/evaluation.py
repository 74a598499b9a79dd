"""Settings of prediction and evaluation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from celldetr.config.base import Count, Positive, Precision, Settings, Share


class InferenceSettings(Settings):
    """How a trained model predicts."""

    nucleus_threshold: Share = Field(0.4, description="smallest nucleus score of a detection")
    batch_size: Count = Field(16, description="patches at once")
    precision: Precision = "auto"


class EvaluationSettings(Settings):
    """How predictions are scored."""

    metric: Literal["strict", "hovernet_compat"] = Field(
        "strict", description="metric of the tables; both are in *_splits.tsv"
    )
    score: Literal["both_thresholds", "class", "product"] = "both_thresholds"
    class_threshold: Share = 0.4
    radius: Positive = Field(12.0, description="largest distance of a pair of centres, px")
    centres: Literal["box", "mask"] = Field("box", description="centres of the truth")
    resamples: NonNegativeInt = Field(1000, description="bootstrap resamples of the intervals")


class FrozenFeatureSettings(Settings):
    """Simple classifiers on the frozen embeddings of true boxes: k nearest neighbours and logistic regression."""

    k: Count = Field(20, description="nearest training nuclei that vote on the class")
    max_nuclei: Annotated[int, Field(ge=2)] = Field(
        20_000, description="most training nuclei; more are subsampled in the proportions of their classes"
    )
