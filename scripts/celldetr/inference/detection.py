"""Nuclei of a whole slide by our own detector: in overlapping tiles, each nucleus counted once.

The slide is divided into squares (cores). A tile is a core with a margin around it, which shows the detector the
surroundings; a finding counts if its centre lies in the core of its tile. Two tiles do not place a nucleus at exactly
the same position, so findings within a rim outside the core are kept as well; of two findings of one nucleus by two
tiles, the one deeper in its core counts.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geopandas
import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from celldetr.config.base import Precision
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.device import computing_in
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic
from celldetr.slides.boxes import visible_boxes
from celldetr.slides.cutting import read_blocks
from celldetr.slides.damage import log_damage, open_slide
from celldetr.slides.grid import PatchGrid, stripe_order
from celldetr.slides.tiff import DamagedSlide
from celldetr.slides.tissue import Raster, tissue_mask

log = logging.getLogger(__name__)

Detector = Callable[[NDArray[np.uint8]], list[tuple[NDArray[np.float64], NDArray[np.float64]]]]
"""Images (B, S, S, 3) -> for each image, boxes (n, 4) xyxy px and scores (n,)."""

_RIM = 0.25  # width of the rim outside a core, as a fraction of the margin
_SAME = 0.5  # smallest intersection over union of two boxes of one nucleus
_LOGGED = 1000  # tiles between two messages


@dataclass(frozen=True)
class Tiling:
    """How a slide is divided into tiles."""

    size: int
    """Side of a tile, px."""
    mpp: float
    """Size of a pixel of the tiles, um: that of the model."""
    margin: int
    """Width of the margin around a core, px."""

    @classmethod
    def of(cls, size: int, mpp: float, margin_um: float) -> "Tiling":
        """Tiling with a margin given in um; `ConfigError` if the margins leave no core."""
        margin = round(margin_um / mpp)
        if 2 * margin >= size:
            raise ConfigError(
                f"slides.detection.margin_um: got {margin_um} um ({margin} px), expected less than half a tile "
                f"({size / 2 * mpp:g} um)"
            )
        return cls(size, mpp, margin)

    @property
    def core(self) -> int:
        """Side of a core, px."""
        return self.size - 2 * self.margin

    def grid(self, image_size: tuple[int, int], image_mpp: float, tissue: Raster) -> PatchGrid:
        """Tiles of an image (width and height of level 0, px, and um per px) whose cores have tissue."""
        ratio = self.mpp / image_mpp
        across, down = (max(1, int(np.ceil(side / ratio / self.core))) for side in image_size)
        columns, rows = np.meshgrid(np.arange(across), np.arange(down))
        cores = np.stack([columns.ravel(), rows.ravel()], axis=1) * self.core
        cores = cores[tissue.share(cores * ratio, self.core * ratio) > 0]
        cores = cores[stripe_order(cores, self.core)]
        corners = cores - self.margin
        none = visible_boxes(np.empty(0, dtype=object), corners, self.size, 1)
        return PatchGrid(self.size, self.mpp, image_mpp, corners, none, {})


def detect_slide(
    path: str | os.PathLike[str],
    detector: Detector,
    tiling: Tiling,
    *,
    slide: str,
    slide_mpp: float | None,
    batch_size: int,
    on_damage: str,
    workers: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find the nuclei in the tissue of a slide: boxes (M, 4) xyxy, px of level 0, and scores (M,).

    Memory holds a few batches of tiles and the boxes. `slide` is the name in messages; `slide_mpp` is the size of a
    level-0 pixel in um, None: as the file says. With `on_damage` ``skip`` what cannot be decoded is left out, and a
    slide that cannot be opened has no nuclei. As many threads as `workers` read ahead.

    Raises
    ------
    InputError
        See `open_slide`; or a tile cannot be decoded and `on_damage` is ``stop``.
    """
    skip = on_damage == "skip"
    try:
        image = open_slide(path, slide_mpp, slide, skip=skip)
    except DamagedSlide as error:
        if not skip:
            raise
        log_damage(slide, [str(error)])
        return np.empty((0, 4)), np.empty(0)
    with image:
        image_mpp, image_size = float(image.mpp or 0), image.size
        grid = tiling.grid(image_size, image_mpp, tissue_mask(image, image_mpp))
    ratio = tiling.mpp / image_mpp
    found = _Findings(tiling, np.asarray(image_size) / ratio)
    damaged: list[str] = []
    tiles = 0
    for block in read_blocks(path, grid, size=batch_size, workers=workers, skip=skip):
        damaged += block.damaged.values()
        if not len(block.numbers):
            continue
        for number, (boxes, scores) in zip(block.numbers, detector(block.pixels), strict=True):
            found.add(int(number), grid.corners[number], boxes, scores)
        tiles += len(block.numbers)
        if tiles % _LOGGED < len(block.numbers):
            log.info("%d of %d tiles", tiles, len(grid))
    log_damage(slide, damaged)
    boxes, scores = found.unique()
    log.info("%d nuclei in %d tiles, %d tiles damaged", len(scores), tiles, len(damaged))
    return boxes * ratio, scores


class _Findings:
    """Findings of all tiles, px of the tiles, counted from the slide's corner; `limit` is the slide's size (2,)."""

    def __init__(self, tiling: Tiling, limit: NDArray[np.float64]) -> None:
        self._core, self._margin, self._limit = tiling.core, tiling.margin, limit
        self._rim = _RIM * tiling.margin
        self._kept: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]] = []

    def add(self, tile: int, corner: NDArray[np.int64], boxes: NDArray[Any], scores: NDArray[Any]) -> None:
        """Add the findings (n, 4), (n,) of a tile whose first pixel is `corner`."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) + np.tile(corner, 2)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        low = corner + self._margin
        # half-open: a centre on the border of two cores is in one of them
        depth = np.minimum(centres - low, low + self._core - centres).min(axis=1)
        inside = ((centres >= low) & (centres < low + self._core)).all(axis=1)
        depth = np.where(inside, np.maximum(depth, 0), np.minimum(depth, -1e-9))
        keep = (inside | (depth > -self._rim)) & (centres >= 0).all(axis=1) & (centres < self._limit).all(axis=1)
        if keep.any():
            self._kept.append((boxes[keep], np.asarray(scores)[keep], depth[keep], np.full(int(keep.sum()), tile)))

    def unique(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Boxes (M, 4) and scores (M,), one of each nucleus."""
        if not self._kept:
            return np.empty((0, 4)), np.empty(0)
        boxes, scores, depth, tile = (np.concatenate(column) for column in zip(*self._kept, strict=True))
        seam = np.flatnonzero(depth < 2 * self._rim)  # another tile may have these in its rim
        twice = seam[_duplicates(boxes[seam], depth[seam], tile[seam])]
        keep = np.ones(len(boxes), dtype=bool)
        keep[twice] = False
        boxes = np.clip(boxes[keep], 0, np.tile(self._limit, 2))
        return boxes, scores[keep]


def _duplicates(boxes: NDArray[np.float64], depth: NDArray[np.float64], tile: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the findings (their indices) that another tile has deeper in its core.

    Pairs of boxes from two tiles are formed in order of their overlap, and a box is paired only once with each other
    tile, so that nuclei that lie over each other all remain.
    """
    shapes = shapely.box(*boxes.T)
    one, two = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    pairs = (one < two) & (tile[one] != tile[two])
    one, two = one[pairs], two[pairs]
    shared = np.minimum(boxes[one, 2:], boxes[two, 2:]) - np.maximum(boxes[one, :2], boxes[two, :2])
    inner = np.clip(shared, 0, None).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    overlap = inner / np.maximum(area[one] + area[two] - inner, 1e-9)
    gone: set[int] = set()
    paired: set[tuple[int, int]] = set()
    for index in np.argsort(-overlap, kind="stable"):
        a, b = int(one[index]), int(two[index])
        if overlap[index] < _SAME:
            break
        if a in gone or b in gone or (a, int(tile[b])) in paired or (b, int(tile[a])) in paired:
            continue
        paired |= {(a, int(tile[b])), (b, int(tile[a]))}
        gone.add(b if depth[a] >= depth[b] else a)
    return np.array(sorted(gone), dtype=np.int64)


def model_detector(model: CellDETR, nucleus_threshold: float, device: str, precision: Precision = "fp32") -> Detector:
    """Make a detector from a trained model on `device`; for precision see `celldetr.model.device.computing_in`."""

    def find(images: NDArray[np.uint8]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        pixels = float_images(torch.from_numpy(images).to(device))
        with computing_in(precision, device):
            found = model.predict(pixels, nucleus_threshold)
        return [(one.boxes.double().cpu().numpy(), one.nucleus_score.double().cpu().numpy()) for one in found]

    return find


def write_nuclei(path: str | os.PathLike[str], boxes: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
    """Write a GeoParquet table with a row for each nucleus: a rectangle (px of level 0) and a ``score``."""
    table = {"score": scores.astype(np.float32)}
    with atomic(path) as temporary:
        geopandas.GeoDataFrame(table, geometry=shapely.box(*boxes.T)).to_parquet(temporary)
