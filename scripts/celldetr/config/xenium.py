"""Settings of Xenium samples: registration, cell types, patches and their split."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from celldetr.config.base import Count, NotNegative, Positive, Settings, Share
from celldetr.config.slides import PatchSettings


class RegistrationSettings(Settings):
    """How a matrix is judged, refined and found."""

    refine: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Refine a matrix that passes: auto keeps the refined one when it is clearly better (min_gain), "
        "always when it passes too, never does not try",
    )
    min_gain: float = Field(0.2, ge=0, description="Fall of the median distance that refining must bring in auto, um")
    scale_tolerance: float = Field(
        0.05, gt=0, lt=0.5, description="Relative difference allowed between the scale and the ratio of pixel sizes"
    )
    scale_range: tuple[float, float] = Field(
        (1.0, 1.8), description="Xenium px per H&E px, searched when the size of an H&E pixel is unknown"
    )
    angle_step: float = Field(5.0, gt=0, le=15, description="Step of the search over the full circle, degrees")
    max_distance: float = Field(
        3.0, gt=0, description="Gate: median distance from an H&E nucleus to the nearest DAPI nucleus, um"
    )
    max_chance: float = Field(
        0.7, gt=0, le=1, description="Gate: that median over the one at shifted positions (what chance gives)"
    )
    min_contrast: float = Field(
        0.15, ge=0, description="Gate: hematoxylin inside nuclei minus that at shifted positions, in its deviations"
    )
    min_inside: float = Field(0.5, ge=0, le=1, description="Gate: share of the nuclei that lie inside the H&E image")
    min_regions: float = Field(0.6, ge=0, le=1, description="Gate: share of the regions that pass on their own")
    control_shift: float = Field(20.0, gt=0, description="Length of the shift to control positions, um")
    regions: int = Field(5, ge=1, le=20, description="Regions of the sample along its longer side")
    window: float = Field(200.0, ge=50, le=1000, description="Side of the window that is looked at in a region, um")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range: got {low}, {high}; expected two positive numbers, the smaller one first")
        return self


class CellTypeSettings(Settings):
    """How cells get a type, and when they stay without one."""

    min_shared_genes: Annotated[int, Field(ge=2)] = Field(
        50, description="genes that panel and reference must have in common"
    )
    prior: Literal["sample", "reference"] = Field(
        "sample",
        description="composition that optimal transport starts from: that of the sample as the correlation annotator "
        "sees it, or that of the whole reference",
    )
    lamb: Positive = Field(
        0.1, description="how strongly optimal transport holds on to that composition (TACCO's lamb)"
    )
    min_fraction: Share = Field(0.5, description="fraction that a label's type must have")
    min_margin: Share = Field(0.2, description="distance that a label's fraction must have to the second largest")
    min_transcripts: NonNegativeInt = Field(
        10, description="transcripts of the shared genes that a labelled cell must have"
    )
    require_agreement: bool = Field(
        True, description="a cell on whose type the two annotators disagree stays without a label"
    )


class XeniumSplitSettings(Settings):
    """Which patches train, validate and test."""

    by: Literal["auto", "slide", "block", "random"] = Field(
        "auto",
        description="slide: whole groups of the sheet; block: squares of tissue; auto: slide when there are enough "
        "groups, else block; random: patches (the paper)",
    )
    train: Share = Field(0.8, description="share of the patches")
    val: Share = 0.1
    test: Share = 0.1
    block_um: Positive = Field(1000.0, description="side of a block")
    margin_um: NotNegative = Field(
        0.0, description="strip between blocks of different parts whose patches are left out"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.val + self.test - 1) > 1e-6 or min(self.train, self.test) <= 0:
            raise ValueError(
                f"train, val, test: got {self.train}, {self.val}, {self.test}, expected shares that sum to 1, "
                "train and test above 0"
            )
        return self


class XeniumSettings(Settings):
    """Xenium samples with their H&E images: cell types by expression, patches, and how these are split."""

    samples: str = Field("config/xenium.tsv", description="sheet of the samples, from the root of the workflow")
    references: str = Field("config/references.tsv", description="sheet of the scRNA-seq references, likewise")
    cells_per_type: Count = Field(2000, description="cells of each type that are taken from a reference")
    registration: RegistrationSettings = RegistrationSettings()
    cell_types: CellTypeSettings = CellTypeSettings()
    patches: PatchSettings = PatchSettings()
    split: XeniumSplitSettings = XeniumSplitSettings()
