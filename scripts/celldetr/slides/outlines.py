"""Outlines of nuclei from files (GeoParquet, Parquet with WKB, GeoJSON, zipped GeoJSON) as boxes.

Only geometry is read: classes and other properties are ignored, so that nothing of another model's labels gets into
self-supervised pretraining. Files are read batch by batch, and only boxes and centroids are kept.

    GeoJSON    a FeatureCollection or a list of features, as QuPath writes it; of cells, the outline of the nucleus
    Parquet    the primary geometry column of GeoParquet, or a column of WKB (``geometry``, or the only binary one)

A MultiPolygon that is as small as a nucleus is one nucleus in pieces. A larger one holds one nucleus in each part, as
CellViT writes all nuclei of a class.
"""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import BROKEN_ZIP
from celldetr.slides.grid import Nuclei, boxes_from_polygons
from celldetr.slides.json_stream import JsonError, JsonStream
from celldetr.store import NO_LABEL

_BATCH = 20_000  # outlines at a time
_LARGEST_UM = 60.0  # width of a nucleus, at most
_PLAUSIBLE_UM = (2.0, 20.0)  # smallest and largest median width of nuclei
_EMPTY, _CROSSED, _OTHER = "outlines that are empty or unreadable", "outlines that cross themselves", "no polygons"
_NO_AREA = "outlines without area"


@dataclass
class NucleusFile:
    """What was read of a file.

    Attributes
    ----------
    nuclei
        Boxes and centroids, px of the wanted size; no labels.
    dropped
        Reason -> outlines that give no nucleus.
    repaired
        Outlines that cross themselves; their boxes are kept.
    """

    nuclei: Nuclei
    dropped: dict[str, int]
    repaired: int


@dataclass
class _Counts:
    dropped: dict[str, int] = field(default_factory=lambda: {_EMPTY: 0, _OTHER: 0, _NO_AREA: 0})
    repaired: int = 0


def read_nucleus_file(path: str | os.PathLike[str], *, image_mpp: float, mpp: float, unit: str = "px") -> NucleusFile:
    """Read the nuclei of a slide.

    Parameters
    ----------
    path
        File; its kind is told by its content.
    image_mpp
        Size of a level-0 pixel of the slide in um.
    mpp
        Size of a pixel of the result in um.
    unit
        Of the file's coordinates: ``px`` of level 0, or ``um``.

    Raises
    ------
    InputError
        No such file, not of these kinds, damaged, or nuclei of an impossible size (another unit).
    """
    scale = {"px": 1.0, "um": 1 / image_mpp}[unit]
    counts = _Counts()
    boxes, centroids = [np.empty((0, 4))], [np.empty((0, 2))]
    for shapes in _batches(Path(path)):
        single = _single(shapes, _LARGEST_UM / image_mpp / scale, counts)
        box, centroid = boxes_from_polygons(single, np.diag([scale, scale, 1.0]), image_mpp, mpp)
        good = np.isfinite(box).all(axis=1)
        counts.dropped[_NO_AREA] += int((~good).sum())
        boxes.append(box[good])
        centroids.append(centroid[good])
    box = np.concatenate(boxes)
    nuclei = Nuclei(box, np.concatenate(centroids), np.full(len(box), NO_LABEL, np.int8))
    _check_size(Path(path), nuclei, mpp, unit)
    return NucleusFile(nuclei, counts.dropped, counts.repaired)


def _check_size(path: Path, nuclei: Nuclei, mpp: float, unit: str) -> None:
    if not len(nuclei):
        return
    width = float(np.median(nuclei.boxes[:, 2:] - nuclei.boxes[:, :2])) * mpp
    low, high = _PLAUSIBLE_UM
    if not low <= width <= high:
        raise InputError(
            f"{path}: got nuclei that are {width:.3g} um wide (median, coordinates taken as {unit}), expected {low:g} "
            f"to {high:g}; give nuclei_unit (px of level 0, or um) and mpp in the slides sheet as they are"
        )


def _single(shapes: NDArray[Any], largest: float, counts: _Counts) -> NDArray[Any]:
    """Polygons of one nucleus each; what is none is counted."""
    empty = shapely.is_missing(shapes) | shapely.is_empty(shapes)
    counts.dropped[_EMPTY] += int(empty.sum())
    shapes = shapes[~empty]
    kind = shapely.get_type_id(shapes)
    polygonal = (kind == shapely.GeometryType.POLYGON) | (kind == shapely.GeometryType.MULTIPOLYGON)
    counts.dropped[_OTHER] += int((~polygonal).sum())
    shapes, kind = shapes[polygonal], kind[polygonal]
    extent = shapely.bounds(shapes)
    many = (kind == shapely.GeometryType.MULTIPOLYGON) & ((extent[:, 2:] - extent[:, :2]).max(axis=1) > largest)
    shapes = np.concatenate([shapes[~many], shapely.get_parts(shapes[many])])
    crossed = ~shapely.is_valid(shapes)
    counts.repaired += int(crossed.sum())
    if crossed.any():
        shapes[crossed] = shapely.make_valid(shapes[crossed])
        flat = shapely.area(shapes) == 0
        counts.dropped[_NO_AREA] += int(flat.sum())
        shapes = shapes[~flat]
    return shapes


def _batches(path: Path) -> Iterator[NDArray[Any]]:
    """Yield geometries (n,), None where one is missing or unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); expected outlines of nuclei") from error
    if start.startswith(b"PAR1"):
        yield from _parquet(path)
    elif start.startswith(b"PK"):
        with _member(path) as text:
            yield from _geojson(path, text)
    elif start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        with path.open(encoding="utf-8-sig") as text:
            yield from _geojson(path, text)
    else:
        raise InputError(
            f"{path}: got a file that starts with {start[:8]!r}, expected outlines of nuclei as GeoParquet, Parquet "
            "with WKB, GeoJSON or zipped GeoJSON"
        )


@contextlib.contextmanager
def _member(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open the only JSON file of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("json") and not name.startswith("__MACOSX")]
            if len(names) != 1:
                raise InputError(f"{path}: got {len(names)} GeoJSON files in the archive, expected one")
            with archive.open(names[0]) as file:
                yield io.TextIOWrapper(file, encoding="utf-8-sig")
    except (OSError, RuntimeError, *BROKEN_ZIP) as error:
        raise InputError(f"{path}: is no whole zip archive ({error}); get it again") from error


def _parquet(path: Path) -> Iterator[NDArray[Any]]:
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        column = _geometry_column(path, file)
        for batch in file.iter_batches(batch_size=_BATCH, columns=[column], use_threads=False):
            values = np.asarray(batch.column(0).to_pylist(), dtype=object)
            yield shapely.from_wkb(values, on_invalid="ignore")
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


def _geojson(path: Path, text: Any) -> Iterator[NDArray[Any]]:
    rings: list[Any] = []
    try:
        for found in _features(JsonStream(text)):
            rings.append(found)
            if len(rings) == _BATCH:
                yield _polygons(rings)
                rings = []
    except (JsonError, UnicodeDecodeError, OSError, *BROKEN_ZIP) as error:
        raise InputError(f"{path}: cannot be read as GeoJSON ({error}); is the file complete?") from error
    yield _polygons(rings)


def _features(stream: JsonStream) -> Iterator[Any]:
    """Yield, for each nucleus, its outer rings: a list of rings, one in each piece; None where there is no geometry."""
    if stream.peek() == "[":
        for _ in stream.elements():
            yield from _feature(stream)
        return
    found = False
    for key in stream.members():
        if key == "features":
            found = True
            for _ in stream.elements():
                yield from _feature(stream)
        elif key == "geometry":
            found = True
            yield from _large_geometry(stream)
        else:
            stream.skip()
    if not found:
        raise JsonError("got an object without 'features', expected a FeatureCollection or a list of features")


def _feature(stream: JsonStream) -> Iterator[Any]:
    whole, feature = stream.small()
    if whole:
        geometry = None
        if isinstance(feature, dict):
            geometry = feature.get("nucleusGeometry") or feature.get("geometry")
        coordinates = geometry.get("coordinates") if isinstance(geometry, dict) else None
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        yield (kind, coordinates)
        return
    for key in stream.members():
        if key == "geometry":
            yield from _large_geometry(stream)
        else:
            stream.skip()


def _large_geometry(stream: JsonStream) -> Iterator[Any]:
    """Yield the parts of a MultiPolygon that is too large to be decoded as a whole, and what else there is."""
    if stream.peek() != "{":
        yield (None, stream.value())
        return
    for key in stream.members():
        if key != "coordinates" or stream.peek() != "[":
            stream.skip()
            continue
        for _ in stream.elements():
            part = stream.value()
            yield ("Polygon" if _depth(part) == 3 else None, part)


def _depth(value: Any) -> int:
    """Levels of lists."""
    depth = 0
    while isinstance(value, list) and value:
        depth, value = depth + 1, value[0]
    return depth


def _polygons(found: list[Any]) -> NDArray[Any]:
    """Make polygons (n,) of (type, coordinates), outer rings alone: a point of other kinds, None of what is broken."""
    rings: list[Any] = []
    owner: list[int] = []
    shapes = np.full(len(found), None, dtype=object)
    for index, (kind, coordinates) in enumerate(found):
        try:
            if kind == "Polygon":
                pieces = [_ring(coordinates[0])]
            elif kind == "MultiPolygon":
                pieces = [_ring(part[0]) for part in coordinates]
            else:
                shapes[index] = shapely.Point(0, 0) if kind else None
                continue
        except (TypeError, ValueError, LookupError, OverflowError):
            continue
        rings += pieces
        owner += [index] * len(pieces)
    if rings:
        lengths = [len(ring) for ring in rings]
        lines = shapely.linearrings(np.concatenate(rings), indices=np.repeat(np.arange(len(rings)), lengths))
        parts = shapely.polygons(lines)
        places, counts = np.unique(owner, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        alone = counts == 1
        shapes[places[alone]] = parts[starts[alone]]
        for place, start, count in zip(places[~alone], starts[~alone], counts[~alone], strict=True):
            shapes[place] = shapely.MultiPolygon(parts[start : start + count].tolist())
    return shapes


def _ring(points: Any) -> NDArray[np.float64]:
    """Points (n, 2) of a closed ring.

    Raises
    ------
    ValueError
        Fewer than three points, or no finite numbers.
    """
    ring = np.array([point[:2] for point in points], dtype=np.float64).reshape(len(points), 2)
    if len(ring) and (ring[0] != ring[-1]).any():
        ring = np.concatenate([ring, ring[:1]])
    if len(ring) < 4 or not np.isfinite(ring).all():
        raise ValueError("no ring")
    return ring
