"""The cells of a slide as the viewer of CellViT reads them: a list of features, one for each type, not compressed.

Each is a MultiPolygon of all cells of its type, with name and colour of the class; the viewer draws outer rings alone.
Coordinates are px of level 0. Scores, ids and which cell is which are lost: for QuPath there is another file.
"""

import os
from collections.abc import Iterator

import numpy as np
import orjson
import pyarrow.compute as pc
import shapely

from celldetr.cells.table import CellFile
from celldetr.config.colours import class_colours
from celldetr.runtime.files import atomic

_DECIMALS = 2
_UNTYPED = "untyped"


def write_cellvit(cells: CellFile, path: str | os.PathLike[str]) -> None:
    """Write the outlines of the cells, type by type and batch by batch; types without cells are left out.

    Raises
    ------
    OSError
        It cannot be written; if the disk is full, the error names `path`.
    """
    classes = cells.info.classes
    features = 0
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(b"[")
        for name, colour in zip((*classes, None), class_colours(classes), strict=True):
            polygons = 0
            for text in _polygons(cells, name):
                file.write(b"," if polygons else _head(name or _UNTYPED, colour, first=not features))
                file.write(text)
                polygons += 1
            if polygons:
                file.write(b"]}}")
                features += 1
        file.write(b"\n]\n")


def _head(name: str, colour: str, *, first: bool) -> bytes:
    """Return the start of a feature, up to its polygons."""
    classification = {"name": name, "color": [*bytes.fromhex(colour[1:])]}
    properties = {"objectType": "annotation", "classification": classification}
    text = orjson.dumps({"type": "Feature", "properties": properties})[:-1]
    return (b"\n" if first else b",\n") + text + b',"geometry":{"type":"MultiPolygon","coordinates":['


def _polygons(cells: CellFile, name: str | None) -> Iterator[bytes]:
    """Yield the coordinates of all cells of a type (None: those without one), as text, batch by batch."""
    for batch in cells.batches(["geometry", *(["type"] if cells.info.classes else [])]):
        chosen = batch["geometry"]
        if cells.info.classes:
            kinds = batch["type"]
            chosen = chosen.filter(pc.is_null(kinds) if name is None else pc.equal(kinds.cast("string"), name))
        elif name is not None:
            continue
        parts = shapely.get_parts(shapely.from_wkb(chosen.to_numpy(zero_copy_only=False)))
        rings = shapely.transform(shapely.get_exterior_ring(parts), lambda corners: np.round(corners, _DECIMALS))
        texts = [text.partition('"coordinates":')[2][:-1] for text in shapely.to_geojson(rings)]
        if texts:
            yield f"[{'],['.join(texts)}]".encode()
