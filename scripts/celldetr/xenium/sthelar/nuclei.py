"""One patch of STHELAR: its pixels and its nuclei at the scale of our patches, from its image and its map of ids.

A patch is a PNG, and a sparse matrix (CSR, an .npz of SciPy) with the id of a cell at each pixel of its nucleus. It is
resampled about its centre: of a patch that shows more tissue than ours, the rim is cut off.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse

from celldetr.runtime.errors import InputError

SIDE = 256
"""Side of a patch of STHELAR, px."""
_SLACK = 1.0  # px of its side that a patch may be too small: a pixel size of 0.2499 um for 0.25


@dataclass(frozen=True)
class Window:
    """The square of a patch (`SIDE` px of `mpp` um) that one of ours shows (`size` px)."""

    size: int
    low: float  # px of STHELAR, first pixel in both directions
    side: float  # px of STHELAR

    @property
    def scale(self) -> float:
        """Our pixels per pixel of STHELAR."""
        return self.size / self.side


@dataclass(frozen=True)
class MapNuclei:
    """Nuclei (n) of a patch, in px of our patch."""

    ids: NDArray[np.int64]  # (n,) rising
    boxes: NDArray[np.float64]  # (n, 4) xyxy of the visible part, half-open
    centroids: NDArray[np.float64]  # (n, 2) of the visible part
    hidden: int  # further nuclei, of which too little is visible


def window(size: int, mpp: float, source_mpp: float) -> Window:
    """Return what a patch of `size` px of `mpp` um shows of one of STHELAR, whose pixels have `source_mpp` um.

    Raises InputError if it would show more than there is.
    """
    side = size * mpp / source_mpp
    if side > SIDE + _SLACK:
        raise InputError(
            f"got patches of {SIDE} px of {source_mpp:.4g} um ({SIDE * source_mpp:.4g} um), expected at least "
            f"{size * mpp:.4g} um, the side of our patches: lower patch.size or patch.mpp, or correct column mpp "
            "of the sheet"
        )
    side = min(side, float(SIDE))
    return Window(size, (SIDE - side) / 2, side)


def read_ids(content: bytes) -> NDArray[np.int64]:
    """Read a map of ids (SIDE, SIDE): 0 for none, else the lowest 32 bits of the id of a cell.

    The maps hold 32-bit integers, in which large ids of Xenium are negative. Raises InputError if it is no such map.
    """
    try:
        matrix = sparse.load_npz(io.BytesIO(content))
        if matrix.shape == (SIDE, SIDE):
            matrix = matrix.tocsr()
            matrix.check_format(full_check=True)  # wrong indices would be written beyond the array
    except Exception as error:  # of many kinds: zipfile, zlib, NumPy, SciPy
        raise InputError(f"cell_id_map: cannot be read ({error}); expected a sparse matrix of SciPy (.npz)") from error
    if matrix.shape != (SIDE, SIDE):
        raise InputError(f"cell_id_map: got {matrix.shape} px, expected {(SIDE, SIDE)}")
    if matrix.dtype.kind not in "iu":
        raise InputError(f"cell_id_map: got {matrix.dtype}, expected integers: ids of cells")
    return as_ids(matrix.toarray())


def as_ids(values: Any) -> NDArray[np.int64]:
    """Lowest 32 bits of integers."""
    return np.asarray(values).astype(np.int64) & 0xFFFFFFFF


def read_image(content: bytes) -> Image.Image:
    """Decode an image; InputError if it is none, or not of `SIDE` px."""
    try:
        image = Image.open(io.BytesIO(content))
        if image.size != (SIDE, SIDE):
            raise InputError(f"image: got {image.size[0]} x {image.size[1]} px, expected {SIDE} x {SIDE}")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image: cannot be decoded ({error})") from error


def cut(image: Image.Image, place: Window) -> NDArray[np.uint8]:
    """Our patch (S, S, 3) of an image of STHELAR."""
    box = (place.low, place.low, place.low + place.side, place.low + place.side)
    exact = place.size == SIDE and place.side == SIDE
    size = (place.size, place.size)
    return np.asarray(image if exact else image.resize(size, Image.Resampling.BICUBIC, box=box))


def nuclei_of(ids: NDArray[np.int64], place: Window, min_visible: float) -> MapNuclei:
    """Box the visible part of each nucleus of a map of ids (SIDE, SIDE), as slides and Xenium samples do.

    `min_visible` is the smallest share of the pixels of a nucleus in the map that must lie in the window.
    """
    y, x = np.nonzero(ids)
    present, number = np.unique(ids[y, x], return_inverse=True)
    whole = np.bincount(number, minlength=len(present))
    inside = (np.abs(x + 0.5 - SIDE / 2) < place.side / 2) & (np.abs(y + 0.5 - SIDE / 2) < place.side / 2)
    x, y, number = x[inside], y[inside], number[inside]
    area = np.bincount(number, minlength=len(present))
    shown = (area > 0) & (area >= min_visible * whole)
    low, high, middle = np.full((2, len(present)), SIDE), np.zeros((2, len(present)), int), np.zeros((2, len(present)))
    for axis, values in enumerate((x, y)):
        np.minimum.at(low[axis], number, values)
        np.maximum.at(high[axis], number, values + 1)
        middle[axis] = np.bincount(number, values + 0.5, len(present)) / np.maximum(area, 1)
    corners = np.concatenate([low, high]).T[shown]
    boxes = np.clip((corners - place.low) * place.scale, 0, place.size)
    centroids = (middle.T[shown] - place.low) * place.scale
    return MapNuclei(present[shown], boxes, centroids, int(((area > 0) & ~shown).sum()))
