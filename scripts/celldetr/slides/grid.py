"""Which patches of a slide are taken, and which nuclei each has.

Positions are pixels at the size of the patches (`mpp`), counted from the corner of the slide: patch pixel x lies over
level-0 pixels x * mpp / image_mpp to (x + 1) * mpp / image_mpp. Boxes are xyxy and half-open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.tissue import Raster
from celldetr.store import NO_LABEL

__all__ = ["Nuclei", "PatchSettings", "Plan", "boxes_from_polygons", "plan_patches", "stripe_order"]

_STRIPE = 16  # columns of patches that are walked down together
_THINNEST = 1e-3  # px; boxes that are thinner have no area
_COVERED = 0.999  # share of a patch that must have been imaged: rounding of the map aside, all of it


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of a slide.

    Attributes
    ----------
    boxes
        (M, 4) xyxy px, half-open.
    centroids
        (M, 2) x, y px.
    labels
        (M,) int8; -1 = no label.
    """

    boxes: NDArray[np.float64]
    centroids: NDArray[np.float64]
    labels: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Centres of the boxes (M, 2), px."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    def keep(self, chosen: NDArray[np.bool_]) -> "Nuclei":
        """Nuclei where `chosen` (M,) holds."""
        return Nuclei(self.boxes[chosen], self.centroids[chosen], self.labels[chosen])


def boxes_from_polygons(
    polygons: ArrayLike | Sequence[shapely.Geometry], um_to_he: NDArray[np.floating], he_mpp: float, mpp: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes and centroids of nuclei in pixels of `mpp` um.

    Parameters
    ----------
    polygons
        (M,) polygons; um in a frame of their own.
    um_to_he
        (3, 3) affine: their um -> level-0 pixel of the image.
    he_mpp
        Size of a level-0 pixel in um.
    mpp
        Size of a pixel of the result in um.

    Returns
    -------
    tuple
        Boxes (M, 4), xyxy px, half-open, around the transformed corners; centroids (M, 2), px. NaN where a polygon is
        empty, not finite or has no area.
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


@dataclass(frozen=True)
class Plan:
    """Patches to cut out of a slide, in the order of the store.

    Attributes
    ----------
    size, mpp
        Side of a patch in px, and size of a pixel in um.
    image_mpp
        Size of a level-0 pixel of the slide in um.
    corners
        (N, 2) x, y of the patches' first pixels, px of `mpp` um.
    nuclei
        (K,) index of each patch's nuclei, patch after patch; patches that overlap share nuclei.
    ptr
        (N + 1,) nuclei of patch i are ``nuclei[ptr[i]:ptr[i + 1]]``.
    passed_over
        Reason -> patches of the grid that were not taken.
    """

    size: int
    mpp: float
    image_mpp: float
    corners: NDArray[np.int64]
    nuclei: NDArray[np.int64]
    ptr: NDArray[np.int64]
    passed_over: dict[str, int]

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def level0(self) -> NDArray[np.int64]:
        """Corners of the patches (N, 2) in level-0 px, rounded."""
        return np.rint(self.corners * (self.mpp / self.image_mpp)).astype(np.int64)


def plan_patches(
    image_size: tuple[int, int],
    image_mpp: float,
    nuclei: Nuclei,
    *,
    size: int,
    mpp: float,
    tissue: Raster,
    settings: PatchSettings,
    seed: int,
    imaged: Raster | None = None,
) -> Plan:
    """Choose patches on a grid that starts at the slide's corner.

    Parameters
    ----------
    image_size
        Width and height of the slide, level-0 px.
    image_mpp
        Size of a level-0 pixel in um.
    nuclei
        Nuclei of the slide, px of `mpp` um.
    size, mpp
        Side of a patch in px, and size of its pixels in um.
    tissue
        Where there is tissue.
    settings
        Which patches are taken.
    seed
        Seed of the draw when there are more than `max_patches`.
    imaged
        Where nuclei are known, if that is not everywhere: patches that reach beyond are not taken, as their nuclei
        would pass for background.

    Raises
    ------
    InputError
        The slide is smaller than a patch.
    """
    step = max(1, round(settings.stride * size))
    ratio = mpp / image_mpp
    # half a pixel of slack: a slide that is exactly n patches wide must not lose one to rounding
    across, down = (int((side / ratio - size + 0.5) // step) + 1 for side in image_size)
    if across < 1 or down < 1:
        raise InputError(
            f"image: got {image_size[0]} x {image_size[1]} px of {image_mpp:.4g} um, expected at least a patch "
            f"({size} px of {mpp} um) each way; check the pixel size"
        )
    columns, rows = np.meshgrid(np.arange(across), np.arange(down))
    corners = np.stack([columns.ravel(), rows.ravel()], axis=1) * step
    patch, nucleus = _members(nuclei.centres, (across, down), step, size)
    rules = {
        "with too little tissue": tissue.share(corners * ratio, size * ratio) >= settings.min_tissue,
        "with too few nuclei": np.bincount(patch, minlength=len(corners)) >= settings.min_nuclei,
        "with too few labelled nuclei": np.bincount(patch[nuclei.labels[nucleus] != NO_LABEL], minlength=len(corners))
        >= settings.min_labelled,
    }
    if imaged is not None:
        rules = {"beyond the imaged area": imaged.share(corners * ratio, size * ratio) >= _COVERED, **rules}
    taken = np.ones(len(corners), dtype=bool)
    passed_over = {}
    for reason, good in rules.items():
        passed_over[reason] = int((taken & ~good).sum())
        taken &= good
    chosen = np.flatnonzero(taken)
    if settings.max_patches is not None and len(chosen) > settings.max_patches:
        passed_over["not drawn"] = len(chosen) - settings.max_patches
        chosen = np.random.default_rng(seed).permutation(chosen)[: settings.max_patches]
    chosen = chosen[stripe_order(corners[chosen], size)]
    return Plan(size, mpp, image_mpp, corners[chosen], *_select(patch, nucleus, chosen, len(corners)), passed_over)


def stripe_order(corners: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Order (n,) of patches in stripes of a few columns: a tile of the slide serves all its patches at once.

    Parameters
    ----------
    corners
        Left upper corners (n, 2), x and y in px.
    size
        Distance of the columns, px.
    """
    x, y = corners.T
    return np.lexsort((x, y, x // (_STRIPE * size)))


def _members(
    centres: NDArray[np.float64], grid: tuple[int, int], step: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (patch, nucleus): the centre of the nucleus is in the patch. Patches are numbered row by row."""
    across, down = grid
    last = np.floor(centres / step).astype(np.int64)
    back = range(-(-size // step))
    patches, nuclei = [], []
    for up in back:
        for left in back:
            column, row = last[:, 0] - left, last[:, 1] - up
            found = (column >= 0) & (column < across) & (centres[:, 0] < column * step + size)
            found &= (row >= 0) & (row < down) & (centres[:, 1] < row * step + size)
            patches.append((row * across + column)[found])
            nuclei.append(np.flatnonzero(found))
    return np.concatenate(patches), np.concatenate(nuclei)


def _select(
    patch: NDArray[np.int64], nucleus: NDArray[np.int64], chosen: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Nuclei of the chosen patches in their order, each patch's by number; and where each patch's begin."""
    place = np.full(count, -1)
    place[chosen] = np.arange(len(chosen))
    rank = place[patch]
    rank, nucleus = rank[rank >= 0], nucleus[rank >= 0]
    order = np.lexsort((nucleus, rank))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=len(chosen)))]).astype(np.int64)
    return nucleus[order], ptr
