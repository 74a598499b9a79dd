"""Outlines of GeoJSON, read as a stream: objects of Python would take ten times the memory of the file.

orjson reads the features of one list block by block; what is not such a list, and every odd feature, goes to ijson,
which is slower by far but stops nowhere for memory.

A file holds one document or several, one after another or on a line each (GeoJSONSeq): features, geometries, lists or
collections of them. It may be compressed (gzip, zip). CellViT writes one feature for each cell type: a MultiPolygon of
all its nuclei; and ``cells.json`` and ``cell_detection.json``, which are no GeoJSON: objects whose ``cells`` have a
``contour``, or else a ``bbox`` (two corners, each y before x), in px of level 0.
QuPath's cells have two outlines; that of the nucleus is read.
"""

import contextlib
import gc
import gzip
import io
import re
import zipfile
from array import array
from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import ijson
import numpy as np
import orjson
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import BROKEN_ZIP

Events = Iterator[tuple[str, Any]]
"""What ijson finds, one after another: ``start_map``, ``map_key``, ``number``, ..., and the key or value."""
Polygon = list[bytes]
"""Rings, the outer one first: float64 x0, y0, x1, y1, ...; no rings if unreadable."""


class Outline(NamedTuple):
    """An outline of a file, and what it outlines if the file says so, in QuPath's words.

    These are ``cell``, ``detection`` (also a cell whose nucleus has an outline), ``annotation``, ``tile`` and others.
    """

    polygons: list[Polygon] | None  # None for a geometry of another type
    kind: str = ""
    id: str = ""  # property cell_id, or else the id of the feature


GZIP = b"\x1f\x8b"  # first bytes of a compressed file
MOST_CORNERS = 100_000  # of a ring that is read: that of a nucleus has tens, that of a tissue any number
_BATCH = 20_000  # outlines in a batch
_MOST_POLYGONS = 20_000_000  # of a geometry
_CORNERS = 3  # fewest of a ring; it need not be closed
_NO_POLYGON = shapely.Point(0, 0)  # stands for a geometry of another type
_LISTS = {"features", "geometries", "cells"}  # keys of what a collection holds
_BLOCK, _LARGEST_BLOCK = 1 << 14, 1 << 24  # bytes that orjson reads at once (larger is slower); a feature may need more
_HEAD = 1 << 20  # bytes of a file in which such a list starts
_LIST = re.compile(rb'\s*\[|[^\x00]*?"(?:features|cells)"\s*:\s*\[')  # from the start of the file
_FIRST_KEY = re.compile(rb'\s*\{\s*("[A-Za-z_]+")')  # of the first feature; also that of the others, most likely
_BETWEEN = re.compile(rb"\}\s*(,)\s*\{\s*\Z")  # what is in front of the first key of another feature
_FARTHEST = 256  # bytes that these may have
_PLAIN = {"type", "coordinates", "bbox", "plane", "isEllipse"}  # keys of a geometry without others in it
_BOM, _SEPARATOR = b"\xef\xbb\xbf", b"\x1e"


def read_geojson(path: Path) -> Iterator[tuple[NDArray[Any], NDArray[np.str_], list[str]]]:
    """Yield batches of geometries (n,), what each outlines, and their ids (see `Outline`).

    Geometries are MultiPolygons, empty if unreadable, or a point for any other type.

    Raises
    ------
    InputError
        The file is damaged, or has no features.
    """
    read = 0
    try:
        with contextlib.ExitStack() as stack:
            stream = _open(path, stack)
            slowly = _outlines(ijson.basic_parse(stream, use_float=True, multiple_values=True))
            outlines = chain(_fast_outlines(stream), slowly)
            while batch := _take(outlines):
                yield _to_shapely(batch)
                read += len(batch)
    except (ijson.JSONError, RecursionError) as error:
        problem = " ".join(line.strip() for line in str(error).splitlines()[:2])
        expected = "expected features with polygons, or polygons; is the file complete?"
        raise InputError(f"{path}: cannot be read as GeoJSON: {problem}; {expected}") from error
    except (OSError, RuntimeError, *BROKEN_ZIP) as error:
        raise InputError(f"{path}: cannot be read ({error}); if it is damaged, get it again") from error
    if not read:
        raise InputError(f"{path}: got no features, expected features with polygons, or polygons")


def _take(outlines: Iterator[Outline]) -> list[Outline]:
    """Take a batch. Garbage collection would search all of it for cycles, which are not there, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return list(islice(outlines, _BATCH))
    finally:
        if enabled:
            gc.enable()


def _to_shapely(batch: list[Outline]) -> tuple[NDArray[Any], NDArray[np.str_], list[str]]:
    """Make shapely's geometries (n,), their kinds and ids; shapely crashes if a polygon has no rings."""
    polygonal = [outline.polygons for outline in batch if outline.polygons is not None]
    polygons = list(chain.from_iterable(polygonal))
    rings = list(chain.from_iterable(polygons))
    corners = np.frombuffer(b"".join(rings)).reshape(-1, 2)
    starts = [np.cumsum([0, *map(len, group)]) for group in (rings, polygons, polygonal)]
    starts[0] //= 2 * corners.itemsize
    shapes = np.full(len(batch), _NO_POLYGON, dtype=object)
    shapes[[outline.polygons is not None for outline in batch]] = shapely.from_ragged_array(
        shapely.GeometryType.MULTIPOLYGON, corners, tuple(starts)
    )
    kinds = np.array([outline.kind for outline in batch], dtype=np.str_)
    return shapes, kinds, [outline.id for outline in batch]


class _Stream:
    """A file without the marks in front of the documents of a GeoJSON text sequence."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.ahead = b""  # what is read first

    def read(self, size: int = -1) -> bytes:
        ahead, self.ahead = self.ahead[:size], self.ahead[size:]
        return ahead or self._file.read(size).replace(_SEPARATOR, b" ")


def _open(path: Path, stack: contextlib.ExitStack) -> _Stream:
    """Open the file, what is compressed in it, or the only JSON file of a zip archive."""
    file: IO[bytes] | gzip.GzipFile = stack.enter_context(path.open("rb"))
    start = file.read(2)
    if start == GZIP:
        file = stack.enter_context(gzip.GzipFile(path))
    elif start == b"PK":
        archive = stack.enter_context(zipfile.ZipFile(path))
        names = [name for name in archive.namelist() if name.lower().endswith("json") and not name.startswith("__")]
        if len(names) != 1:
            raise InputError(f"{path}: got {len(names)} GeoJSON files in the archive, expected one")
        file = stack.enter_context(archive.open(names[0]))
    file.seek(0)
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return _Stream(file)


def _fast_outlines(stream: _Stream) -> Iterator[Outline]:
    """Yield the outlines of the features at the start of a list, and leave a shorter document with the others.

    A block of the list is valid JSON by itself if, and only if, it holds whole features.
    """
    text = stream.read(_HEAD)
    found = _LIST.match(text)
    head = found.group() if found else b""
    if not _opens_list(head) or not (first := _FIRST_KEY.match(text, len(head))):
        stream.ahead = text
        return
    key, text, more = first.group(1), text[len(head) :], True
    while more and len(text) < _LARGEST_BLOCK:
        if end := _end_of_features(text, key):
            try:
                features = orjson.loads(b"[" + text[:end] + b"]")
            except orjson.JSONDecodeError:
                break
            text = text[end + 1 :]
            pairs = zip(map(_plain_outline, features), features, strict=True)
            for odd, group in groupby(pairs, lambda pair: pair[0] is None):
                if odd:
                    others = io.BytesIO(orjson.dumps([feature for _, feature in group]))
                    yield from _outlines(ijson.basic_parse(others, use_float=True))
                else:
                    yield from (outline for outline, _ in group if outline)
        block = stream.read(max(_BLOCK, len(text)))
        more, text = bool(block), text + block
    stream.ahead = head + text


def _opens_list(head: bytes) -> bool:
    """Whether a text opens an array, or an object and in it the array of a collection."""
    try:
        values = orjson.loads(head + (b"]" if head.strip() == b"[" else b"]}"))
    except orjson.JSONDecodeError:
        return False
    return isinstance(values, list) or (len(_LISTS & values.keys()) == 1 and list(values)[-1] in _LISTS)


def _end_of_features(text: bytes, key: bytes) -> int:
    """Return the place of the last comma that is followed by an object starting with `key`; 0 if there is none."""
    place = len(text)
    while (place := text.rfind(key, 0, place)) > 0:
        if between := _BETWEEN.search(text, max(0, place - _FARTHEST), place):
            return between.start(1)
    return 0


def _plain_outline(feature: Any) -> Outline | None:
    """Return the outline of a feature, or of a cell of CellViT, as `_object` does; None if it is in any way odd."""
    if not isinstance(feature, dict) or "coordinates" in feature or _LISTS & feature.keys():
        return None
    if "geometry" not in feature:
        ring = _ring(feature["contour"] if "contour" in feature else _corners(feature.get("bbox")))
        return Outline([[ring]]) if ring else None
    nucleus = feature.get("nucleusGeometry")
    geometry = nucleus if isinstance(nucleus, dict) else feature["geometry"]
    properties = feature.get("properties") or {}
    if not isinstance(geometry, dict) or not geometry.keys() <= _PLAIN or not isinstance(properties, dict):
        return None
    form, kind = geometry.get("type"), properties.get("objectType", "")
    if {type(form), type(kind)} != {str} or "object_type" in properties or "coordinates" not in geometry:
        return None
    polygons = geometry["coordinates"] if form == "MultiPolygon" else [geometry["coordinates"]]
    found: list[Polygon] | None = None
    if form in ("Polygon", "MultiPolygon"):
        found = []
        for polygon in polygons if isinstance(polygons, list) else [None]:
            rings = [_ring(ring) for ring in polygon] if isinstance(polygon, list) else []
            if not rings or None in rings:
                return None
            found.append([ring for ring in rings if ring])
        if not found:
            return None
    identity, word = _word(properties.get("cell_id")), _word(feature.get("id"))
    return _named(found, kind, identity, word, nucleus=geometry is nucleus)


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else ""


def _ring(corners: Any) -> bytes | None:
    """Return an array of corners as bytes; None if they are not two numbers each, or three with a height."""
    if not isinstance(corners, list) or not _CORNERS <= len(corners) <= MOST_CORNERS:
        return None
    try:
        (width,) = set(map(len, corners))
        numbers = list(chain.from_iterable(corners))
    except (TypeError, ValueError):
        return None
    if width not in (2, 3) or not set(map(type, numbers)) <= {int, float}:
        return None
    if width == 3:
        del numbers[2::3]
    return array("d", numbers).tobytes()


def _corners(box: Any) -> list[list[Any]] | None:
    """Return the corners x, y of a box [[y0, x0], [y1, x1]] of CellViT; None if it is another."""
    try:
        (y0, x0), (y1, x1) = box
    except (TypeError, ValueError):
        return None
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def _outlines(events: Events) -> Iterator[Outline]:
    """Yield the outlines of all documents, or of an array that has been opened."""
    for event, _ in events:
        if event == "end_array":
            return
        if event == "start_array":
            yield from _outlines(events)
        elif event == "start_map":
            yield from _object(events)
        else:
            raise ijson.JSONError(f"got {event}, expected a feature")


def _object(events: Events) -> Iterator[Outline]:
    """Yield the outlines of an object that has been opened: a geometry, a feature, or a collection of them."""
    values: dict[str, Any] = {}
    coordinates: Any = None
    box: Any = None
    geometries: dict[str, list[Outline]] = {}
    kind = identity = ""
    for key, event, value in _members(events):
        values[key] = value
        if key in _LISTS and event == "start_array":
            yield from _outlines(events)
        elif key in ("geometry", "nucleusGeometry") and event == "start_map":
            geometries[key] = list(_object(events))
        elif key in ("coordinates", "contour") and event == "start_array":
            coordinates = _coordinates(events)
        elif key == "bbox" and event == "start_array":
            box = _points(events)
        elif key == "properties" and event == "start_map":
            for name, inner, word in _members(events):
                kind = str(word) if name in ("objectType", "object_type") else kind
                identity = str(word) if name == "cell_id" and word is not None else identity
                _skip(inner, events)
        else:
            _skip(event, events)
    if "coordinates" in values or not set(values) - {"type"}:
        yield from _geometry(values.get("type"), coordinates)
    elif "geometry" in values:
        found = geometries.get("nucleusGeometry", geometries.get("geometry", [Outline([])]))
        word = str(values["id"]) if values.get("id") is not None else ""
        nucleus = "nucleusGeometry" in geometries
        yield from (_named(outline.polygons, kind, identity, word, nucleus=nucleus) for outline in found)
    elif "contour" in values:
        yield from _geometry("Polygon", [coordinates])
    elif "centroid" in values:
        ring = _ring(_corners(box))
        yield Outline([[ring]] if ring else None)
    elif not _LISTS & set(values):
        raise ijson.JSONError(f"got an object with neither features nor geometry (keys: {', '.join(list(values)[:9])})")


def _named(polygons: list[Polygon] | None, kind: str, identity: str, word: str, *, nucleus: bool) -> Outline:
    """Return an outline with its kind, and as id the property `identity` or else `word`, the id of the feature."""
    if word.startswith("Path") and word.endswith("Object"):  # QuPath 0.2 writes the kind of an object there
        kind, word = kind or word.removeprefix("Path").removesuffix("Object").lower(), ""
    return Outline(polygons, "detection" if nucleus else kind, identity or word)


def _geometry(kind: Any, coordinates: Any) -> Iterator[Outline]:
    """Yield the readable polygons of a geometry as one outline, and an empty outline for each other."""
    if kind not in ("Polygon", "MultiPolygon"):
        yield Outline([] if kind is None else None)
        return
    polygons = [coordinates] if kind == "Polygon" or not isinstance(coordinates, list) else coordinates
    good = [polygon for polygon in polygons if _is_polygon(polygon)]
    if good:
        yield Outline(good)
    yield from [Outline([])] * max(len(polygons) - len(good), not good)


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(ring, bytes) for ring in value)


def _coordinates(events: Events) -> Any:
    """Read an array that has been opened: a point as (x, y), a ring as bytes, others as a list, None if unreadable."""
    items: list[Any] = []
    for event, value in events:
        if event == "end_array":
            break
        if event == "number":
            item = value
        elif event == "start_array":
            item = _coordinates(events)
        else:
            item = None
            _skip(event, events)
        if len(items) <= MOST_CORNERS or isinstance(item, list):
            items.append(item)
        if len(items) > _MOST_POLYGONS:
            raise ijson.JSONError(f"got more than {_MOST_POLYGONS:,} polygons in a geometry")
    kinds = set(map(type, items))
    if kinds and kinds <= {int, float}:
        return tuple(items[:2]) if len(items) > 1 else None  # without the height
    if kinds == {tuple}:
        return array("d", chain.from_iterable(items)).tobytes() if _CORNERS <= len(items) <= MOST_CORNERS else None
    return items


def _points(events: Events) -> list[Any]:
    """Read the first points of an array that has been opened."""
    points: list[Any] = []
    for event, _ in events:
        if event == "end_array":
            break
        if event == "start_array":
            points = [*points, _coordinates(events)][:_CORNERS]
        else:
            _skip(event, events)
    return points


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
