"""Outlines of nuclei from files.

    GeoJSON    see `celldetr.slides.geojson`
    Parquet    the primary geometry of GeoParquet; or a column of WKB (``geometry``, or the only binary column)

Only geometry is read: classes and other properties are ignored, so that no labels of another model get into
self-supervised pretraining.

The parts of a MultiPolygon are one nucleus in pieces if they are next to each other. Otherwise, or if it is larger than
a nucleus, each part is a nucleus: CellViT writes all nuclei of a class that way.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei, place_outlines
from celldetr.slides.geojson import MOST_CORNERS, read_geojson
from celldetr.slides.outline_check import SLIDES, Keys
from celldetr.slides.outline_files import from_wkb, geometry_column, open_parquet, read_format
from celldetr.store import NO_LABEL

_BATCH = 20_000  # outlines in a batch
LONGEST_UM = 60.0  # longest side of a nucleus
_LARGEST_UM2 = 1000.0  # area of a nucleus
_APART_UM = 1.0  # farthest distance between pieces of a nucleus
_PLAUSIBLE_UM = (2.0, 20.0)  # smallest and largest median width of nuclei
_MOST_IN_FILE = 200_000_000  # corners of all outlines together, 3 GB
_UNREADABLE = f"outlines that are empty, unreadable or of more than {MOST_CORNERS:,} corners"
_OTHER, _FLAT, _TILE = "points and lines", "outlines without area", "tiles, and annotations among detections"
_CELL, _LARGE = "cells without an outline of the nucleus", "outlines larger than a nucleus"
_AGAIN = "nuclei that are in the file already"
_EXPECTED = "outlines of nuclei as GeoParquet, Parquet with WKB, GeoJSON or compressed GeoJSON"


@dataclass(frozen=True)
class NucleusFile:
    """Nuclei of a file."""

    nuclei: SlideNuclei  # in px of the wanted size; no labels
    dropped: Counter[str]  # reason -> outlines that give no nucleus
    repaired: int  # outlines that cross themselves; their boxes are kept


def read_nucleus_file(
    path: str | os.PathLike[str],
    *,
    image_mpp: float,
    mpp: float,
    unit: str = "px",
    origin: tuple[int, int] = (0, 0),
    cells: bool = False,
) -> NucleusFile:
    """Read the nuclei of a slide with level-0 px of `image_mpp` um, in px of `mpp` um; the content tells the format.

    `unit` is that of the file's coordinates, see `file_to_level0`. With `cells`, the outline of a cell is taken if
    there is none of its nucleus.

    Raises
    ------
    InputError
        There is no such file, its format is unknown, it is damaged or has no polygons, or its nuclei have an impossible
        size (wrong unit).
    """
    file = Path(path)
    to_level0 = file_to_level0(unit, image_mpp, origin)
    um = to_level0[0, 0] * image_mpp
    dropped = Counter(dict.fromkeys((_UNREADABLE, _OTHER, _TILE, _CELL, _LARGE, _FLAT, _AGAIN), 0))
    outlines, annotated = [np.empty(0, dtype=object)], [np.empty(0, dtype=bool)]
    repaired = corners = 0
    detections = False
    for shapes, kinds in _read(file):
        detections = detections or bool(np.isin(kinds, ["cell", "detection"]).any())
        good = _usable(shapes, kinds, cells, dropped)
        polygons, owner = _nuclei(shapes[good], um)
        placed, solid = place_outlines(polygons, to_level0, image_mpp, mpp)
        small = _small(placed, mpp)
        dropped.update({_FLAT: int((~solid).sum()), _LARGE: int((solid & ~small).sum())})
        repaired += int((solid & small & ~shapely.is_valid(polygons)).sum())
        outlines.append(placed[solid & small])
        annotated.append((kinds[good] == "annotation")[owner][solid & small])
        corners += int(shapely.get_num_coordinates(outlines[-1]).sum())
        if corners > _MOST_IN_FILE:
            raise InputError(f"{file}: got more than {_MOST_IN_FILE:,} corners, expected fewer; simplify the outlines")
    found = np.concatenate(outlines)
    if detections:
        by_hand = np.concatenate(annotated)
        dropped[_TILE] += int(by_hand.sum())
        found = found[~by_hand]
    again = pd.DataFrame(shapely.bounds(found).reshape(-1, 4)).round(2).duplicated().to_numpy()
    dropped[_AGAIN] += int(again.sum())
    found = found[~again]
    nuclei = SlideNuclei(found, np.full(len(found), NO_LABEL, np.int8))
    if not len(nuclei) and any(dropped.values()):
        hint = "set cell_outlines to yes to take those of cells" if dropped[_CELL] else "expected polygons of nuclei"
        raise InputError(f"{file}: got no outline of a nucleus ({name_counts(dropped)}); {hint}")
    if len(nuclei):
        check_width(file, nuclei.boxes, mpp, f"if coordinates are {unit}; dropped: {name_counts(dropped)}")
    return NucleusFile(nuclei, dropped, repaired)


def file_to_level0(unit: str, mpp: float, origin: tuple[int, int]) -> NDArray[np.float64]:
    """Affine (3, 3) from the coordinates of a file to px of level 0 of `mpp` um.

    `unit` is ``px`` of level 0; ``um`` from the corner of the slide; or ``qupath``: px of level 0 from the `origin`,
    the corner of the scanned part, where the images start that QuPath opens by OpenSlide.
    """
    times = {"px": 1.0, "um": 1 / mpp, "qupath": 1.0}[unit]
    affine = np.diag([times, times, 1.0])
    if unit == "qupath":
        affine[:2, 2] = origin
    return affine


def name_counts(counts: Mapping[str, int]) -> str:
    """Name what is not 0, for errors."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def check_width(
    path: Path, boxes: NDArray[np.float64], mpp: float, about: str, keys: Keys = SLIDES, *, labels: bool = False
) -> None:
    """Refuse nuclei of an impossible size (`InputError`); boxes (n, 4) are px of `mpp` um; `labels`: of an image."""
    low, high = _PLAUSIBLE_UM
    width = float(np.median(boxes[:, 2:] - boxes[:, :2])) * mpp
    if not low <= width <= high:
        remedy = f"correct {keys('nuclei_unit')} (px of level 0, or um) or {keys('mpp')}{keys.where}"
        if labels:
            remedy = f"give each nucleus a number of its own (label a mask first), or correct {keys('mpp')}{keys.where}"
        raise InputError(
            f"{path}: got nuclei that are {width:.3g} um wide (median, {about}), expected {low:g} to {high:g} (nuclei, "
            f"not whole cells); {remedy}"
        )


def is_polygonal(shapes: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether shapes (n,) are Polygons or MultiPolygons."""
    kinds = [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON]
    return np.isin(shapely.get_type_id(shapes), kinds)


def longest_sides(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Longer side (n,) of boxes (n, 4)."""
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).max(axis=1), np.float64)


def _usable(shapes: NDArray[Any], kinds: NDArray[np.str_], cells: bool, dropped: Counter[str]) -> NDArray[np.bool_]:
    """Where shapes (n,) are polygons of nuclei, as far as the file says; others are counted in `dropped`."""
    readable = np.isfinite(shapely.bounds(shapes)).all(axis=1)
    corners, owner = shapely.get_coordinates(shapes, return_index=True)
    readable[owner[~np.isfinite(corners).all(axis=1)]] = False
    good = np.ones(len(shapes), dtype=bool)
    for reason, bad in (
        (_UNREADABLE, ~readable),
        (_OTHER, ~is_polygonal(shapes)),
        (_TILE, kinds == "tile"),
        (_CELL, (kinds == "cell") & (not cells)),
    ):
        dropped[reason] += int((good & bad).sum())
        good &= ~bad
    return good


def _nuclei(shapes: NDArray[Any], um: float) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Divide shapes (n,), with units of `um`, into one (m,) for each nucleus; and the index of each one's shape."""
    several = shapely.get_num_geometries(shapes) > 1
    parts, owner = shapely.get_parts(shapes[several], return_index=True)
    large = longest_sides(shapely.bounds(shapes[several])) * um > LONGEST_UM
    small = np.flatnonzero(~large[owner])
    one, other = small[shapely.STRtree(parts[small]).query(parts[small], "dwithin", _APART_UM / um)]
    pieces = owner[one] == owner[other]
    links = coo_array((np.ones(pieces.sum()), (one[pieces], other[pieces])), shape=(len(parts), len(parts)))
    nucleus = connected_components(links)[1]
    first = np.unique(nucleus, return_index=True)[1]
    order = np.argsort(nucleus, kind="stable")
    joined = shapely.multipolygons(parts[order], indices=nucleus[order])
    places = np.flatnonzero(several)[owner[first]]
    return np.concatenate([shapes[~several], joined]), np.concatenate([np.flatnonzero(~several), places])


def _small(outlines: NDArray[Any], mpp: float) -> NDArray[np.bool_]:
    """Whether outlines (n,), px, are no larger than a nucleus."""
    longest = longest_sides(shapely.bounds(outlines)) * mpp
    return np.asarray((longest <= LONGEST_UM) & (shapely.area(outlines) * mpp**2 <= _LARGEST_UM2))


def _read(path: Path) -> Iterator[tuple[NDArray[Any], NDArray[np.str_]]]:
    """Yield batches of geometries (n,), None if missing or unreadable, and what each outlines if the file says so."""
    form, start = read_format(path, _EXPECTED)
    if form == "parquet":
        with open_parquet(path) as file:
            column = geometry_column(path, file)
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column], use_threads=False):
                yield from_wkb(batch.column(0)), np.full(len(batch), "")
    elif form == "geojson":
        for shapes, kinds, _ in read_geojson(path):
            yield shapes, kinds
    else:
        raise InputError(f"{path}: got a file that starts with {start[:8]!r}, expected {_EXPECTED}")
