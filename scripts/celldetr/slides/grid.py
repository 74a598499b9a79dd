"""The grid of patches over a slide: which patches are cut, and which nuclei each has.

Positions are pixels of the size of the patches (`mpp` um), counted from the slide's corner: patch pixel x lies over
level-0 pixels x * mpp / image_mpp to (x + 1) * mpp / image_mpp.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideBoxes
from celldetr.slides.tissue import Raster
from celldetr.store import NO_LABEL

_STRIPE = 16  # columns of patches in a stripe
_COVERED = 0.999  # smallest share of a patch that must have been imaged: all of it, but for rounding of the map


@dataclass(frozen=True)
class PatchGrid:
    """Patches (N) to cut out of a slide, in the order of the store."""

    size: int
    """Side of a patch, px."""
    mpp: float
    """Size of a pixel of the patches, um."""
    image_mpp: float
    """Size of a level-0 pixel of the slide, um."""
    corners: NDArray[np.int64]
    """(N, 2) x, y of the first pixels, px of `mpp` um."""
    nuclei: NDArray[np.int64]
    """(K,) indices of each patch's nuclei, patch after patch; a nucleus is in each patch that its centre is in."""
    ptr: NDArray[np.int64]
    """(N + 1,) the nuclei of patch i are ``nuclei[ptr[i]:ptr[i + 1]]``."""
    passed_over: dict[str, int]
    """Reason -> patches of the grid that are not cut."""

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def level0(self) -> NDArray[np.int64]:
        """Corners of the patches (N, 2) in level-0 px, rounded."""
        return np.rint(self.corners * (self.mpp / self.image_mpp)).astype(np.int64)

    def nuclei_of(self, patch: int) -> NDArray[np.int64]:
        """Return the indices (n,) of a patch's nuclei."""
        return self.nuclei[self.ptr[patch] : self.ptr[patch + 1]]

    def without(self, patches: Collection[int], reason: str) -> "PatchGrid":
        """Leave patches out; `passed_over` counts them under the reason."""
        kept = np.setdiff1d(np.arange(len(self)), np.fromiter(patches, dtype=np.int64, count=len(patches)))
        members = [self.nuclei_of(patch) for patch in kept]
        return replace(
            self,
            corners=self.corners[kept],
            nuclei=np.concatenate([np.empty(0, np.int64), *members]),
            ptr=np.cumsum([0, *map(len, members)], dtype=np.int64),
            passed_over={**self.passed_over, reason: self.passed_over.get(reason, 0) + len(patches)},
        )


def patch_grid(
    image_size: tuple[int, int],
    image_mpp: float,
    nuclei: SlideBoxes,
    *,
    size: int,
    mpp: float,
    tissue: Raster,
    settings: PatchSettings,
    seed: int,
    imaged: Raster | None = None,
) -> PatchGrid:
    """Lay a grid over the slide, from its corner, and choose patches.

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
        Rules for the choice.
    seed
        Seed of the draw if there are more than `max_patches`.
    imaged
        Area in which nuclei are known, if not everywhere. Patches that reach beyond it are left out: their nuclei would
        be taken for background.

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
            f"image: got {image_size[0]} x {image_size[1]} px of {image_mpp:.4g} um, expected at least one patch "
            f"({size} px of {mpp} um) in each direction; check the pixel size"
        )
    columns, rows = np.meshgrid(np.arange(across), np.arange(down))
    corners = np.stack([columns.ravel(), rows.ravel()], axis=1) * step
    patch, nucleus = _members(nuclei.centres, (across, down), step, size)
    labelled = patch[nuclei.labels[nucleus] != NO_LABEL]
    rules = {
        "with too little tissue": tissue.share(corners * ratio, size * ratio) >= settings.min_tissue,
        "with too few nuclei": np.bincount(patch, minlength=len(corners)) >= settings.min_nuclei,
        "with too few labelled nuclei": np.bincount(labelled, minlength=len(corners)) >= settings.min_labelled,
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
    return PatchGrid(size, mpp, image_mpp, corners[chosen], *_select(patch, nucleus, chosen, len(corners)), passed_over)


def stripe_order(corners: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Order (n,) of patches with `corners` (n, 2) that decodes each tile of the file once: stripes of a few columns."""
    x, y = corners.T
    return np.lexsort((x, y, x // (_STRIPE * size)))


def _members(
    centres: NDArray[np.float64], grid: tuple[int, int], step: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (patch, nucleus) for each centre that lies in a patch; patches are numbered row by row."""
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
    """Turn pairs into the `nuclei` and `ptr` of the chosen patches, in their order."""
    place = np.full(count, -1)
    place[chosen] = np.arange(len(chosen))
    rank = place[patch]
    rank, nucleus = rank[rank >= 0], nucleus[rank >= 0]
    order = np.lexsort((nucleus, rank))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=len(chosen)))]).astype(np.int64)
    return nucleus[order], ptr
