"""Settings of the cell types, with the defaults of the pipeline."""

from typing import Annotated, Literal

from pydantic import Field

from celldetr.settings import Settings


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
    lamb: Annotated[float, Field(gt=0)] = Field(
        0.1, description="how strongly optimal transport holds on to that composition (TACCO's lamb)"
    )
    min_fraction: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="fraction that a label's type must have")
    min_margin: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="distance that a label's fraction must have to the second largest"
    )
    min_transcripts: Annotated[int, Field(ge=0)] = Field(
        10, description="transcripts of the shared genes that a labelled cell must have"
    )
    require_agreement: bool = Field(
        True, description="a cell on whose type the two annotators disagree stays without a label"
    )
