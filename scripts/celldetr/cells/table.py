"""The cells of a slide as one GeoParquet file, from which every other file of cells is made.

One row per cell. Columns:

    cell_id         string; of a given cell its own id, of a detected one its number, from 1
    geometry        WKB, px of level 0: the outline of a given cell, or the box of a detected one
    x_um, y_um      float64, centre of the box, um from the corner of the slide
    width_um, height_um     float64, size of the box
    nucleus_score   float32; of a given cell that of the detection that agrees with it, null if none does
    type            class with the highest score; null if that is below the class threshold
    score_{class}   float32, one per class
    tile            int32, number of the tile that was read for the cell; -1: the cell lies outside of the slide
    edge_um         float64, distance of the centre from the nearest edge of that tile
    border          bool; the edge of the tile cuts the box
    status          read; outside (of the slide) or damaged: such a given cell has no scores and no embedding
    embedding       fixed-size list of float32 or float16, null without one

The schema metadata holds a JSON object under ``celldetr``, see `CellsInfo`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError

FORMAT = 1
STATUSES = ("read", "outside", "damaged")
ROWS = 16_384
"""Rows of a row group: 16 MB of embeddings."""
METADATA_KEY = b"celldetr"
_BUFFER = 1 << 20  # bytes of a file that are read at once
Floats = Literal["float32", "float16"]
"""Types of embeddings in files."""
_NAMES = pa.dictionary(pa.int8(), pa.string())


@dataclass(frozen=True)
class CellsInfo:
    """Where the cells of a file come from."""

    slide: str
    """Name of the slide."""
    file: str
    """Name of its file."""
    mpp: float
    """um per px of level 0."""
    size: tuple[int, int]
    """Width and height of level 0, px."""
    origin: tuple[int, int]
    """Corner of the scanned part of the slide, px of level 0, from which QuPath counts (openslide.bounds-x and -y)."""
    classes: tuple[str, ...]
    """Classes that the model tells apart, in the order of the scores."""
    width: int
    """Length of an embedding; 0: the file has none."""
    given: bool
    """Whether the cells are those of a file of the user; otherwise the model found them."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """``file``, ``sha256``, ``experiment``, ``trained_on``, ``seen`` (whether it was trained on this slide's group)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the cells depend on."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was read, left out and merged, by its words, e.g. ``tiles``, ``tiles damaged``, ``cells``."""
    areas: Mapping[str, float] = field(default_factory=dict)
    """``slide_mm2``, ``region_mm2`` (with a region), ``tissue_mm2`` (of the slide) and ``read_mm2``: the part of it
    that the model has seen. With given cells no tissue is searched for; ``read_mm2`` is the area of what was read."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time of each stage: ``tissue``, ``read`` (waiting for tiles), ``model``, ``write`` (beside these), ``join``."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """``git_revision``, ``versions``, ``device``, ``started``."""

    def to_json(self) -> bytes:
        """Return what `from_json` reads."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read the metadata; `KeyError`, `TypeError` or `ValueError` if it is not what `to_json` writes."""
        values = dict(json.loads(text))
        if (found := values.pop("format")) != FORMAT:
            raise ValueError(f"format {found!r}, expected {FORMAT}")
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Make it of its fields as JSON values."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("size", "origin", "classes")}})


def cell_schema(info: CellsInfo, dtype: Floats = "float32") -> pa.Schema:
    """Return the columns of a file; `dtype` is that of the embeddings."""
    fields = [("cell_id", pa.string()), ("geometry", pa.binary())]
    fields += [(name, pa.float64()) for name in ("x_um", "y_um", "width_um", "height_um")]
    fields += [("nucleus_score", pa.float32())]
    if info.classes:
        fields += [("type", _NAMES), *((f"score_{name}", pa.float32()) for name in info.classes)]
    fields += [("tile", pa.int32()), ("edge_um", pa.float64()), ("border", pa.bool_()), ("status", _NAMES)]
    if info.width:
        fields.append(("embedding", pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), info.width)))
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": [], "crs": None}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return pa.schema(fields, metadata={METADATA_KEY: info.to_json(), b"geo": json.dumps(geo).encode()})


def named(codes: NDArray[np.integer], names: Sequence[str]) -> pa.DictionaryArray:
    """Column of names (n,) from their indices; -1: null."""
    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int8), mask=codes < 0), pa.array(list(names), pa.string())
    )


def embedding_column(embeddings: NDArray[np.floating], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Column of embeddings (n, C), null where `missing` (n,)."""
    flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    mask = None if missing is None or not missing.any() else pa.array(missing)
    return pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1], mask=mask)


def embedding_values(column: pa.FixedSizeListArray) -> NDArray[np.floating]:
    """Embeddings (n, C) of a column, NaN where a cell has none."""
    width = column.type.list_size
    found = column.values.slice(column.offset * width, len(column) * width)
    values: NDArray[np.floating] = found.to_numpy(zero_copy_only=False).reshape(-1, width)
    if column.null_count:
        values = np.where(column.is_null().to_numpy(zero_copy_only=False)[:, None], np.nan, values)
    return values


def writer(path: str | os.PathLike[str], schema: pa.Schema) -> pq.ParquetWriter:
    """Open a file of cells for writing; use it in a ``with`` and inside `celldetr.runtime.files.atomic`."""
    texts = ["cell_id", "type", "status"]
    return pq.ParquetWriter(
        path,
        schema,
        compression={name: "zstd" for name in schema.names if name != "embedding"} | {"embedding": "none"},
        use_dictionary=[name for name in texts[1:] if name in schema.names],
        write_page_checksum=True,
    )


class NothingFound(InputError):
    """A slide has no tissue, or no cell was found on it."""


class CellFile:
    """An open file of cells; nothing but the metadata is in memory.

    Raises
    ------
    InputError
        Not a file of cells, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # With what pyarrow takes by default, row groups that have been read stay in memory.
            self._file = pq.ParquetFile(path, page_checksum_verification=True, buffer_size=_BUFFER, pre_buffer=False)
            self.schema: pa.Schema = self._file.schema_arrow
            self.info = CellsInfo.from_json(self._file.metadata.metadata[METADATA_KEY])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: got {error!r}, expected a file of cells (results/cells/SLIDE.parquet)"
            ) from error

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Sequence[str] | None = None, rows: int = ROWS) -> Iterator[pa.RecordBatch]:
        """Yield some columns (None: all) of all cells in order, `rows` at a time."""
        try:
            yield from self._file.iter_batches(batch_size=rows, columns=None if columns is None else list(columns))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); make it again") from error

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return some columns (None: all but geometry and embeddings) as one table, indexed by `cell_id` if taken."""
        names = [name for name in self.schema.names if name not in ("geometry", "embedding")]
        names = [name for name in names if columns is None or name in columns]
        table = pa.Table.from_batches(self.batches(names), pa.schema([self.schema.field(name) for name in names]))
        frame: pd.DataFrame = table.to_pandas(self_destruct=True, split_blocks=True)
        for name, categories in (("type", self.info.classes), ("status", STATUSES)):
            if name in frame:
                frame[name] = frame[name].cat.set_categories(list(categories))
        return frame.set_index("cell_id") if "cell_id" in frame else frame

    def take(self, numbers: NDArray[np.integer], columns: Sequence[str]) -> pa.Table:
        """Return some columns of the cells in these rows (n,), ascending; memory holds them and a batch."""
        found, start = [], 0
        for batch in self.batches(columns):
            low, high = np.searchsorted(numbers, [start, start + len(batch)])
            found.append(batch.take(pa.array(numbers[low:high] - start)))
            start += len(batch)
        return pa.Table.from_batches(found, pa.schema([self.schema.field(name) for name in columns]))

    def embeddings(self, rows: int = ROWS) -> Iterator[NDArray[np.floating]]:
        """Yield the embeddings (n, C) of all cells in order, NaN where a cell has none."""
        for batch in self.batches(["embedding"], rows):
            yield embedding_values(batch.column(0))

    def outlines(self, rows: int = ROWS) -> Iterator[NDArray[np.object_]]:
        """Yield the geometries (n,) of all cells in order, px of level 0."""
        for batch in self.batches(["geometry"], rows):
            yield shapely.from_wkb(batch.column(0).to_numpy(zero_copy_only=False))
