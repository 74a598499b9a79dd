"""Nuclei of a slide: their outlines in pixels of the patches, and the boxes of what a patch shows of them.

Pixels are those of the patches (`mpp` um), counted from the slide's corner. Boxes are xyxy and half-open.
"""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

_THINNEST = 1e-3  # px; a thinner outline has no area


@dataclass(frozen=True)
class SlideNuclei:
    """Nuclei of a slide (M)."""

    outlines: NDArray[np.object_]  # (M,) valid polygons, or polygons in pieces, px
    labels: NDArray[np.int8]  # (M,) classes; -1 = no label

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def boxes(self) -> NDArray[np.float64]:
        """Boxes of the whole nuclei (M, 4), px."""
        bounds: NDArray[np.float64] = shapely.bounds(self.outlines)
        return bounds.reshape(-1, 4)

    def on_slide(self, size: tuple[float, float]) -> "SlideNuclei":
        """Nuclei whose box overlaps a slide of this width and height, px."""
        return self.select(on_slide(self.boxes, size))

    def select(self, chosen: NDArray[np.bool_]) -> "SlideNuclei":
        """Return the nuclei that are `chosen` (M,)."""
        return SlideNuclei(self.outlines[chosen], self.labels[chosen])


@dataclass(frozen=True)
class PatchBoxes:
    """Boxes (K) of what patches (N) show of nuclei, patch after patch; pixels count from the corner of the patch."""

    ptr: NDArray[np.int64]  # (N + 1,) the boxes of patch i are those from ptr[i] to ptr[i + 1]
    nuclei: NDArray[np.int64]  # (K,) index of each box's nucleus, rising within a patch
    boxes: NDArray[np.float64]  # (K, 4) bounds of the visible part, px
    centroids: NDArray[np.float64]  # (K, 2) of the visible part, px
    cut: NDArray[np.bool_]  # (K,) whether the edge of the patch cuts the nucleus
    hidden: NDArray[np.int64]  # (N,) nuclei of which too little is visible

    def __len__(self) -> int:
        return len(self.hidden)

    def of(self, patch: int) -> slice:
        """Places of a patch's boxes in the arrays."""
        return slice(int(self.ptr[patch]), int(self.ptr[patch + 1]))

    def select(self, patches: ArrayLike) -> "PatchBoxes":
        """Boxes of some patches, in the given order."""
        chosen = np.asarray(patches, np.int64)
        counts = np.diff(self.ptr)[chosen]
        ptr = np.concatenate([[0], np.cumsum(counts)])
        rows = np.arange(ptr[-1]) + np.repeat(self.ptr[chosen] - ptr[:-1], counts)
        return PatchBoxes(
            ptr, self.nuclei[rows], self.boxes[rows], self.centroids[rows], self.cut[rows], self.hidden[chosen]
        )


def centres_of(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Centres (M, 2) of boxes (M, 4)."""
    return np.asarray(boxes[:, :2] + boxes[:, 2:], np.float64) / 2


def place_outlines(
    polygons: ArrayLike, to_level0: NDArray[np.floating], image_mpp: float, mpp: float
) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
    """Outlines (M,) in px of `mpp` um, valid even if they cross themselves; and whether each (M,) has a finite area.

    `to_level0` is an affine (3, 3) from the frame of the `polygons` (M,) to level-0 px of `image_mpp` um.
    """
    affine = np.asarray(to_level0, dtype=np.float64)[:2] * (image_mpp / mpp)
    outlines = np.array(polygons, dtype=object)
    corners, owner = shapely.get_coordinates(outlines, return_index=True)
    outlines[owner[~np.isfinite(corners).all(axis=1)]] = None
    outlines = shapely.transform(outlines, lambda points: points @ affine[:, :2].T + affine[:, 2])
    crossed = ~shapely.is_valid(outlines)
    outlines[crossed] = shapely.make_valid(outlines[crossed], method="structure", keep_collapsed=False)
    bounds = shapely.bounds(outlines).reshape(-1, 4)
    return outlines, _thick(bounds) & (shapely.area(outlines) > 0)


def on_slide(boxes: NDArray[np.floating], size: ArrayLike) -> NDArray[np.bool_]:
    """Whether boxes (M, 4) overlap a slide of this width and height, px."""
    return np.asarray((boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < np.asarray(size)).all(axis=1))


def visible_boxes(
    outlines: NDArray[np.object_], corners: NDArray[np.integer], size: int, min_visible: float
) -> PatchBoxes:
    """Box in each patch what is visible of every nucleus, as PanNuke labels the nuclei at its edges.

    `outlines` (M,) are valid and have an area; `corners` (N, 2) are x, y of the first pixels of the patches, which are
    `size` px wide and may overlap; `min_visible` is the smallest fraction of a nucleus' area that must lie in a patch.
    """
    low = np.asarray(corners, dtype=np.float64).reshape(-1, 2)
    squares = shapely.box(*low.T, *(low + size).T)
    nucleus, patch = shapely.STRtree(squares).query(outlines)
    order = np.lexsort((nucleus, patch))
    nucleus, patch = nucleus[order], patch[order]
    whole = shapely.bounds(outlines).reshape(-1, 4)
    cut = ((whole[nucleus, :2] < low[patch]) | (whole[nucleus, 2:] > low[patch] + size)).any(axis=1)
    parts = outlines[nucleus]
    parts[cut] = shapely.intersection(parts[cut], squares[patch[cut]])
    share = shapely.area(parts) / shapely.area(outlines)[nucleus]
    boxes = shapely.bounds(parts).reshape(-1, 4) - np.tile(low[patch], 2)
    shown = (share >= min_visible) & _thick(boxes) | ~cut
    hidden = np.bincount(patch[~shown & (share > 0)], minlength=len(low))
    patch = patch[shown]
    centroids = shapely.get_coordinates(shapely.centroid(parts[shown])) - low[patch]
    ptr = np.searchsorted(patch, np.arange(len(low) + 1))
    return PatchBoxes(ptr, nucleus[shown], boxes[shown], centroids, cut[shown], hidden)


def _thick(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether boxes (M, 4) have an area; those of empty outlines are NaN and have none."""
    sides: NDArray[np.float64] = boxes[:, 2:] - boxes[:, :2]
    return np.asarray((sides > _THINNEST).all(axis=1))
