"""Given cells in the tiles of a slide: the tile that is read for each, what tiles show, and what was detected there."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.cells.given import GivenCells, agreement
from celldetr.cells.tiling import Tiles
from celldetr.inference.batch import FoundNuclei
from celldetr.slides.boxes import centres_of, on_slide, visible_boxes

AGREEMENT_UM = 3.0
"""Largest distance between the centres of a given cell and a detection of it (paper: 12 px of 0.25 um)."""
MIN_VISIBLE = 0.1
"""Smallest share of the area of a cell that a tile must show; a cell that the tile is read for counts in any case."""
_THINNEST = 1.0  # px


class Shown(NamedTuple):
    """What a tile shows of the given cells (n)."""

    cells: NDArray[np.int64]
    """Indices (n,), rising."""
    boxes: NDArray[np.float32]
    """(n, 4) of the visible parts, px from the corner of the tile."""
    own: NDArray[np.bool_]
    """(n,) whether the tile is read for the cell."""


class GivenTiles:
    """Which given cells a tile is read for, and which it shows.

    A cell belongs to the tile whose core holds the centre of its box; what a tile shows of others lies around it.
    """

    def __init__(self, cells: GivenCells, tiles: Tiles, chosen: NDArray[np.bool_]) -> None:
        """Take the cells that are `chosen` (N,); only tiles with such a cell remain in `tiles`."""
        self.cells = cells
        self._boxes = cells.boxes / tiles.ratio
        centres, there = centres_of(self._boxes), on_slide(self._boxes, tiles.limit)
        self.outside = np.flatnonzero(chosen & ~there)
        self._own = np.flatnonzero(chosen & there)
        used = np.zeros(len(tiles), dtype=bool)
        used[tiles.numbers_at(centres[self._own])] = True
        self.tiles = tiles.select(used)
        tile = self.tiles.numbers_at(centres[self._own])
        self._own = self._own[np.argsort(tile, kind="stable")]
        self._ptr = np.searchsorted(np.sort(tile), np.arange(len(self.tiles) + 1))
        self._tree = shapely.STRtree(shapely.box(*self._boxes.T))

    def of(self, tile: int) -> NDArray[np.int64]:
        """Return the indices (n,) of the cells that a tile is read for, rising."""
        return self._own[self._ptr[tile] : self._ptr[tile + 1]]

    def shown(self, numbers: Sequence[int]) -> list["Shown"]:
        """List for each tile what it shows of the cells."""
        size, corners = self.tiles.tiling.size, self.tiles.corners[list(numbers)]
        near = np.unique(self._tree.query(shapely.box(*corners.T, *(corners + size).T))[1])
        ratio = self.tiles.ratio
        outlines = shapely.transform(self.cells.outlines[near], lambda points: points / ratio)
        visible = visible_boxes(outlines, corners, size, MIN_VISIBLE)
        found = []
        for place, number in enumerate(numbers):
            members, own = visible.of(place), self.of(number)
            index, boxes = near[visible.nuclei[members]], visible.boxes[members]
            missing = np.setdiff1d(own, index)
            cut = np.clip(self._boxes[missing] - np.tile(corners[place], 2), 0, size)
            cut[:, :2] = np.minimum(cut[:, :2], size - _THINNEST)
            cut[:, 2:] = np.maximum(cut[:, 2:], cut[:, :2] + _THINNEST)
            index, boxes = np.concatenate([index, missing]), np.concatenate([boxes, cut])
            order = np.argsort(index)
            index = index[order]
            found.append(Shown(index, boxes[order].astype(np.float32), np.isin(index, own)))
        return found


def compare(
    shown: Sequence[Shown], nuclei: FoundNuclei, counted: NDArray[np.bool_], radius: float
) -> tuple[NDArray[np.float64], Counter[str]]:
    """Compare the cells that the tiles of a batch show with the nuclei (N) that were found in them.

    `counted` (N,) are the nuclei in the core of their tile; `radius` is the largest distance of two centres, px.
    Returns for the cells that the tiles are read for the nucleus score (M,) of the detection that agrees, NaN if none
    does, and counts.
    """
    scores, counts = [np.empty(0)], Counter[str]()
    for place, (_, boxes, own) in enumerate(shown):
        here = np.flatnonzero(nuclei.image == place)
        partner = agreement(boxes, nuclei.boxes[here], radius)
        score = np.append(nuclei.nucleus_score[here], np.nan)[partner]  # no partner, -1, is the last one
        scores.append(score[own])
        agreed = np.isin(np.arange(len(here)), partner)
        counts["detections"] += int(counted[here].sum())
        counts["cells with a detection"] += int((partner[own] >= 0).sum())
        counts["detections without a cell"] += int((counted[here] & ~agreed).sum())
    return np.concatenate(scores), counts
