"""Where the tissue is on a slide, found by colour at a few micrometres per pixel.

Colours are compared as optical density, -ln(value / white). Hematoxylin and eosin absorb mostly green, so the channels
of tissue differ; those of glass, shadows and cover-slip edges do not. Pen marks absorb red, or everything.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid

CELL_UM = 8.0
"""Approximate side of a cell of the map: that of a nucleus, and large enough that poor focus does not matter."""
_BLOCK = 4096  # px; side of a region that is read at once
_SPREAD = (0.04, 0.06)  # smallest and largest threshold: an empty slide has no tissue, a full one is all tissue
_GLASS = (200.0, 12.0)  # least brightness and largest difference of the channels of glass
_GLASS_SHARE = 1e-3  # fraction of cells that must be glass to measure its colour
_SMALLEST_UM2 = 2000.0  # smaller pieces are dust, smaller holes are lumina
_PEN_RIM = 3  # cells around a pen mark that it shades
_GAP_UM = 200.0  # blank gaps between fields of view that are narrower than twice this are closed


@dataclass(frozen=True)
class Raster:
    """A yes-or-no map of an image."""

    inside: NDArray[np.bool_]
    """(H, W). Cell (row, column) covers level-0 px [column, column + 1) x [row, row + 1) times `cell`.

    The last row and column may reach beyond the image.
    """
    cell: float
    """Side of a cell, level-0 px."""
    mpp: float
    """Side of a cell, um."""

    def share(self, corners: NDArray[np.floating], side: float) -> NDArray[np.float64]:
        """Fraction (N,) of each square that is inside, for first corners (N, 2) and a side in level-0 px."""
        height, width = self.inside.shape
        integral = self._integral()
        low = np.asarray(corners, dtype=np.float64) / self.cell
        high = low + side / self.cell

        def upto(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
            at = [np.clip(y, 0, height), np.clip(x, 0, width)]
            found: NDArray[np.float64] = ndimage.map_coordinates(integral, at, order=1, mode="nearest")
            return found

        area = upto(high[:, 0], high[:, 1]) - upto(low[:, 0], high[:, 1])
        area += upto(low[:, 0], low[:, 1]) - upto(high[:, 0], low[:, 1])
        return np.clip(area * (self.cell / side) ** 2, 0, 1)

    def touches(self, boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Whether boxes (N, 4), xyxy in level-0 px, touch a cell that is inside."""
        limits = np.array(self.inside.shape[::-1])
        x0, y0 = np.clip(np.floor(boxes[:, :2] / self.cell), 0, limits - 1).astype(int).T
        x1, y1 = np.clip(np.ceil(boxes[:, 2:] / self.cell), [[1, 1]], limits).astype(int).T
        sums = self._integral()
        return np.asarray(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0] > 0)

    def _integral(self) -> NDArray[np.float64]:
        """Sum the cells above and to the left of each corner of a cell: (H + 1, W + 1)."""
        found: NDArray[np.float64] = np.pad(self.inside, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64).cumsum(1)
        return found


def tissue_mask(image: Pyramid, mpp: float) -> Raster:
    """Find the tissue of a colour image, see `tissue_maps`."""
    return tissue_maps(image, mpp)[0]


def tissue_maps(image: Pyramid, mpp: float) -> tuple[Raster, Raster]:
    """Find the tissue of a colour image with level-0 pixels of `mpp` um; the image is read block by block.

    Returns the tissue, and the cells of the map with any stain, in which alone a nucleus can lie: thin walls of fat and
    shreds are stained and too small to be tissue; lumina and the rim of the tissue, which is smooth, have no stain.

    Raises
    ------
    InputError
        The image is not in colour, or is smaller than a cell.
    """
    if image.channels != 3:
        raise InputError(f"{image.path}: got an image with one channel, expected colour (H&E)")
    colours, cell = _cell_means(image, mpp)
    if not colours.size:
        raise InputError(
            f"{image.path}: got {image.size} px of {mpp} um, expected at least {CELL_UM} um in each direction"
        )
    # what lies beyond the last whole cell has the colour of that cell
    counts = zip(image.size, colours.shape[1::-1], strict=True)
    right, below = (max(0, int(np.ceil(side / cell)) - count) for side, count in counts)
    colours = np.pad(colours, ((0, below), (0, right), (0, 0)), mode="edge")
    tissue, stained = _find(colours, cell * mpp)
    return Raster(tissue, cell, cell * mpp), Raster(stained, cell, cell * mpp)


def _cell_means(image: Pyramid, mpp: float) -> tuple[NDArray[np.float32], float]:
    """Average over whole cells of about `CELL_UM`: means (H, W, channels), and the side of a cell in level-0 px."""
    level = image.level_for(CELL_UM / mpp)
    grid = image.levels[level]
    factor = max(1, round(CELL_UM / mpp / grid.downsample))
    across, down = grid.width // factor, grid.height // factor
    means = np.empty((down, across, image.channels), np.float32)
    step = max(1, _BLOCK // factor)
    for row in range(0, down, step):
        for column in range(0, across, step):
            rows, columns = min(step, down - row), min(step, across - column)
            pixels = image.read(level, column * factor, row * factor, columns * factor, rows * factor)
            # along whole rows first, in small integers: many times as fast as a mean over both axes
            narrow = pixels.dtype == np.uint8 and factor <= 257
            sums = pixels.reshape(rows, factor, -1).sum(axis=1, dtype=np.uint16 if narrow else np.uint64)
            sums = sums.reshape(rows, columns, factor, image.channels).sum(axis=2, dtype=np.float64)
            means[row : row + rows, column : column + columns] = sums / factor**2
    return means, factor * grid.downsample


def _find(colours: NDArray[np.float32], mpp: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tissue, and stained cells, (H, W) each, in a map of mean colours (H, W, 3) with cells of `mpp` um."""
    white = _white(colours.reshape(-1, 3))
    density = -np.log(np.clip(colours, 1, None) / white)
    pen = ndimage.binary_dilation(_pen(density), iterations=_PEN_RIM)
    smooth = ndimage.gaussian_filter(density, (1, 1, 0))
    spread = smooth.max(axis=-1) - smooth.min(axis=-1)
    smallest = min(_SMALLEST_UM2 / mpp**2, spread.size / 2)  # all of an image may be smaller
    stained = _without_small(~pen & (spread > _threshold(spread[~pen])), smallest)
    tissue = ~_without_small(~stained, smallest) & ~pen
    return tissue, np.ptp(density, axis=-1) > _SPREAD[0]


def _white(colours: NDArray[np.float32]) -> NDArray[np.floating]:
    """Colour (3,) of the glass: the median of bright cells without colour, robust to a few artefacts."""
    glass = colours[(colours.min(axis=1) >= _GLASS[0]) & (np.ptp(colours, axis=1) <= _GLASS[1])]
    return np.median(glass, axis=0) if len(glass) > _GLASS_SHARE * len(colours) else np.full(3, 255.0)


def _threshold(spread: NDArray[np.floating]) -> float:
    """Threshold between glass and tissue; the lowest if even the paler cells are tissue."""
    if not spread.size:
        return _SPREAD[1]
    threshold = _otsu(spread)
    pale = spread[spread <= threshold]
    return _SPREAD[0] if pale.mean() > _SPREAD[0] else float(np.clip(threshold, *_SPREAD))


def _pen(density: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Blue, green and black ink (H, W), which absorbs red more than green, or everything."""
    red, green = density[..., 0], density[..., 1]
    most, least = density.max(axis=-1), density.min(axis=-1)
    coloured = red > 1.15 * green + 0.12
    black = (least > 1.0) & (most - least < 0.35 * most)
    return ndimage.binary_opening(coloured | black, structure=np.ones((2, 2)))


def _otsu(values: NDArray[np.floating], bins: int = 256) -> float:
    """Threshold at which the variance between two groups of values is largest (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1 + int(np.nanargmax(np.where(above > 0, between, 0)))])


def _without_small(mask: NDArray[np.bool_], smallest: float) -> NDArray[np.bool_]:
    """Remove 4-connected pieces of fewer than `smallest` cells from a mask."""
    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= smallest
    large[0] = False
    return large[pieces]


def imaged(other: Pyramid, pixel: float, raster: Raster, to_other: NDArray[np.floating]) -> Raster:
    """Find the area that another image of the same section covers and in which it is not blank.

    Fields of view that the microscope skipped are exactly 0. Blank gaps narrower than 0.4 mm are dark background.

    Parameters
    ----------
    other, pixel
        Image with one channel (DAPI), and the size of its level-0 pixels in um.
    raster
        Map whose cells are used.
    to_other
        (3, 3) affine from level-0 pixels of the raster's image to those of the other image.
    """
    values, cell = _cell_means(other, pixel)
    taken = _closed(values[..., 0] > 0, _GAP_UM / (cell * pixel))
    inside = np.zeros_like(raster.inside)
    columns = (np.arange(inside.shape[1]) + 0.5) * raster.cell
    for row in range(len(inside)):
        points = to_other[:2, :2] @ np.stack([columns, np.full_like(columns, (row + 0.5) * raster.cell)])
        x, y = np.floor((points + to_other[:2, 2:]) / cell).astype(np.int64)
        there = (x >= 0) & (y >= 0) & (x < taken.shape[1]) & (y < taken.shape[0])
        inside[row, there] = taken[y[there], x[there]]
    return Raster(inside, raster.cell, raster.mpp)


def _closed(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Close gaps narrower than twice `radius` cells; the area beyond the map is not a gap."""
    if mask.all() or not mask.any():
        return mask
    pad = int(np.ceil(radius)) + 1
    wide = np.pad(mask, pad, mode="edge")
    grown = ndimage.distance_transform_edt(~wide) <= radius
    closed = ndimage.distance_transform_edt(grown) > radius if not grown.all() else grown
    found: NDArray[np.bool_] = closed[pad:-pad, pad:-pad] | mask
    return found
