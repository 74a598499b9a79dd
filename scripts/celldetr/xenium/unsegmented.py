"""Nuclei that the H&E shows and Xenium did not segment: training of detection would take them for background.

Nuclei are found in each patch as dark round blobs of hematoxylin. Not every blob is a nucleus, so that only those
count that are as dark as most segmented nuclei, and a patch is judged together with those around it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from celldetr.slides.boxes import SlideNuclei
from celldetr.slides.cutting import read_blocks
from celldetr.slides.grid import PatchGrid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.nuclei import SPACING, find_blobs

_RIM = 2.0  # um at the edge of a patch; a nucleus that it cuts looks like another one
_APART = 1.0  # um between a blob and the outline of its nucleus at most
_FAINT = 25  # percentile of the contrasts of segmented nuclei; fainter blobs do not count
_AROUND = 10.0  # blobs that the patches around a patch count as, at most
_BLOCK = 64  # patches that are read at a time


@dataclass(frozen=True)
class VisibleNuclei:
    """Nuclei that can be seen in patches (N)."""

    seen: NDArray[np.int64]  # (N,) clear ones
    missing: NDArray[np.int64]  # (N,) those of them that Xenium did not segment
    share: NDArray[np.float64]  # (N,) estimated share of the visible nuclei that it did not segment


def visible_nuclei(he: Path, grid: PatchGrid, nuclei: SlideNuclei, workers: int) -> VisibleNuclei:
    """Look for nuclei in the patches of a grid, and compare with those that Xenium segmented (px of the grid).

    Raises InputError if a patch cannot be decoded.
    """
    patch, places, contrast = _blobs(he, grid, workers)
    known = np.zeros(len(places), dtype=bool)
    tree = shapely.STRtree(nuclei.outlines)
    known[tree.query(shapely.points(places), "dwithin", _APART / grid.mpp)[0]] = True
    clear = contrast >= (np.percentile(contrast[known], _FAINT) if known.any() else np.inf)
    seen, missing = (np.bincount(patch[which], minlength=len(grid)) for which in (clear, clear & ~known))
    return VisibleNuclei(seen, missing, _shares(grid, seen, missing))


def _blobs(
    he: Path, grid: PatchGrid, workers: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Patch (n,), place (n, 2) in px of the grid, and contrast (n,) of the blobs in all patches."""
    side = max(1, round(grid.size * grid.mpp / SPACING))
    rim, scale = _RIM / SPACING, grid.size / side
    found = [(np.empty(0, np.int64), np.empty((0, 2)), np.empty(0))]
    for block in read_blocks(he, grid, size=_BLOCK, workers=workers):
        for number, pixels in zip(block.numbers.tolist(), block.pixels, strict=True):
            small = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
            places, contrast = find_blobs(hematoxylin(np.asarray(small)))
            inner = ((places > rim) & (places < side - rim)).all(axis=1)
            on_slide = places[inner] * scale + grid.corners[number]
            found.append((np.full(len(on_slide), number), on_slide, contrast[inner]))
    patch, places, contrast = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return patch, places, contrast


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
