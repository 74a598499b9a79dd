"""Nuclei of a whole slide by our own detector: tiles that overlap, and each nucleus counted once.

The slide is divided into squares (cores). A tile is a core and a margin around it, which gives the detector the
surroundings; of what is found in a tile, that counts whose centre lies in its core. As two tiles do not put a centre at
exactly the same place, what lies within a rim outside of the core is kept as well, and of two findings of one nucleus
by two tiles the one deeper in its core counts.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import torch
from numpy.typing import NDArray

from celldetr.model.celldetr import CellDETR
from celldetr.model.device import computing_in
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic
from celldetr.slides.grid import Plan, stripe_order
from celldetr.slides.reading import DamagedSlide, open_overview, open_slide, read_blocks, told
from celldetr.slides.tissue import Raster, tissue_mask

log = logging.getLogger(__name__)

Detector = Callable[[NDArray[np.uint8]], list[tuple[NDArray[np.float64], NDArray[np.float64]]]]
"""Images (B, S, S, 3) -> for each, boxes (n, 4) xyxy px and scores (n,)."""

_RIM = 0.25  # of the margin; findings up to here outside of a core are kept to be compared
_SAME = 0.5  # intersection over union of two boxes that are one nucleus
_ROWS = 50_000  # boxes that are written at a time


@dataclass(frozen=True)
class Tiling:
    """How a slide is divided.

    Attributes
    ----------
    size, mpp
        Side of a tile in px, and size of its pixels in um: those of the model.
    margin
        Width of the strip around the core, px.
    """

    size: int
    mpp: float
    margin: int

    @classmethod
    def of(cls, size: int, mpp: float, margin_um: float) -> "Tiling":
        """Tiling with a margin in um.

        Raises
        ------
        ConfigError
            The margins leave no core.
        """
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


@dataclass(frozen=True)
class SlideNuclei:
    """Nuclei that were found.

    Attributes
    ----------
    boxes
        (M, 4) xyxy, px of level 0.
    scores
        (M,) nucleus scores.
    damaged
        Tiles that could not be read.
    tiles
        Tiles that were read.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    damaged: list[str]
    tiles: int


def plan_tiles(image_size: tuple[int, int], image_mpp: float, tiling: Tiling, tissue: Raster) -> Plan:
    """Tiles whose cores have tissue, in the order in which the file is decoded least often.

    Parameters
    ----------
    image_size
        Width and height of level 0, px.
    image_mpp
        Size of a level-0 pixel in um.
    tiling
        How it is divided.
    tissue
        Where there is tissue.
    """
    ratio = tiling.mpp / image_mpp
    across, down = (max(1, int(np.ceil(side / ratio / tiling.core))) for side in image_size)
    columns, rows = np.meshgrid(np.arange(across), np.arange(down))
    cores = np.stack([columns.ravel(), rows.ravel()], axis=1) * tiling.core
    cores = cores[tissue.share(cores * ratio, tiling.core * ratio) > 0]
    cores = cores[stripe_order(cores, tiling.core)]
    none = np.zeros(0, np.int64)
    return Plan(tiling.size, tiling.mpp, image_mpp, cores - tiling.margin, none, np.zeros(len(cores) + 1, np.int64), {})


def detect_slide(
    path: str | os.PathLike[str],
    plan: Plan,
    tiling: Tiling,
    detector: Detector,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    workers: int,
    skip: bool = False,
    name: str = "",
) -> SlideNuclei:
    """Find the nuclei of a slide; memory holds a few batches and the boxes.

    Parameters
    ----------
    path
        Slide.
    plan
        Tiles, see `plan_tiles`.
    tiling
        How the slide is divided.
    detector
        What finds them.
    image_size
        Width and height of level 0, px: what lies beyond is no nucleus.
    batch_size
        Tiles at once.
    workers
        Threads that read tiles ahead.
    skip
        Leave out tiles that cannot be decoded, instead of stopping.
    name
        Of the slide, for messages.

    Raises
    ------
    InputError
        A tile cannot be decoded and `skip` is false.
    """
    found = _Findings(tiling, np.asarray(image_size) * plan.image_mpp / plan.mpp)
    damaged: list[str] = []
    tiles = 0
    for block in read_blocks(path, plan, size=batch_size, workers=workers, skip=skip):
        damaged += block.damaged.values()
        if len(block.numbers):
            for number, (boxes, scores) in zip(block.numbers, detector(block.pixels), strict=True):
                found.add(int(number), plan.corners[number], boxes, scores)
        if (tiles + len(block.numbers)) // 1000 != tiles // 1000:
            log.info("%d of %d tiles", tiles + len(block.numbers), len(plan))
        tiles += len(block.numbers)
    told(name, damaged)
    boxes, scores = found.unique()
    return SlideNuclei(boxes * (plan.mpp / plan.image_mpp), scores, damaged, tiles)


def detect_file(
    path: str | os.PathLike[str],
    detector: Detector,
    *,
    slide: str,
    slide_mpp: float | None,
    size: int,
    mpp: float,
    margin_um: float,
    batch_size: int,
    on_damage: str,
    workers: int,
) -> SlideNuclei:
    """Find the nuclei in the tissue of a slide's file.

    Parameters
    ----------
    path
        Slide.
    detector
        What finds them.
    slide
        Its name, for messages.
    slide_mpp
        Size of a level-0 pixel in um, where the file does not say it or says it wrongly.
    size, mpp, margin_um
        See `Tiling`.
    batch_size, workers
        See `detect_slide`.
    on_damage
        ``stop``, or ``skip``: a slide that cannot be opened has no nuclei.

    Raises
    ------
    InputError
        As `open_slide`, and damage when it is to stop.
    """
    skip = on_damage == "skip"
    tiling = Tiling.of(size, mpp, margin_um)
    try:
        with open_slide(path, slide_mpp, slide) as image:
            image_mpp, image_size = float(image.mpp or 0), image.size
    except DamagedSlide as error:
        if not skip:
            raise
        return SlideNuclei(np.empty((0, 4)), np.empty(0), told(slide, [str(error)]), 0)
    with open_overview(path, image_mpp, skip=skip) as overview:
        plan = plan_tiles(image_size, image_mpp, tiling, tissue_mask(overview, image_mpp))
    return detect_slide(
        path,
        plan,
        tiling,
        detector,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        skip=skip,
        name=slide,
    )


class _Findings:
    """What the tiles found, px of the tiles, counted from the corner of the slide."""

    def __init__(self, tiling: Tiling, limit: NDArray[np.float64]) -> None:
        self._core, self._margin, self._limit = tiling.core, tiling.margin, limit
        self._rim = _RIM * tiling.margin
        self._kept: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]] = []

    def add(self, tile: int, corner: NDArray[np.int64], boxes: NDArray[Any], scores: NDArray[Any]) -> None:
        """Take the findings (n, 4), (n,) of a tile that begins at `corner`."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) + np.tile(corner, 2)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        low = corner + self._margin
        # half-open, so that a centre on the border of two cores is in one of them
        depth = np.minimum(centres - low, low + self._core - centres).min(axis=1)
        inside = ((centres >= low) & (centres < low + self._core)).all(axis=1)
        depth = np.where(inside, np.maximum(depth, 0), np.minimum(depth, -1e-9))
        keep = (inside | (depth > -self._rim)) & (centres >= 0).all(axis=1) & (centres < self._limit).all(axis=1)
        if keep.any():
            self._kept.append((boxes[keep], np.asarray(scores)[keep], depth[keep], np.full(int(keep.sum()), tile)))

    def unique(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Boxes (M, 4) and scores (M,), each nucleus once."""
        if not self._kept:
            return np.empty((0, 4)), np.empty(0)
        boxes, scores, depth, tile = (np.concatenate(column) for column in zip(*self._kept, strict=True))
        seam = np.flatnonzero(depth < 2 * self._rim)  # what another tile has in its rim may be as deep as this
        twice = seam[_second(boxes[seam], depth[seam], tile[seam])]
        keep = np.ones(len(boxes), dtype=bool)
        keep[twice] = False
        boxes = np.clip(boxes[keep], 0, np.tile(self._limit, 2))
        return boxes, scores[keep]


def _second(boxes: NDArray[np.float64], depth: NDArray[np.float64], tile: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pick the findings of a nucleus that another tile has found deeper in its core.

    Boxes of two tiles that overlap most are paired first, and a box is paired once with each other tile, so that
    nuclei that lie over each other stay as many as they are.
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


def model_detector(model: CellDETR, nucleus_threshold: float, device: str, precision: str = "fp32") -> Detector:
    """Make a detector of a trained model that is on `device`; for precision see `model.device.computing_in`."""

    def find(images: NDArray[np.uint8]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
        with computing_in(precision, device):
            found = model.predict(pixels, nucleus_threshold)
        return [(one.boxes.double().cpu().numpy(), one.nucleus_score.double().cpu().numpy()) for one in found]

    return find


def write_nuclei(path: str | os.PathLike[str], found: SlideNuclei) -> None:
    """Write boxes as GeoParquet: a rectangle (px of level 0) and a ``score`` in each row."""
    column = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": column}}
    schema = pa.schema([("geometry", pa.binary()), ("score", pa.float32())], metadata={"geo": json.dumps(geo)})
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for boxes, scores in _pieces(found):
            geometry = shapely.to_wkb(shapely.box(*boxes.T))
            writer.write_table(pa.table([geometry.tolist(), scores.astype(np.float32)], schema=schema))


def _pieces(found: SlideNuclei) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    for start in range(0, len(found.scores), _ROWS):
        yield found.boxes[start : start + _ROWS], found.scores[start : start + _ROWS]
