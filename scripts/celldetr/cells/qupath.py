"""The cells of a slide as GeoJSON for QuPath (0.4 or newer): a FeatureCollection of detections, a line each.

QuPath's reader asks for more than GeoJSON does, and stops at the first object that is otherwise: a geometry and closed,
valid rings; a class with name and colour, or none; measurements that are numbers; no null. It ignores ids that are no
UUIDs, therefore a cell's own id is its name (and ``cell_id``, which we read). Coordinates are px of level 0 from the
corner of the scanned part of the slide, where QuPath's images of OpenSlide start; with two decimals, which is all that
QuPath keeps.
"""

import gzip
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from celldetr.cells.table import CellFile, CellsInfo
from celldetr.config.colours import class_colours
from celldetr.runtime.files import atomic

_DECIMALS, _SCORE_DECIMALS = 2, 4
_LEVEL = 1  # of gzip; 9 takes five times as long and makes the file a fifth smaller
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


def write_geojson(cells: CellFile, path: str | os.PathLike[str]) -> None:
    """Write the cells without embeddings as compressed GeoJSON, batch by batch; one thread compresses.

    Raises
    ------
    OSError
        It cannot be written; if the disk is full, the error names `path`.
    """
    with (
        atomic(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as file,
        ThreadPoolExecutor(1) as pool,
    ):
        written: Future[int] = pool.submit(file.write, b'{"type":"FeatureCollection","features":[')
        for text in _texts(cells):
            written.result()  # one batch waits at most
            written = pool.submit(file.write, text)
        written.result()
        file.write(b"\n]}\n")


def _texts(cells: CellFile) -> Iterator[bytes]:
    """Yield the features of all cells, batch by batch, with the commas between them."""
    info = cells.info
    classes = {
        name: orjson.Fragment(orjson.dumps({"name": name, "color": [*bytes.fromhex(colour[1:])]}))
        for name, colour in zip(info.classes, class_colours(info.classes), strict=False)
    }
    measured = _measurements(info)
    columns = ["cell_id", "geometry", "status", *(["type"] if info.classes else []), *measured]
    # Cells without an id of QuPath's kind get one that is the same whenever the file is written.
    head = str(uuid.uuid5(uuid.NAMESPACE_OID, orjson.dumps([info.slide, info.file, dict(info.model)]).decode()))[:24]
    number = 0
    for batch in cells.batches(columns):
        ids = batch["cell_id"].to_pylist()
        is_uuid = pc.match_substring_regex(batch["cell_id"], _UUID).to_pylist()
        geometries = _geometries(shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False)), info.origin)
        types = batch["type"].to_pylist() if info.classes else [None] * len(ids)
        values = zip(*(_numbers(batch[column], places) for column, (_, places) in measured.items()), strict=True)
        lines = []
        for cell_id, known, geometry, kind, status, row in zip(
            ids, is_uuid, geometries, types, batch["status"].to_pylist(), values, strict=True
        ):
            properties: dict[str, Any] = {"objectType": "detection", "name": cell_id, "cell_id": cell_id}
            if kind is not None:
                properties["classification"] = classes[kind]
            properties["measurements"] = {
                name: value for (name, _), value in zip(measured.values(), row, strict=True) if value is not None
            }
            if status != "read":
                properties["metadata"] = {"status": status}
            feature = {
                "type": "Feature",
                "id": cell_id if known else f"{head}{number:012x}",
                "geometry": orjson.Fragment(geometry),
                "properties": properties,
            }
            lines.append((b",\n" if number else b"\n") + orjson.dumps(feature))
            number += 1
        yield b"".join(lines)


def _measurements(info: CellsInfo) -> dict[str, tuple[str, int]]:
    """Return the name of a measurement and its decimals for each column."""
    found = {"nucleus_score": ("Nucleus score", _SCORE_DECIMALS)}
    found |= {f"score_{name}": (f"Score {name}", _SCORE_DECIMALS) for name in info.classes}
    return found | {"width_um": ("Width µm", _DECIMALS), "height_um": ("Height µm", _DECIMALS)}


def _numbers(column: pa.Array, decimals: int) -> list[float | None]:
    """Return rounded values, None where there is none or it is no number, which JSON does not have."""
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    rounded: list[float | None] = np.round(values, decimals).tolist()
    for index in np.flatnonzero(~np.isfinite(values)):
        rounded[index] = None
    return rounded


def _geometries(outlines: NDArray[Any], origin: tuple[int, int]) -> NDArray[Any]:
    """Return outlines (n,) as texts of GeoJSON, relative to the origin, rounded, and mended where they cross."""
    moved = shapely.transform(outlines, lambda corners: corners - origin)
    rounded = shapely.transform(moved, lambda corners: np.round(corners, _DECIMALS))
    bad = np.flatnonzero(~shapely.is_valid(rounded))
    mended = shapely.make_valid(moved[bad], method="structure", keep_collapsed=False)
    rounded[bad] = np.where(shapely.is_empty(mended), moved[bad], shapely.set_precision(mended, 10.0**-_DECIMALS))
    texts: NDArray[Any] = shapely.to_geojson(rounded)
    return texts
