"""Drawn whole slides: a pyramidal TIFF that OpenSlide reads, and outlines of its nuclei."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.drawing import draw_he
from celldetr.example.images import write_pyramid
from celldetr.example.styles import Array
from celldetr.example.tissue import grow_scene
from celldetr.runtime.files import atomic

_INK = np.array([2.2, 1.1, 0.35], dtype=np.float32)  # optical density of the pen in red, green and blue
_PEN = 28.0  # um; width of its stroke
_PEN_OUT = 6.0  # um by which the middle of the stroke lies outside of the tissue
_CROSSED, _EMPTY = 3, 2  # outlines that cross themselves; empty outlines


@dataclass(frozen=True)
class SlideTruth:
    """What was planted; positions are level-0 px."""

    image: Path
    polygons: Path
    mpp: float  # um per px
    size: tuple[int, int]  # width and height
    tissue: Array  # (V, 2) outline of the tissue
    pen: Array  # (K, 2) middle of the stroke of a marker pen
    pen_width: float
    nuclei: Array  # (N, V, 2) outlines as drawn
    classes: NDArray[np.str_]  # (N,) PanNuke classes
    invalid: Mapping[str, int]  # kind -> outlines in the file that are not valid, see `_spoil_outlines`


def write_slide(
    path: str | os.PathLike[str],
    polygons: str | os.PathLike[str],
    cells: str | os.PathLike[str] | None = None,
    *,
    seed: int,
    size_um: tuple[float, float],
    mpp: float,
    rim_um: float = 80.0,
) -> SlideTruth:
    """Write a slide, tiled and compressed as JPEG, each level 4 times as coarse as the one before, and its outlines.

    The outlines (GeoParquet) are in level-0 px and have a class, which pretraining must not read; a few are not valid.
    `cells` becomes a file of the same nuclei with ids, all valid, like the segmentation of a user.
    The same arguments give the same bytes. `size_um` is width and height of the tissue, `rim_um` empty glass around it,
    `mpp` um per px of level 0.

    Raises
    ------
    ConfigError
        No nucleus fits on the tissue.
    """
    rng = np.random.default_rng([seed, 7])
    rim = int(np.ceil(rim_um / mpp))
    scene = grow_scene(rng, size_um, irregular=True)
    border, nuclei = (points / mpp + rim for points in (scene.border, scene.nuclei.outlines))
    pen = _draw_stroke(rng, border, _PEN_OUT / mpp)
    image, _ = draw_he(rng, scene, mpp, rim=rim)
    _draw_pen(image, pen, _PEN / mpp)
    with atomic(path) as temporary:
        write_pyramid(temporary, image, mpp=mpp, step=4, tile=256)
    classes = np.array(PANNUKE_CLASSES)[scene.nuclei.classes]
    shapes, invalid = _spoil_outlines(nuclei)
    labels = [*classes.tolist(), *classes[:1].tolist() * (len(shapes) - len(classes))]
    with atomic(polygons) as temporary:
        geopandas.GeoDataFrame({"class": labels}, geometry=shapes).to_parquet(temporary, index=False)
    if cells is not None:
        own = {"cell_id": [f"nucleus-{number}" for number in range(len(nuclei))]}
        with atomic(cells) as temporary:
            geopandas.GeoDataFrame(own, geometry=shapely.polygons(nuclei)).to_parquet(temporary, index=False)
    size = image.shape[1], image.shape[0]
    return SlideTruth(Path(path), Path(polygons), mpp, size, border, pen, _PEN / mpp, nuclei, classes, invalid)


def _draw_stroke(rng: np.random.Generator, border: Array, out: float) -> Array:
    """(K, 2) middle of a stroke along a quarter of the tissue's border, `out` px outside of it."""
    part = np.roll(border, int(rng.integers(len(border))), axis=0)[: len(border) // 4]
    away = part - border.mean(axis=0)
    line = shapely.LineString(part + out * away / np.hypot(*away.T)[:, None])
    return np.asarray(shapely.get_coordinates(shapely.segmentize(line, 1.0)))


def _draw_pen(image: NDArray[np.uint8], pen: Array, width: float) -> None:
    """Draw a stroke (K, 2) of some width in px over an image."""
    low = np.maximum((pen.min(axis=0) - width).astype(int), 0)
    high = (pen.max(axis=0) + width).astype(int)
    part = image[low[1] : high[1], low[0] : high[0]]
    points = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in part.shape[1::-1])), axis=-1) + low
    distance = cKDTree(pen).query(points, distance_upper_bound=width)[0]
    ink = np.clip(0.5 * width - distance, 0.0, 2.0) / 2.0
    part[...] = part * np.exp(-ink[..., None].astype(np.float32) * _INK) + np.float32(0.5)


def _spoil_outlines(nuclei: Array) -> tuple[list[shapely.Polygon], dict[str, int]]:
    """Outlines as polygons: some not valid, and at the end some that are no nuclei; kind -> how many.

    ``crossed``: the first nuclei, two of their corners swapped; ``empty`` and ``flat``: no nuclei at all.
    """
    rings = nuclei.copy()
    rings[:_CROSSED, [0, 9]] = rings[:_CROSSED, [9, 0]]
    x, y = nuclei[0, 0]
    flat = shapely.Polygon([(x, y), (x + 5, y), (x + 9, y)])
    shapes = [*shapely.polygons(rings), *[shapely.Polygon()] * _EMPTY, flat]
    return shapes, {"crossed": len(rings[:_CROSSED]), "empty": _EMPTY, "flat": 1}
