"""Settings of whole slides: which patches are cut, and how nuclei are found on slides without outlines."""

from typing import Annotated, Literal

from pydantic import Field

from celldetr.config.base import MOST, BatchSize, Count, NotNegative, NotNegativeInt, Settings, Share


class SlidePatchSettings(Settings):
    """Which patches of a slide are taken."""

    stride: Annotated[float, Field(ge=0.05, le=1)] = Field(
        1.0, description="distance between patches as a share of their side; 1: side by side, 0.5: half overlapping"
    )
    min_tissue: Share = Field(0.25, description="smallest share of a patch that is tissue")
    min_nuclei: NotNegativeInt = Field(1, description="fewest nuclei in a patch (contrastive learning needs two)")
    min_visible: float = Field(
        0.1, gt=0, le=1, description="smallest share of a nucleus that must lie in a patch; the visible part is boxed"
    )
    max_patches: Count | None = Field(None, description="most patches of a slide, drawn with the seed; null: all")

    def rules(self) -> "PatchSettings":
        """Return the settings of the grid of patches; nuclei of slides have no labels."""
        return PatchSettings(**self.model_dump(), min_labelled=0)


class PatchSettings(SlidePatchSettings):
    """Which patches of a sample with cell types are taken."""

    min_labelled: NotNegativeInt = Field(5, description="fewest nuclei with a cell type in a patch")
    max_unsegmented: Share = Field(
        0.35,
        description="largest share of the nuclei visible in a patch that Xenium did not segment; above, what else is "
        "detected is no mistake in training, and the patch is in no validation or test; 1: no limit",
    )


class DetectionSettings(Settings):
    """How nuclei are found on slides that come without outlines."""

    model: str = Field("celldetr_p", description="experiment or model file (.pt) that detects the nuclei")
    margin_um: NotNegative = Field(8.0, description="border of a tile in which detections are discarded, um")
    batch_size: BatchSize = Field(16, description="tiles per batch")


class SlideSettings(Settings):
    """Whole slides without cell types: patches for self-supervised pretraining."""

    sheet: str = Field("config/slides.tsv", description="sheet of the slides")
    on_damage: Literal["stop", "skip"] = Field(
        "stop",
        description="if part of a slide cannot be decoded; stop: with an error; skip: leave out its patches and count "
        "them",
    )
    patches: SlidePatchSettings = Field(SlidePatchSettings(), description="which patches are taken")
    detection: DetectionSettings = Field(DetectionSettings(), description="nuclei of slides without outlines")
    total: int = Field(
        64_000, ge=2, le=MOST, description="patches of all slides together, with equal shares of the tissues"
    )
    val_share: float = Field(0.05, gt=0, lt=1, description="share of these patches that validates")
