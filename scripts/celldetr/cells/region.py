"""Polygons of a slide in which cells are found."""

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.cells.given_files import CellObjects, read_objects
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import place_outlines
from celldetr.slides.outline_check import Keys
from celldetr.slides.outline_files import read_format
from celldetr.slides.outlines import file_to_level0, is_polygonal, name_counts
from celldetr.slides.pyramid import Pyramid

log = logging.getLogger(__name__)

_EXPECTED = "polygons as GeoJSON, GeoParquet or Parquet with WKB"
_CUT = 0.99  # log the share of a region that lies on the slide if it is smaller


def read_region(
    path: str | os.PathLike[str], image: Pyramid, *, unit: str | None = None, keys: Keys | None = None
) -> NDArray[np.object_]:
    """Read the polygons (n,) of a region, px of level 0, valid and cut at the edge of the slide.

    The file is GeoJSON (annotations of QuPath), GeoParquet or Parquet with WKB. If it has annotations, its other
    objects are left out; points and lines are, too.

    Parameters
    ----------
    image
        The slide, with a known pixel size.
    unit
        Of the file's coordinates, see `celldetr.slides.outlines.file_to_level0`. None: px; but it must be stated if the
        scanned part begins elsewhere than the slide: QuPath counts from there, and nothing tells what a file does.
    keys
        What errors call the settings; None: options of a command.

    Raises
    ------
    InputError
        The file is damaged or has no polygon; a polygon is unreadable or lies outside of the slide; `unit` is missing.
    """
    file, keys = Path(path), keys or Keys()
    form, start = read_format(file, _EXPECTED)
    if form not in ("geojson", "parquet"):
        raise InputError(f"{file}: got a file that starts with {start[:8]!r}, expected {_EXPECTED}")
    if unit is None and any(image.origin):
        x, y = image.origin
        raise InputError(
            f"{file}: got a region of a slide whose scanned part begins at {x}, {y} px (openslide.bounds-x, -y); set "
            f"{keys('region_unit')} to qupath if the region was drawn in QuPath, which counts from there, or to px or "
            f"um if it counts from the corner of the slide{keys.where}"
        )
    unit, mpp = unit or "px", float(image.mpp or 0)
    regions = _polygons(read_objects(file, um=1.0))
    placed, solid = place_outlines(regions.shapes, file_to_level0(unit, mpp, image.origin), mpp, mpp)
    regions.refuse(~solid, "regions without area")
    slide = shapely.box(0, 0, *image.size)
    cut = shapely.intersection(placed, slide)
    share = shapely.area(cut) / shapely.area(placed)
    width, height = image.size
    x0, y0, x1, y1 = shapely.total_bounds(placed)
    regions.refuse(
        share == 0,
        f"regions outside of the slide ({width} x {height} px; the regions of the file lie in {x0:.0f}, {y0:.0f} to "
        f"{x1:.0f}, {y1:.0f} px if its coordinates are {unit})",
        f"correct the file or {keys('region_unit')} (px of level 0, um or qupath){keys.where}",
    )
    if share.min() < _CUT:
        log.warning("%s: %.3g %% of a region lie on the slide; it is cut", file, 100 * share.min())
    parts = shapely.get_parts(cut)
    return np.asarray(parts[shapely.area(parts) > 0], object)


def _polygons(objects: CellObjects) -> CellObjects:
    """Annotations if there are any, or else all objects; of these the polygons."""
    annotations = objects.kinds == "annotation"
    chosen = annotations if annotations.any() else np.ones(len(objects), dtype=bool)
    empty = shapely.is_missing(objects.shapes) | shapely.is_empty(objects.shapes)
    objects.refuse(chosen & empty, "empty or unreadable regions", "correct or simplify them")
    areas = is_polygonal(objects.shapes)
    if not (chosen & areas).any():
        raise InputError(f"{objects.path}: got no polygon in {len(objects)} {objects.word}s, expected at least one")
    if not (chosen & areas).all():
        left = Counter(objects.kinds[~chosen].tolist()) + Counter({"points and lines": int((chosen & ~areas).sum())})
        log.warning("%s: left out: %s", objects.path, name_counts(left))
    return objects.select(chosen & areas)
