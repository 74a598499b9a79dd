"""Blocks of the configuration that the workflow alone reads: experiments, tables, figures, the example."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from celldetr.config.base import Count, Mpp, Names, NotNegative, Positive, Seed, Settings, SmallCount, partial
from celldetr.config.experiment import Mode, SharedModelSettings, SharedTrainingSettings
from celldetr.config.pannuke import misspelt_folds
from celldetr.config.segmentation import SegmentationSettings
from celldetr.config.sheets import Name


class PatchSizeSettings(Settings):
    """Size and resolution of the patches that models see."""

    size: int = Field(256, ge=32, le=1024, multiple_of=32, description="side of a patch, px; multiple of 32")
    mpp: Mpp = Field(0.25, description="resolution, um per px")


def _one_line(title: str) -> str:
    if not title.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", title):
        raise ValueError(f"got {title!r}, expected a line of text")
    return title


Title = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]


class ExperimentSettings(Settings):
    """A named training run: what differs from the shared blocks `model` and `training`."""

    title: Title = Field(description="name in tables and figures")
    stage: Literal["supervised", "st", "ssl", "zero_shot", "segmentation"] = Field(
        "supervised",
        description="supervised: PanNuke; ssl: contrastive pretraining on slides without labels; st: cell types of "
        "Xenium samples; zero_shot: no training, the model of another experiment with its types mapped to PanNuke; "
        "segmentation: another system, which segments nuclei of PanNuke",
    )
    mode: Mode | None = Field(
        None,
        description="baseline: Deformable DETR; sequential: CellDETR-S; parallel: CellDETR-P; every stage that trains "
        "one of these needs it",
    )
    initial: str = Field(
        "imagenet",
        description="initial weights: none, imagenet (backbone only), another experiment, or a model file (.pt); stage "
        "segmentation: none, imagenet, or one of `weights`",
    )
    trained_on: tuple[str, ...] | None = Field(
        None,
        description="what the file in `initial` was trained or validated on: folds of PanNuke (fold1, fold2, fold3) "
        "and groups of the sheets; []: none of them; needed with a file",
    )
    model: partial(SharedModelSettings) = Field(  # type: ignore[valid-type]
        default_factory=partial(SharedModelSettings), description="keys of `model` that differ"
    )
    training: partial(SharedTrainingSettings) = Field(  # type: ignore[valid-type]
        default_factory=partial(SharedTrainingSettings), description="keys of `training` that differ"
    )
    segmentation: SegmentationSettings | None = Field(None, description="system of stage segmentation; null: none")

    @model_validator(mode="after")
    def _trained_or_not(self) -> Self:
        if self.stage == "zero_shot":
            settings = {"mode", "model", "training"} & self.model_fields_set
            if settings:
                raise ValueError(f"stage: got zero_shot with {sorted(settings)}, expected none: nothing is trained")
            if self.initial in ("none", "imagenet"):
                raise ValueError(f"initial: got {self.initial!r}, expected an experiment or a model file to use")
        elif self.stage != "segmentation" and self.mode is None:
            raise ValueError("mode: missing; expected baseline, sequential or parallel")
        if (self.stage == "segmentation") != (self.segmentation is not None):
            raise ValueError(
                f"segmentation: got {'no' if self.segmentation is None else 'a'} block with stage {self.stage}, "
                "expected one with stage segmentation alone"
            )
        from_file = Path(self.initial).suffix == ".pt"
        if from_file and self.trained_on is None:
            raise ValueError(
                f"trained_on: missing; list what {self.initial} was trained or validated on: folds of PanNuke (fold1, "
                "fold2, fold3) and groups of the sheets; [] if none of them"
            )
        if self.trained_on is not None and not from_file:
            raise ValueError(f"trained_on: got initial {self.initial!r}, expected a model file (.pt) in initial")
        if odd := misspelt_folds(self.trained_on or ()):
            raise ValueError(f"trained_on: got {odd}, expected fold1, fold2, fold3 and groups of the sheets")
        return self


class TableSettings(Settings):
    """A table of measured rows beside the published ones."""

    experiments: Names = Field(min_length=1, description="experiments with a row each")
    ours: Names = Field((), description="experiments beyond the paper; their rows are marked as ours")
    others: Names = Field((), description="experiments of stage segmentation: the systems of others, measured")
    published: str = Field(min_length=1, description="file with the published rows")
    frozen_features: Names = Field(
        (),
        description="experiments whose frozen embeddings are classified, in extra rows beside those of random weights",
    )

    @property
    def systems(self) -> tuple[str, ...]:
        """Experiments of the measured rows, in order."""
        return self.others + self.experiments + self.ours


class Figure3Settings(Settings):
    """Figure 3: attention of a few test nuclei."""

    experiments: Names = Field(min_length=1, description="experiments shown")
    split: int = Field(1, ge=1, le=3, description="split whose test fold is used")
    nuclei: SmallCount = Field(4, description="number of nuclei drawn")


class Figure4Settings(Settings):
    """Figure 4c: similarity of noised boxes to the nuclei of their patch."""

    patches: SmallCount = Field(4, description="number of patches drawn")


class OverlaySettings(Settings):
    """Pictures of predictions beside the truth."""

    patches: SmallCount = Field(12, description="test patches drawn per experiment and split")


class ExampleSampleSettings(Settings):
    """A synthetic Xenium sample and the error of its alignment file."""

    version: str = Field(description="version of Xenium Onboard Analysis, e.g. 3.0.0")
    size_um: tuple[Positive, Positive] = Field(description="width and height of the tissue, um")
    rotation: float = Field(description="rotation of the Xenium frame against the H&E image, degrees")
    alignment: Literal["matrix", "keypoints"] = Field("matrix", description="kind of the alignment file")
    wrong_shift: NotNegative = Field(0.0, description="error of the alignment file, um along x and y")
    wrong_rotation: float = Field(0.0, description="error of the alignment file, degrees")


class ExampleSettings(Settings):
    """Synthetic raw data in the original formats."""

    images: tuple[Count, Count, Count] = Field(description="number of images in each of the three folds")
    xenium: dict[Name, ExampleSampleSettings] = Field(default_factory=dict, description="Xenium samples by name")
    sthelar: dict[Name, tuple[SmallCount, SmallCount]] = Field(
        default_factory=dict, description="sections of STHELAR by name: patches across and down"
    )
    slides: dict[Name, tuple[Positive, Positive]] = Field(
        default_factory=dict, description="slides by name: width and height of the tissue, um"
    )
    reference_cells: Count = Field(3000, description="number of cells in the scRNA-seq reference")
    seed: Seed = Field(0, description="seed of all drawings")
