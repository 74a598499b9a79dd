"""Settings of the registration of H&E images to Xenium samples."""

from typing import Literal, Self

from pydantic import Field, model_validator

from celldetr.settings import Settings


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
