"""Settings of the steps that turn slides into patches; read without the libraries that open slides."""

from typing import Annotated, Literal

from pydantic import Field

from celldetr.data.patch_settings import Count, PatchSettings, Share
from celldetr.settings import Settings


class SlidePatchSettings(Settings):
    """Which patches of a slide are taken."""

    stride: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="distance between patches, as a share of their side; 1: side by side, 0.5: half overlapping"
    )
    min_tissue: Share = Field(0.25, description="smallest share of a patch that is tissue")
    min_nuclei: Count = Field(1, description="fewest nuclei in a patch; the contrast of nuclei needs two (paper, 3.3)")
    max_patches: Annotated[int, Field(ge=1)] | None = Field(
        None, description="most patches of a slide, drawn with the seed; null: all"
    )

    def rules(self) -> PatchSettings:
        """Give them as rules of a plan; nuclei of slides have no labels."""
        return PatchSettings(**self.model_dump(), min_labelled=0)


class DetectionSettings(Settings):
    """How nuclei are found on slides that come without outlines."""

    model: str = Field("celldetr_p", description="experiment, or model file (.pt), that finds them")
    margin_um: Annotated[float, Field(ge=0)] = Field(
        8.0, description="strip around the middle of a tile in which the detector's findings do not count, um"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(16, description="tiles at once")


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
