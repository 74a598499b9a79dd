"""Settings of the choice of patches; read without the libraries that cut them."""

from typing import Annotated

from pydantic import Field

from celldetr.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class PatchSettings(Settings):
    """Which patches of a slide are taken."""

    stride: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="distance between patches, as a share of their side; 1: side by side, 0.5: half overlapping"
    )
    min_tissue: Share = Field(0.25, description="smallest share of a patch that is tissue")
    min_nuclei: Count = Field(1, description="fewest nuclei in a patch")
    min_labelled: Count = Field(5, description="fewest nuclei with a label in a patch")
    max_patches: Annotated[int, Field(ge=1)] | None = Field(
        None, description="most patches of a slide, drawn with the seed; null: all"
    )
