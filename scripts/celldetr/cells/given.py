"""Cells that a user already has: their ids and outlines, and which detections agree with them."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree


@dataclass(frozen=True)
class GivenCells:
    """Cells of a user's own segmentation (N), in the order of their file."""

    ids: NDArray[np.object_]
    """Ids (N,) as text, each once."""
    outlines: NDArray[np.object_]
    """Valid Polygons or MultiPolygons (N,) with an area, px of level 0."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def boxes(self) -> NDArray[np.float64]:
        """Boxes (N, 4) xyxy, px of level 0."""
        bounds: NDArray[np.float64] = shapely.bounds(self.outlines)
        return bounds.reshape(-1, 4)


def agreement(given_boxes: NDArray[np.floating], found_boxes: NDArray[np.floating], radius: float) -> NDArray[np.int64]:
    """Index of the found box for each given one (n,), -1 if none; boxes (n, 4) and (m, 4) are xyxy px.

    One-to-one: of all pairs of centres at most `radius` px apart, the nearest is taken first.
    """
    given, found = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (given_boxes, found_boxes))
    partner = np.full(len(given), -1, np.int64)
    if not len(given) or not len(found):
        return partner
    trees = (cKDTree((boxes[:, :2] + boxes[:, 2:]) / 2) for boxes in (given, found))
    pairs = next(trees).sparse_distance_matrix(next(trees), radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"], pairs["v"]))]
    free = np.ones(len(found), dtype=bool)
    one, other = pairs["i"], pairs["j"]
    while len(one):  # few rounds: a pair is taken once it is the nearest of both of its boxes
        nearest = np.zeros((2, len(one)), dtype=bool)
        for side, boxes in zip(nearest, (one, other), strict=True):
            side[np.unique(boxes, return_index=True)[1]] = True
        taken = nearest.all(axis=0)
        partner[one[taken]] = other[taken]
        free[other[taken]] = False
        left = (partner[one] < 0) & free[other]
        one, other = one[left], other[left]
    return partner
