"""Outlines of nuclei from files as boxes.

    GeoJSON    a FeatureCollection, a list of features or a feature on each line, also zipped
    Parquet    the primary geometry of GeoParquet; or a column of WKB (``geometry``, or the only binary column)

Only geometry is read: classes and other properties are ignored, so that no labels of another model get into
self-supervised pretraining. Outlines are read in batches, and only boxes and centroids are kept in memory.

A MultiPolygon as small as a nucleus is one nucleus in pieces. A larger one holds one nucleus in each part: CellViT
writes all nuclei of a class that way.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei, place_outlines
from celldetr.slides.geojson import read_geojson
from celldetr.store import NO_LABEL

_BATCH = 20_000  # outlines in a batch
_LARGEST_UM = 60.0  # largest width of a nucleus
_PLAUSIBLE_UM = (2.0, 20.0)  # smallest and largest median width of nuclei
_UNREADABLE, _OTHER, _FLAT = "outlines that are empty or unreadable", "no polygons", "outlines without area"
_BOM, _BLANK = b"\xef\xbb\xbf", b" \t\r\n"
_KINDS = "GeoParquet, Parquet with WKB, GeoJSON or zipped GeoJSON"


@dataclass(frozen=True)
class NucleusFile:
    """Nuclei of a file."""

    nuclei: SlideNuclei
    """In px of the wanted size; no labels."""
    dropped: dict[str, int]
    """Reason -> outlines that give no nucleus."""
    repaired: int
    """Outlines that cross themselves; their boxes are kept."""


def read_nucleus_file(path: str | os.PathLike[str], *, image_mpp: float, mpp: float, unit: str = "px") -> NucleusFile:
    """Read the nuclei of a slide.

    Parameters
    ----------
    path
        File; its format is recognised by its content.
    image_mpp
        Size of a level-0 pixel of the slide in um.
    mpp
        Size of a pixel of the result in um.
    unit
        Of the file's coordinates: ``px`` of level 0, or ``um``.

    Raises
    ------
    InputError
        There is no such file, its format is unknown, it is damaged or has no polygons, or its nuclei have an impossible
        size (wrong unit).
    """
    file = Path(path)
    scale = {"px": 1.0, "um": 1 / image_mpp}[unit]
    dropped = {_UNREADABLE: 0, _OTHER: 0, _FLAT: 0}
    repaired = 0
    outlines: list[NDArray[Any]] = []
    for shapes in _read(file):
        polygons = _polygons(shapes, _LARGEST_UM / image_mpp / scale, dropped)
        placed, good = place_outlines(polygons, np.diag([scale, scale, 1.0]), image_mpp, mpp)
        repaired += int((good & ~shapely.is_valid(polygons)).sum())
        dropped[_FLAT] += int((~good).sum())
        outlines.append(placed[good])
    nuclei = np.concatenate([np.empty(0, dtype=object), *outlines])
    found = SlideNuclei(nuclei, np.full(len(nuclei), NO_LABEL, np.int8))
    if not len(found) and any(dropped.values()):
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise InputError(f"{file}: got no outline of a nucleus ({counts}); expected polygons")
    if len(found):
        _check_size(file, found.boxes, mpp, unit)
    return NucleusFile(found, dropped, repaired)


def _check_size(path: Path, boxes: NDArray[np.float64], mpp: float, unit: str) -> None:
    width = float(np.median(boxes[:, 2:] - boxes[:, :2])) * mpp
    low, high = _PLAUSIBLE_UM
    if not low <= width <= high:
        raise InputError(
            f"{path}: got nuclei that are {width:.3g} um wide (median, if coordinates are {unit}), expected {low:g} to "
            f"{high:g}; correct nuclei_unit (px of level 0, or um) or mpp in the slides sheet"
        )


def _polygons(shapes: NDArray[Any], largest: float, dropped: dict[str, int]) -> NDArray[Any]:
    """Polygons (or small MultiPolygons), one for each nucleus; other shapes are counted in `dropped`."""
    extent = shapely.bounds(shapes)
    readable = np.isfinite(extent).all(axis=1)
    corners, owner = shapely.get_coordinates(shapes, return_index=True)
    readable[owner[~np.isfinite(corners).all(axis=1)]] = False
    kind = shapely.get_type_id(shapes)
    multiple = kind == shapely.GeometryType.MULTIPOLYGON
    polygonal = multiple | (kind == shapely.GeometryType.POLYGON)
    dropped[_UNREADABLE] += int((~readable).sum())
    dropped[_OTHER] += int((readable & ~polygonal).sum())
    with np.errstate(invalid="ignore"):
        several = readable & multiple & ((extent[:, 2:] - extent[:, :2]).max(axis=1) > largest)
    return np.concatenate([shapes[readable & polygonal & ~several], shapely.get_parts(shapes[several])])


def _read(path: Path) -> Iterator[NDArray[Any]]:
    """Yield batches of geometries (n,), None if missing or unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); expected outlines of nuclei as {_KINDS}") from error
    if start.startswith(b"PAR1"):
        yield from _parquet(path)
    elif start.startswith(b"PK") or start.removeprefix(_BOM).lstrip(_BLANK)[:1] in (b"{", b"["):
        yield from read_geojson(path)
    else:
        raise InputError(f"{path}: got a file that starts with {start[:8]!r}, expected outlines of nuclei as {_KINDS}")


def _parquet(path: Path) -> Iterator[NDArray[Any]]:
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        column = _geometry_column(path, file)
        for batch in file.iter_batches(batch_size=_BATCH, columns=[column], use_threads=False):
            yield _from_wkb(batch.column(0))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); is the file complete?") from error


def _geometry_column(path: Path, file: pq.ParquetFile) -> str:
    schema = file.schema_arrow
    binary = [name for name in schema.names if _is_binary(schema.field(name).type)]
    try:
        geo = json.loads((schema.metadata or {})[b"geo"])
        name = str(geo["primary_column"])
        encoding = geo["columns"][name].get("encoding", "WKB")
    except KeyError:
        name = "geometry" if "geometry" in binary or len(binary) != 1 else binary[0]
        encoding = "WKB"
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the GeoParquet metadata cannot be read ({error}); write the file again") from error
    if encoding != "WKB" or name not in binary:
        raise InputError(
            f"{path}: got no column {name!r} of geometry in WKB (columns: {', '.join(schema.names)}; encoding "
            f"{encoding}); expected GeoParquet with encoding WKB, or a binary column 'geometry'"
        )
    return name


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _from_wkb(column: pa.Array) -> NDArray[Any]:
    shapes: NDArray[Any] = shapely.from_wkb(np.array(column.to_pylist(), dtype=object), on_invalid="ignore")
    return shapes
