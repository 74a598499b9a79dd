"""Pixels of a slide for pictures: the whole slide made small, and squares of it at any scale."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celldetr.runtime.errors import InputError
from celldetr.slides.cutting import read_patch
from celldetr.slides.damage import TolerantPyramid
from celldetr.slides.grid import PatchGrid
from celldetr.slides.pyramid import Pyramid


class Square(NamedTuple):
    """A square of a slide."""

    pixels: NDArray[np.uint8]
    """(S, S, 3); white outside of the slide and where it cannot be decoded."""
    corner: NDArray[np.float64]
    """First corner (2,), um from the corner of the slide."""
    mpp: float
    """um per px of `pixels`."""
    damaged: bool
    """Whether part of it cannot be decoded."""


def thumbnail(image: Pyramid, longest: int, box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    """Return a box (x0, y0, x1, y1) of the slide, px of level 0, as (H, W, 3) with at most `longest` px on a side.

    None: the whole slide.
    """
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    width, height = x1 - x0, y1 - y0
    scale = max(1.0, max(width, height) / longest)
    level = image.level_for(scale)
    down = image.levels[level].downsample
    left, top, right, bottom = round(x0 / down), round(y0 / down), round(x1 / down), round(y1 / down)
    # if the coarsest level is still large, take every n-th row and column of it
    step = max(1, int(scale / down))
    rows = [
        image.read(level, left, y, max(1, right - left), 1)[:, ::step] for y in range(top, max(bottom, top + 1), step)
    ]
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    return np.array(Image.fromarray(np.concatenate(rows)).resize(size, Image.Resampling.BILINEAR))


def read_squares(image: Pyramid, centres: NDArray[np.floating], side: float, pixels: int) -> list[Square]:
    """Read squares with `centres` (n, 2) and a side in um, each `pixels` wide, from a slide with a known pixel size."""
    mpp = side / pixels
    corners = np.rint(centres.reshape(-1, 2) / mpp - pixels / 2).astype(np.int64)
    grid = PatchGrid.bare(pixels, mpp, float(image.mpp or 0), corners)
    tolerant = TolerantPyramid(image)
    found = []
    for x, y in corners.tolist():
        try:
            square, damaged = read_patch(image, grid, x, y), False
        except InputError:
            square, damaged = read_patch(tolerant, grid, x, y), True
        found.append(Square(square, np.array([x, y]) * mpp, mpp, damaged))
    return found


def round_length(um: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20, ... um that is not above `um`: the length of a scale bar."""
    power = 10.0 ** math.floor(math.log10(um))
    return max(digit * power for digit in (1, 2, 5) if digit * power <= um * 1.0001)


def length_text(um: float) -> str:
    """Write a length for people."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"
