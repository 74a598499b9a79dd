"""Settings of whole slides: which patches are cut, and how nuclei are found on slides without outlines."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from celldetr.config.base import Count, NotNegative, Settings, Share


class PatchSettings(Settings):
    """Which patches of a slide are taken."""

    stride: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="distance between patches, as a share of their side; 1: side by side, 0.5: half overlapping"
    )
    min_tissue: Share = Field(0.25, description="smallest share of a patch that is tissue")
    min_nuclei: NonNegativeInt = Field(1, description="fewest nuclei in a patch")
    min_labelled: NonNegativeInt = Field(5, description="fewest nuclei with a label in a patch")
    max_patches: Count | None = Field(None, description="most patches of a slide, drawn with the seed; null: all")


class SlidePatchSettings(Settings):
    """Which patches of a slide are taken."""

    stride: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="distance between patches, as a share of their side; 1: side by side, 0.5: half overlapping"
    )
    min_tissue: Share = Field(0.25, description="smallest share of a patch that is tissue")
    min_nuclei: NonNegativeInt = Field(1, description="fewest nuclei in a patch (contrastive learning needs two)")
    max_patches: Count | None = Field(None, description="most patches of a slide, drawn with the seed; null: all")

    def rules(self) -> PatchSettings:
        """Give them as rules of a plan; nuclei of slides have no labels."""
        return PatchSettings(**self.model_dump(), min_labelled=0)


class DetectionSettings(Settings):
    """How nuclei are found on slides that come without outlines."""

    model: str = Field("celldetr_p", description="experiment, or model file (.pt), that finds them")
    margin_um: NotNegative = Field(
        8.0, description="strip around the middle of a tile in which the detector's findings do not count, um"
    )
    batch_size: Count = Field(16, description="tiles at once")


class SlideSettings(Settings):
    """Whole slides without cell types: patches for self-supervised pretraining."""

    sheet: str = Field("config/slides.tsv", description="sheet of the slides, from the root of the workflow")
    on_damage: Literal["stop", "skip"] = Field(
        "stop",
        description="where a slide cannot be decoded: stop with an error, or leave the patches out and count them",
    )
    patches: SlidePatchSettings = SlidePatchSettings()
    detection: DetectionSettings = DetectionSettings()
    total: Annotated[int, Field(ge=2)] = Field(64_000, description="patches of all slides together (paper: 64,000)")
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of them that validates")
