"""Polygons of GeoJSON read as a stream, so that memory does not grow with the file or its largest feature.

A file is a FeatureCollection, a list of features, one feature, or a feature on each line; it may be zipped. CellViT
writes one feature for each cell type: a MultiPolygon of all its nuclei. QuPath's cells have two outlines; that of the
nucleus is read.
"""

import contextlib
import zipfile
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import ijson
import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import BROKEN_ZIP

Events = Iterator[tuple[str, Any]]
"""What ijson finds, one after another: ``start_map``, ``map_key``, ``number``, ..., and the key or value."""
Polygon = list[bytes]
"""Rings, the outer one first: float64 x0, y0, x1, y1, ...; no rings if unreadable."""
Geometry = list[Polygon] | None
"""Polygons, none if unreadable; None for any other type."""

_BATCH = 20_000  # geometries in a batch
_PIECES = 1000  # a MultiPolygon of more polygons is no nucleus in pieces: each polygon is one nucleus
_LEVELS = {"Polygon": 0, "MultiPolygon": 1}  # arrays around a polygon, within "coordinates"
_CORNERS = 3  # fewest of a ring; it need not be closed
_NO_POLYGON = shapely.Point(0, 0)  # stands for a geometry of another type
_BOM = b"\xef\xbb\xbf"


def read_geojson(path: Path) -> Iterator[NDArray[Any]]:
    """Yield batches of geometries (n,): MultiPolygons, empty if unreadable, or a point for any other type.

    Raises
    ------
    InputError
        The file is damaged, or has no features.
    """
    batch: list[Geometry] = []
    read = 0
    try:
        with contextlib.ExitStack() as stack:
            for geometry in _geometries(ijson.basic_parse(_open(path, stack), use_float=True, multiple_values=True)):
                batch.append(geometry)
                read += 1
                if len(batch) == _BATCH:
                    yield _to_shapely(batch)
                    batch = []
    except (ijson.JSONError, RecursionError) as error:
        problem = " ".join(line.strip() for line in str(error).splitlines()[:2])
        expected = "expected a FeatureCollection or a list of features; is the file complete?"
        raise InputError(f"{path}: cannot be read as GeoJSON: {problem}; {expected}") from error
    except (OSError, RuntimeError, *BROKEN_ZIP) as error:
        raise InputError(f"{path}: cannot be read ({error}); if it is damaged, get it again") from error
    if not read:
        raise InputError(f"{path}: got no features, expected a FeatureCollection or a list of features with polygons")
    yield _to_shapely(batch)


def _to_shapely(geometries: list[Geometry]) -> NDArray[Any]:
    """Make shapely's geometries (n,); shapely crashes if a polygon has no rings."""
    polygonal = [geometry for geometry in geometries if geometry is not None]
    polygons = list(chain.from_iterable(polygonal))
    rings = list(chain.from_iterable(polygons))
    corners = np.frombuffer(b"".join(rings)).reshape(-1, 2)
    starts = [np.cumsum([0, *map(len, group)]) for group in (rings, polygons, polygonal)]
    starts[0] //= 2 * corners.itemsize
    shapes = shapely.from_ragged_array(shapely.GeometryType.MULTIPOLYGON, corners, tuple(starts))
    return np.append(shapes, [_NO_POLYGON] * (len(geometries) - len(polygonal)))


def _open(path: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    """Open the file, or the only JSON file of a zip archive."""
    file: IO[bytes] = stack.enter_context(path.open("rb"))
    if file.read(2) == b"PK":
        archive = stack.enter_context(zipfile.ZipFile(path))
        names = [name for name in archive.namelist() if name.endswith("json") and not name.startswith("__MACOSX")]
        if len(names) != 1:
            raise InputError(f"{path}: got {len(names)} GeoJSON files in the archive, expected one")
        file = stack.enter_context(archive.open(names[0]))
    file.seek(0)
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return file


def _geometries(events: Events) -> Iterator[Geometry]:
    """Yield the geometries of all features of a file."""
    for event, _ in events:
        if event == "start_array":
            yield from _features(events)
        else:
            yield from _feature(event, events)


def _features(events: Events) -> Iterator[Geometry]:
    for event, _ in events:
        if event == "end_array":
            return
        yield from _feature(event, events)


def _feature(event: str, events: Events) -> Iterator[Geometry]:
    """Yield the geometries of a feature, or of a collection's features, that starts with `event`."""
    if event != "start_map":
        raise ijson.JSONError(f"got {event.removeprefix('start_')}, expected a feature")
    keys: list[str] = []
    nucleus = False
    last: list[Geometry] = [[]]  # held back: an outline of the nucleus replaces that of the cell
    for key, event, _ in _members(events):
        keys.append(key)
        if key == "features" and event == "start_array":
            yield from _features(events)
        elif event == "start_map" and (key == "nucleusGeometry" or (key == "geometry" and not nucleus)):
            nucleus = key == "nucleusGeometry"
            last = []
            for geometry in _geometry(events):
                yield from last
                last = [geometry]
        else:
            _skip(event, events)
    if "geometry" in keys:
        yield from last
    elif "features" not in keys:
        raise ijson.JSONError(f"got an object with neither features nor geometry (keys: {', '.join(keys[:9])})")


def _geometry(events: Events) -> Iterator[Geometry]:
    """Yield the geometry whose object has been opened; the polygons of a large MultiPolygon one by one."""
    kind: Any = None
    parts: list[Polygon] = []
    levels: set[int] = set()
    large = False
    for key, event, value in _members(events):
        if key == "type":
            kind = value
        if key != "coordinates" or event != "start_array":
            _skip(event, events)
            continue
        for level, polygon in _polygons(events):
            parts.append(polygon)
            levels.add(level)
            if len(parts) > _PIECES and levels == {_LEVELS["MultiPolygon"]}:
                large = True
                yield from _readable(parts, together=False)
                parts = []
    if large or (parts and kind in _LEVELS and levels == {_LEVELS[kind]}):
        yield from _readable(parts, together=not large)
    else:
        yield [] if kind in (None, *_LEVELS) else None


def _readable(polygons: list[Polygon], together: bool) -> Iterator[Geometry]:
    """Yield the readable polygons as one geometry or one by one, and an empty geometry for each other."""
    good = [polygon for polygon in polygons if polygon]
    yield from [[]] * (len(polygons) - len(good))
    if together and good:
        yield good
    else:
        yield from ([polygon] for polygon in good)


def _polygons(events: Events) -> Iterator[tuple[int, Polygon]]:
    """Yield the polygons of coordinates whose array has been opened, and how many arrays are around each."""
    depth, around_points = 1, 0  # arrays that are open
    point: list[float] = []
    ring: list[float] = []
    rings: Polygon = []
    broken = False
    for event, value in events:
        if event == "number":
            point.append(value)
        elif event == "start_array":
            depth += 1
            broken = broken or bool(point)
        elif event == "end_array":
            depth -= 1
            if point:
                around_points = around_points or depth
                broken = broken or depth != around_points or len(point) < 2
                ring += point[:2]  # without the height
                point = []
            elif depth == around_points - 1:
                broken = broken or len(ring) < 2 * _CORNERS
                rings.append(array("d", ring).tobytes())
                ring = []
            elif depth == around_points - 2:
                yield depth, [] if broken else rings
                ring, rings, broken = [], [], False
            if not depth:
                break
        else:
            broken = True
            _skip(event, events)
    if broken or ring or rings:
        yield -1, []


def _members(events: Events) -> Iterator[tuple[str, str, Any]]:
    """Yield key, event and value of an object that has been opened; the caller reads the value's end."""
    for event, key in events:
        if event == "end_map":
            return
        yield key, *next(events)


def _skip(event: str, events: Events) -> None:
    """Read a value that starts with `event` to its end."""
    depth = 0
    while True:
        depth += event.startswith("start_") - event.startswith("end_")
        if not depth:
            return
        event, _ = next(events)
