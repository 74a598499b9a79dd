"""Boxes of the nuclei on a slide, from outlines to patches.

Units are pixels of the size of the patches (`mpp` um), counted from the slide's corner. Boxes are xyxy and half-open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

_THINNEST = 1e-3  # px; a thinner box has no area


@dataclass(frozen=True)
class SlideBoxes:
    """Nuclei of a slide (M), without their outlines."""

    boxes: NDArray[np.float64]
    """(M, 4) xyxy, px."""
    centroids: NDArray[np.float64]
    """(M, 2) x, y, px."""
    labels: NDArray[np.int8]
    """(M,) classes; -1 = no label."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Centres of the boxes (M, 2), px."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    def keep(self, chosen: NDArray[np.bool_]) -> "SlideBoxes":
        """Nuclei where `chosen` (M,) is true."""
        return SlideBoxes(self.boxes[chosen], self.centroids[chosen], self.labels[chosen])

    def on_slide(self, size: tuple[float, float]) -> "SlideBoxes":
        """Nuclei whose centre lies on a slide of this width and height, px."""
        inside = ((self.centres >= 0) & (self.centres < np.asarray(size))).all(axis=1)
        return self.keep(np.asarray(inside))

    def in_patch(
        self, chosen: NDArray[np.int64], corner: NDArray[np.int64], size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Boxes (n, 4) and centroids (n, 2) of the `chosen` nuclei in a patch, px from its corner, clipped to it."""
        boxes = np.clip(self.boxes[chosen] - np.tile(corner, 2), 0, size).astype(np.float32)
        centroids = (self.centroids[chosen] - corner).astype(np.float32)
        return boxes, np.clip(centroids, boxes[:, :2], boxes[:, 2:])


def boxes_from_polygons(
    polygons: ArrayLike | Sequence[shapely.Geometry], um_to_he: NDArray[np.floating], he_mpp: float, mpp: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes and centroids of outlines.

    Parameters
    ----------
    polygons
        (M,) outlines, in um of a frame of their own.
    um_to_he
        (3, 3) affine from that frame to level-0 pixels of the slide.
    he_mpp
        Size of a level-0 pixel in um.
    mpp
        Size of a pixel of the result in um.

    Returns
    -------
    tuple
        Boxes (M, 4) around the transformed corners, and centroids (M, 2), px; NaN if a polygon is empty, not finite or
        has no area.
    """
    shapes = np.asarray(polygons, dtype=object)
    affine = np.asarray(um_to_he, dtype=np.float64)[:2] * (he_mpp / mpp)
    corners, owner = shapely.get_coordinates(shapes, return_index=True)
    corners = corners @ affine[:, :2].T + affine[:, 2]
    boxes = np.full((len(shapes), 4), np.nan)
    if len(owner):
        starts = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
        boxes[owner[starts], :2] = np.minimum.reduceat(corners, starts)
        boxes[owner[starts], 2:] = np.maximum.reduceat(corners, starts)
    centroids = np.full((len(shapes), 2), np.nan)
    solid = ~(shapely.is_empty(shapes) | shapely.is_missing(shapes))
    centroids[solid] = shapely.get_coordinates(shapely.centroid(shapes[solid])) @ affine[:, :2].T + affine[:, 2]
    with np.errstate(invalid="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
        good = np.isfinite(centroids).all(axis=1) & (sides > _THINNEST).all(axis=1) & (shapely.area(shapes) > 0)
    boxes[~good], centroids[~good] = np.nan, np.nan
    return boxes, centroids
