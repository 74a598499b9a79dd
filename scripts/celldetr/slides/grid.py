"""The grid of patches over a slide: which patches are cut, and which nuclei each has.

Positions are pixels of the size of the patches (`mpp` um), counted from the slide's corner: patch pixel x lies over
level-0 pixels x * mpp / image_mpp to (x + 1) * mpp / image_mpp.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import PatchBoxes, SlideNuclei, visible_boxes
from celldetr.slides.tissue import Raster
from celldetr.store import NO_LABEL

_STRIPE = 16  # columns of patches in a stripe
_MOST_NUCLEI = 2000  # in a patch: seven times as many as in PanNuke's fullest; the memory of training grows with them
_COVERED = 0.999  # smallest share of a patch that must have been imaged: all of it, but for rounding of the map


@dataclass(frozen=True)
class PatchGrid:
    """Patches (N) to cut out of a slide, in the order of the store."""

    size: int  # side of a patch, px
    mpp: float  # um per px of the patches
    image_mpp: float  # um per level-0 px of the slide
    corners: NDArray[np.int64]  # (N, 2) x, y of the first pixels, px of `mpp` um
    boxes: PatchBoxes  # nuclei in the patches
    passed_over: dict[str, int]  # reason -> patches of the grid that are not cut

    @classmethod
    def bare(cls, size: int, mpp: float, image_mpp: float, corners: NDArray[np.int64]) -> Self:
        """Patches (N) without nuclei."""
        return cls(size, mpp, image_mpp, corners, visible_boxes(np.empty(0, dtype=object), corners, size, 1), {})

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def level0(self) -> NDArray[np.int64]:
        """Corners of the patches (N, 2) in level-0 px, rounded."""
        return np.rint(self.corners * (self.mpp / self.image_mpp)).astype(np.int64)

    def without(self, patches: Collection[int], reason: str) -> "PatchGrid":
        """Leave patches out; `passed_over` counts them under the reason."""
        kept = np.setdiff1d(np.arange(len(self)), list(patches))
        passed_over = {**self.passed_over, reason: self.passed_over.get(reason, 0) + len(patches)}
        return replace(self, corners=self.corners[kept], boxes=self.boxes.select(kept), passed_over=passed_over)

    def dropped(self, nuclei: int) -> dict[str, int]:
        """Reason -> how many nuclei, of as many on the slide, and parts of nuclei have no box."""
        return {
            "nuclei in no patch that was taken": nuclei - len(np.unique(self.boxes.nuclei)),
            "parts of nuclei at the edge of a patch that show too little": int(self.boxes.hidden.sum()),
        }


def patch_grid(
    image_size: tuple[int, int],
    image_mpp: float,
    nuclei: SlideNuclei,
    *,
    size: int,
    mpp: float,
    tissue: Raster,
    settings: PatchSettings,
    seed: int,
    imaged: Raster | None = None,
) -> PatchGrid:
    """Lay a grid of patches, `size` px of `mpp` um, over the slide, from its corner, and choose patches.

    Parameters
    ----------
    image_size, image_mpp
        Width and height of the slide, level-0 px, and um per px.
    nuclei
        Nuclei of the slide, px of `mpp` um.
    tissue
        Where there is tissue.
    settings, seed
        Rules for the choice; the seed draws if there are more than `max_patches`.
    imaged
        Area in which nuclei are known, if not everywhere. Patches that reach beyond it are left out: their nuclei would
        be taken for background.

    Raises
    ------
    InputError
        The slide is smaller than a patch, or there are impossibly many nuclei in a patch.
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
    rules = {"with too little tissue": tissue.share(corners * ratio, size * ratio) >= settings.min_tissue}
    if imaged is not None:
        rules = {"beyond the imaged area": imaged.share(corners * ratio, size * ratio) >= _COVERED, **rules}
    taken, passed_over = _apply(rules)
    corners = corners[taken]
    boxes = visible_boxes(nuclei.outlines, corners, size, settings.min_visible)
    counts = np.diff(boxes.ptr)
    if counts.max(initial=0) > _MOST_NUCLEI:
        x, y = np.rint(corners[counts.argmax()] * ratio).astype(int)
        raise InputError(
            f"outlines: got {counts.max()} nuclei in the patch at {x}, {y} px of level 0, expected at most "
            f"{_MOST_NUCLEI}; are nuclei in the file many times, or is a patch too large (patch.size times patch.mpp)?"
        )
    rules = {"with too few nuclei": counts >= settings.min_nuclei}
    if settings.min_labelled:
        patch = np.repeat(np.arange(len(corners)), counts)[nuclei.labels[boxes.nuclei] != NO_LABEL]
        labelled = np.bincount(patch, minlength=len(corners))
        rules["with too few labelled nuclei"] = labelled >= settings.min_labelled
    taken, too_few = _apply(rules)
    passed_over |= too_few
    chosen = np.flatnonzero(taken)
    if settings.max_patches is not None and len(chosen) > settings.max_patches:
        passed_over["not drawn"] = len(chosen) - settings.max_patches
        chosen = np.random.default_rng(seed).permutation(chosen)[: settings.max_patches]
    chosen = chosen[stripe_order(corners[chosen], size)]
    return PatchGrid(size, mpp, image_mpp, corners[chosen], boxes.select(chosen), passed_over)


def _apply(rules: Mapping[str, NDArray[np.bool_]]) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Where all rules (N,) hold, and how many places fail each; a place counts for the first rule that it fails."""
    places = np.stack(list(rules.values()))
    first = np.where(places.all(axis=0), -1, np.argmin(places, axis=0))
    return first < 0, {name: int((first == number).sum()) for number, name in enumerate(rules)}


def stripe_order(corners: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Order (n,) of patches with `corners` (n, 2) that decodes each tile of the file once: stripes of a few columns."""
    x, y = corners.T
    return np.lexsort((x, y, x // (_STRIPE * size)))
