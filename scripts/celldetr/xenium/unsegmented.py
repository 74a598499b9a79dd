"""Whether the nuclei that Xenium segmented and those that the H&E shows are the same ones, patch by patch.

Nuclei that it did not segment would be background in training. Nuclei are found in each patch as dark round blobs of
hematoxylin. Not every blob is a nucleus, so that only those count that are as dark as most segmented nuclei, and a
patch is judged together with those around it. Nuclei that lie where the H&E shows none, as beside a fold or a tear,
would be wrong boxes. Of a single nucleus this says little, of a dozen neighbours much.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from celldetr.slides.boxes import SlideNuclei
from celldetr.slides.cutting import read_blocks
from celldetr.slides.grid import PatchGrid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.nuclei import SPACING, blob_responses, find_blobs

_RIM = 2.0  # um at the edge of a patch; a nucleus that it cuts looks like another one
_APART = 1.0  # um between a blob and the outline of its nucleus at most
_FAINT = 25  # percentile of the contrasts of segmented nuclei; fainter blobs do not count
_AROUND = 10.0  # blobs that the patches around a patch count as, at most
_BLOCK = 64  # patches that are read at a time
_DARK = 0.25  # of the median contrast of the nuclei: those that the H&E shows, 82 to 97 %, and 19 to 28 % elsewhere
_NEIGHBOURS = 12  # nuclei, with the one that is judged
_LEAST_DARK = 0.45  # share of these; below, the nucleus is out of place


@dataclass(frozen=True)
class VisibleNuclei:
    """Nuclei that can be seen in patches (N)."""

    seen: NDArray[np.int64]  # (N,) clear ones
    missing: NDArray[np.int64]  # (N,) those of them that Xenium did not segment
    share: NDArray[np.float64]  # (N,) estimated share of the visible nuclei that it did not segment
    misplaced: NDArray[np.float64]  # (N,) share of the segmented nuclei among neighbours that are not seen

    def select(self, patches: NDArray[np.integer]) -> Self:
        """Return those of some patches."""
        return type(self)(self.seen[patches], self.missing[patches], self.share[patches], self.misplaced[patches])


@dataclass(frozen=True)
class _Blobs:
    """Dark blobs (n) in all patches, and the contrast at the centroids of the boxes (K) of a grid."""

    patch: NDArray[np.int64]  # (n,)
    places: NDArray[np.float64]  # (n, 2) px of the grid
    contrast: NDArray[np.float64]  # (n,)
    of_boxes: NDArray[np.float64]  # (K,)


def visible_nuclei(he: Path, grid: PatchGrid, nuclei: SlideNuclei, workers: int) -> VisibleNuclei:
    """Look for nuclei in the patches of a grid, and compare with those that Xenium segmented (px of the grid).

    Raises InputError if a patch cannot be decoded.
    """
    blobs = _find(he, grid, workers)
    known = np.zeros(len(blobs.places), dtype=bool)
    tree = shapely.STRtree(nuclei.outlines)
    known[tree.query(shapely.points(blobs.places), "dwithin", _APART / grid.mpp)[0]] = True
    clear = blobs.contrast >= (np.percentile(blobs.contrast[known], _FAINT) if known.any() else np.inf)
    seen, missing = (np.bincount(blobs.patch[which], minlength=len(grid)) for which in (clear, clear & ~known))
    return VisibleNuclei(seen, missing, _shares(grid, seen, missing), _misplaced(grid, blobs.of_boxes))


def _find(he: Path, grid: PatchGrid, workers: int) -> _Blobs:
    """Find the blobs in the patches of a grid."""
    side = max(1, round(grid.size * grid.mpp / SPACING))
    rim, scale = _RIM / SPACING, grid.size / side
    of_boxes = np.zeros(len(grid.boxes.nuclei))
    found = [(np.empty(0, np.int64), np.empty((0, 2)), np.empty(0))]
    for block in read_blocks(he, grid, size=_BLOCK, workers=workers):
        for number, pixels in zip(block.numbers.tolist(), block.pixels, strict=True):
            small = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
            responses = blob_responses(hematoxylin(np.asarray(small)))
            places, contrast = find_blobs(responses)
            inner = ((places > rim) & (places < side - rim)).all(axis=1)
            on_slide = places[inner] * scale + grid.corners[number]
            found.append((np.full(len(on_slide), number), on_slide, contrast[inner]))
            own = grid.boxes.of(number)
            centroids = grid.boxes.centroids[own].T[::-1] / scale - 0.5
            of_boxes[own] = ndimage.map_coordinates(responses[-1], centroids, order=1, mode="nearest")
    patch, places, contrast = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _Blobs(patch, places, contrast, of_boxes)


def _shares(grid: PatchGrid, seen: NDArray[np.int64], missing: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share (N,) of the visible nuclei without an outline: of the patch, and as a prior of those that touch it.

    Few blobs say little, but a patch of which all are known is good whatever lies beside it.
    """
    pairs = cKDTree(grid.corners).query_pairs(1.01 * grid.size, p=np.inf, output_type="ndarray")
    here, there = np.concatenate([pairs, pairs[:, ::-1]]).T
    around, lost = (np.bincount(here, weights=counts[there], minlength=len(grid)) for counts in (seen, missing))
    weight = np.minimum(around, _AROUND)
    share = (missing + weight * lost / np.maximum(around, 1)) / np.maximum(seen + weight, 1)
    return np.where((seen > 0) & (missing == 0), 0, share)


def _misplaced(grid: PatchGrid, contrast: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share (N,) of the whole nuclei of a patch that lie among nuclei (of contrast (K,)) of which few are dark."""
    whole = np.flatnonzero(~grid.boxes.cut)
    if not len(whole):
        return np.zeros(len(grid))
    patch = np.repeat(np.arange(len(grid)), np.diff(grid.boxes.ptr))[whole]
    # patches may overlap: each nucleus counts once among the neighbours
    _, first, own = np.unique(grid.boxes.nuclei[whole], return_index=True, return_inverse=True)
    places = (grid.corners[patch] + grid.boxes.centroids[whole])[first]
    dark = contrast[whole][first] > _DARK * max(float(np.median(contrast[whole][first])), 0.0)
    _, near = cKDTree(places).query(places, np.arange(1, min(_NEIGHBOURS, len(places)) + 1))
    out = dark[near].mean(axis=1) < _LEAST_DARK
    return np.bincount(patch, out[own], len(grid)) / np.maximum(np.bincount(patch, minlength=len(grid)), 1)
