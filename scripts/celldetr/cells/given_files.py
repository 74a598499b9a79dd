"""Files of cells that a user already has.

    outlines    GeoJSON (see `celldetr.slides.geojson`), GeoParquet, Parquet with WKB
    boxes       table with the columns of one of `BOXES`
    points      table with the columns of one of `POINTS`; a circle stands for the cell
    corners     table with the columns `CORNERS`, a row per corner, as Xenium writes boundaries
    labels      see `celldetr.cells.label_image`

A table is CSV, TSV or Parquet; GeoJSON, CSV and TSV may be compressed. The id of a cell is property ``cell_id`` of its
feature, or else the id of the feature; in a table, the first of the columns `IDS` that it has, or else the index that
pandas stored. Cells without ids are numbered from 1.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from pyarrow import csv

from celldetr.runtime.errors import InputError
from celldetr.slides.geojson import GZIP, read_geojson
from celldetr.slides.outline_files import BOM, from_wkb, geometry_column, is_binary, open_parquet, read_format

log = logging.getLogger(__name__)

IDS = ("cell_id", "Object ID", "id", "name")
BOXES: tuple[tuple[str, ...], ...] = (
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "width", "height"),
)
"""Columns of a box: two corners, or a corner and the size."""
POINTS: dict[tuple[str, ...], str] = {
    ("x", "y"): "",
    ("x_centroid", "y_centroid"): "",
    ("x_um", "y_um"): "um",
    ("Centroid X µm", "Centroid Y µm"): "um",
    ("Centroid X px", "Centroid Y px"): "px",
}
"""Columns of a point, and the unit that they state."""
CORNERS: tuple[str, ...] = ("cell_id", "vertex_x", "vertex_y")
DIAMETER, LABEL = "diameter_um", "label_id"
EXPECTED = "cells as GeoJSON, GeoParquet, Parquet with WKB, or a table (CSV, TSV, Parquet)"
_IMAGE, _TYPE = "Image", "Object type"  # columns of QuPath
_AMBIGUOUS = ("x", "y", "width", "height")
_NAMED = 5  # cells that an error names
_FEWEST = 3  # corners
_MEND = "correct or remove them"


@dataclass(frozen=True)
class CellObjects:
    """Objects of a file (n), in its own coordinates."""

    path: Path
    shapes: NDArray[np.object_]
    """Geometries (n,); None or empty if missing or unreadable."""
    ids: NDArray[np.object_]
    """Ids (n,) as text."""
    kinds: NDArray[np.str_]
    """What each (n,) outlines, see `celldetr.slides.geojson.Outline`."""
    word: str
    """What the file calls an object: feature, cell or label."""
    unit: str = ""
    """Unit that the columns state; otherwise empty."""
    circles: bool = False
    """Whether circles stand for points."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, chosen: NDArray[np.bool_]) -> "CellObjects":
        """Objects where `chosen` (n,)."""
        return dataclasses.replace(self, shapes=self.shapes[chosen], ids=self.ids[chosen], kinds=self.kinds[chosen])

    def refuse(self, bad: NDArray[np.bool_], problem: str, remedy: str = _MEND) -> None:
        """Raise `InputError` that names the first objects that are `bad` (n,), if any is."""
        places = np.flatnonzero(bad)
        _refuse(
            self.path, [f"{self.word} {self.ids[place]!r}" for place in places[:_NAMED]], len(places), problem, remedy
        )


def read_objects(path: Path, *, um: float, diameter_um: float | None = None) -> CellObjects:
    """Read all objects of a file, in its order; its content tells the format.

    `um` is um per unit of the file; `diameter_um` the size of the circles that stand for points; None: a column has it.

    Raises
    ------
    InputError
        There is no such file, it is damaged, its format or its columns are unknown, or an id or a number is missing.
    """
    form, start = read_format(path, EXPECTED)
    if form == "parquet":
        objects = _parquet(path, um, diameter_um)
    elif form == "geojson":
        objects = _geojson(path)
    elif form != "text":
        raise InputError(f"{path}: got a file that starts with {start[:8]!r}, expected {EXPECTED}")
    else:
        objects = _text(path, start).objects(um, diameter_um)
    if diameter_um is not None and not objects.circles:
        raise InputError(f"{path}: got outlines or boxes, and diameter_um, which is for points; leave diameter_um out")
    return objects


def numbers(count: int) -> NDArray[np.object_]:
    """Ids (count,) of cells that have none."""
    return np.arange(1, count + 1).astype(str).astype(object)


def _refuse(path: Path, names: Sequence[str], count: int, problem: str, remedy: str = _MEND) -> None:
    if count:
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise InputError(f"{path}: got {problem}: {', '.join(names)}{more}; {remedy}")


def _refuse_rows(path: Path, word: str, bad: NDArray[np.bool_], problem: str, remedy: str = _MEND) -> None:
    """Raise `InputError` that names the first rows that are `bad` (n,), if any is."""
    places = np.flatnonzero(bad)
    _refuse(path, [f"{word} {place + 1}" for place in places[:_NAMED]], len(places), problem, remedy)


def _geojson(path: Path) -> CellObjects:
    batches = [*read_geojson(path)]
    shapes, kinds = (np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
    ids = np.array([name for batch in batches for name in batch[2]], dtype=object)
    if (ids == "").all():
        ids = numbers(len(ids))
    _refuse_rows(path, "feature", ids == "", "no id", "give each feature an id, or none")
    return CellObjects(path, shapes, ids, kinds, "feature")


@dataclass(frozen=True)
class _Table:
    """A table of cells."""

    path: Path
    columns: list[str]
    load: Callable[[list[str]], pd.DataFrame]
    """Reads some columns."""
    index: NDArray[np.object_] | str = ""
    """Column with the index, or its values (n,), that pandas stored; empty: none."""

    def __post_init__(self) -> None:
        known = {*IDS, *chain.from_iterable((*BOXES, *POINTS, CORNERS)), DIAMETER, LABEL}
        if twice := sorted({name for name in known if self.columns.count(name) > 1}):
            raise InputError(f"{self.path}: got columns {', '.join(twice)} twice, expected each once")

    def has(self, names: Sequence[str]) -> bool:
        """Whether it has all of these columns."""
        return set(names) <= set(self.columns)

    def objects(self, um: float, diameter_um: float | None) -> CellObjects:
        """Make cells of the boxes, points or corners."""
        if self.has(CORNERS):
            return self._corners()
        for names in BOXES:
            if self.has(names):
                return self._boxes(names)
        if self.has(_AMBIGUOUS):
            self._refuse_columns(
                "x and y may be a corner or the centre; name the columns left and top, or x0, y0, x1, y1"
            )
        for names, unit in POINTS.items():
            if self.has(names):
                return self._points(names, unit, um, diameter_um)
        self._refuse_columns("none says where a cell is")

    def rows(self, names: Sequence[str]) -> tuple[pd.DataFrame, NDArray[np.object_]]:
        """Read some columns (n), and the ids (n,)."""
        column = next((name for name in IDS if name in self.columns), None)
        if column is None and isinstance(self.index, str) and self.index:
            column = self.index
        frame = self.load([*names, *([] if column is None else [column])])
        if column is not None:
            return frame, self._ids(frame[column], column)
        if isinstance(self.index, str):
            return frame, numbers(len(frame))
        if len(self.index) != len(frame):
            raise InputError(
                f"{self.path}: got {len(frame)} rows and an index of {len(self.index)}; write the file again"
            )
        return frame, self.index

    def _refuse_columns(self, problem: str) -> NoReturn:
        accepted = " | ".join(", ".join(names) for names in (*BOXES, *POINTS, CORNERS))
        columns = ", ".join(self.columns[:30])
        raise InputError(f"{self.path}: got columns {columns}; {problem}; expected {accepted}; or {EXPECTED}")

    def _numbers(self, frame: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
        """Columns (n, k) as numbers."""
        values = np.stack([pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64) for name in names], axis=1)
        bad = ~np.isfinite(values).all(axis=1)
        _refuse_rows(self.path, "row", np.asarray(bad), f"no number in column {' or '.join(names)}")
        return values

    def _ids(self, column: pd.Series, name: str) -> NDArray[np.object_]:
        """Ids (n,) of a column of text or whole numbers."""
        values = column.to_numpy(object)
        if len(values) and isinstance(values[0], bytes):  # early Xenium output
            values = np.array([value.decode() if isinstance(value, bytes) else value for value in values], object)
        bad = np.fromiter(map(_is_no_id, values), bool, len(values))
        _refuse_rows(self.path, "row", bad, f"no id in column {name}", "give each cell an id: text, or a whole number")
        return np.array([str(value) for value in values], object)

    def _made(self, shapes: NDArray[Any], ids: NDArray[np.object_], **more: Any) -> CellObjects:
        return CellObjects(self.path, shapes, ids, np.full(len(ids), ""), "cell", **more)

    def _boxes(self, names: Sequence[str]) -> CellObjects:
        frame, ids = self.rows(names)
        boxes = self._numbers(frame, names)
        if "width" in names:
            boxes[:, 2:] += boxes[:, :2]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
        _refuse_rows(self.path, "row", np.asarray(flat), f"boxes without area ({', '.join(names)})")
        return self._made(shapely.box(*boxes.T), ids)

    def _points(self, names: Sequence[str], unit: str, um: float, diameter_um: float | None) -> CellObjects:
        own = diameter_um is None
        if own and DIAMETER not in self.columns:
            raise InputError(
                f"{self.path}: got points ({', '.join(names)}) without the size of the cells; give their diameter_um, "
                f"or add a column {DIAMETER}"
            )
        more = [name for name in (_IMAGE, _TYPE) if name in self.columns]
        frame, ids = self.rows([*names, *([DIAMETER] if own else []), *more])
        if _IMAGE in frame and frame[_IMAGE].nunique() > 1:
            images = ", ".join(map(str, frame[_IMAGE].unique()[:_NAMED]))
            raise InputError(f"{self.path}: got cells of several images ({images}); keep the rows of this slide alone")
        diameter = self._numbers(frame, [DIAMETER])[:, 0] if own else np.full(len(frame), diameter_um)
        _refuse_rows(self.path, "row", diameter <= 0, f"a {DIAMETER} of 0 or less")
        points = shapely.points(self._numbers(frame, names))
        circles = shapely.buffer(points, diameter / 2 / (1.0 if unit == "um" else um))
        cells = self._made(circles, ids, unit=unit, circles=True)
        if _TYPE not in frame:
            return cells
        kinds = frame[_TYPE].astype(str).str.lower().replace("cell", "detection")  # it has no outline to choose
        return dataclasses.replace(cells, kinds=kinds.to_numpy(np.str_))

    def _corners(self) -> CellObjects:
        """Make cells of corners; nuclei of a cell that has several are one cell in pieces."""
        numbered = [LABEL] if LABEL in self.columns else []
        frame = self.load([*CORNERS, *numbered])
        corners = self._numbers(frame, CORNERS[1:])
        cell, names = pd.factorize(frame["cell_id"])
        _refuse_rows(self.path, "row", cell < 0, "no id in column cell_id")
        label = pd.factorize(frame[LABEL])[0] if numbered else np.zeros(len(frame), int)
        order = np.lexsort((label, cell))
        cell, label, corners = cell[order], label[order], corners[order]
        new = np.ones(len(cell), dtype=bool)
        new[1:] = (np.diff(cell) != 0) | (np.diff(label) != 0)
        few = np.diff(np.flatnonzero(np.append(new, True))) < _FEWEST
        ids = self._ids(pd.Series(names), "cell_id")
        bad = np.unique(cell[new][few])
        _refuse(self.path, [f"cell {ids[i]!r}" for i in bad[:_NAMED]], len(bad), f"fewer than {_FEWEST} corners")
        rings = shapely.linearrings(corners, indices=np.cumsum(new) - 1)
        return self._made(shapely.multipolygons(shapely.polygons(rings), indices=cell[new]), ids)


def _is_no_id(value: object) -> bool:
    text = isinstance(value, str) and value != ""
    return not text and (isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer))


def _text(path: Path, start: bytes) -> _Table:
    """Open a CSV or TSV file; all values are read as text, so that ids stay as they are."""
    header = start.removeprefix(BOM).split(b"\n", 1)[0].strip()
    with path.open("rb") as file:
        compression = "gzip" if file.read(2) == GZIP else None
    form = csv.ParseOptions(delimiter="\t" if b"\t" in header else ",")
    damaged = f"{path}: cannot be read as a table in UTF-8 (%s); is the file complete?"

    def load(columns: list[str]) -> pd.DataFrame:
        texts = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        try:
            with pa.input_stream(path, compression=compression) as stream:
                return _frame(csv.read_csv(stream, parse_options=form, convert_options=texts))
        except (pa.ArrowException, OSError) as error:
            raise InputError(damaged % error) from error

    try:
        names = csv.read_csv(pa.py_buffer(header.removesuffix(b"\r") + b"\n"), parse_options=form).column_names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(damaged % error) from error
    return _Table(path, names, load)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Columns as pandas has them; ids that repeat take little memory."""
    repeated = [name for name in table.column_names if name == "cell_id"]
    frame: pd.DataFrame = table.replace_schema_metadata(None).to_pandas(categories=repeated)
    return frame


def _parquet(path: Path, um: float, diameter_um: float | None) -> CellObjects:
    """Read Parquet: outlines if it has a column of geometry, or else a table."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
        table = _Table(
            path, schema.names, lambda columns: _frame(file.read(columns=columns)), _stored_index(path, schema)
        )
        binary = any(is_binary(schema.field(name).type) for name in schema.names if name not in IDS)
        if table.has(CORNERS) or not (binary or b"geo" in (schema.metadata or {})):
            return table.objects(um, diameter_um)
        column = geometry_column(path, file)
        frame, ids = table.rows([column])
        shapes = from_wkb(pa.array(frame[column], pa.binary()))
        return CellObjects(path, shapes, ids, np.full(len(ids), ""), "cell")


def _stored_index(path: Path, schema: pa.Schema) -> NDArray[np.object_] | str:
    """Column of the index that pandas stored, or its values (n,) if it is a range; empty if there is none."""
    try:
        stored = ((schema.pandas_metadata or {}).get("index_columns") or [""])[0]
        if isinstance(stored, dict):
            return np.arange(stored["start"], stored["stop"], stored["step"]).astype(str).astype(object)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: the metadata of pandas cannot be read ({error}); write the file again, with a column cell_id"
        ) from error
    return str(stored) if stored in schema.names else ""
