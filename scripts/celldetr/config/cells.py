"""Settings of the cells of slides: which model finds and embeds them, and which files are written."""

from typing import Annotated, Literal

from pydantic import Field

from celldetr.config.base import EACH_ONCE, BatchSize, NotNegative, Settings, Share

Outputs = Annotated[
    tuple[Literal["h5ad", "geojson", "cellvit", "spatialdata"], ...],
    EACH_ONCE,
    Field(json_schema_extra={"uniqueItems": True}),
]


class CellSettings(Settings):
    """Cells of slides, with types and embeddings."""

    sheet: str | None = Field(
        None, description="sheet of the slides; null: those of slides.sheet and the H&E images of xenium.samples"
    )
    model: str = Field("celldetr_p", description="experiment or model file (.pt) with classes and embeddings")
    split: int = Field(1, ge=1, le=3, description="split of the experiment whose model is taken")
    margin_um: NotNegative = Field(
        8.0,
        description="border of a tile, um; a cell whose centre lies in it is left to the neighbouring tile; with 12 or "
        "16, embeddings near borders are closer to those inside, for 1.4 or 2.3 times as many tiles of 64 um",
    )
    nucleus_threshold: Share = Field(0.4, description="smallest nucleus score of a cell")
    class_threshold: Share = Field(0.4, description="smallest class score; a cell without one has no type")
    batch_size: BatchSize = Field(64, description="tiles per batch")
    jobs: int = Field(
        1, ge=1, le=1000, description="jobs that share a slide, each with a GPU; another number finds all cells again"
    )
    on_damage: Literal["stop", "skip"] = Field(
        "stop", description="if part of a slide cannot be decoded; stop: with an error; skip: leave it out and count it"
    )
    outputs: Outputs = Field(
        ("h5ad", "geojson"),
        description="files beside the Parquet and the page: h5ad; geojson: for QuPath; cellvit: for CellViT's viewer; "
        "spatialdata",
    )
    embeddings: Literal["float32", "float16"] = Field("float32", description="type of the embeddings in the files")
    image: Literal["none", "link", "write"] = Field(
        "none",
        description="slide image in the SpatialData: none; link: where the slide lies, for read_spatialdata; write: "
        "its pixels (as large as the slide unpacked)",
    )
