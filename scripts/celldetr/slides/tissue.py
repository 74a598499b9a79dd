"""Where the tissue is on a slide, from a few micrometres per pixel: glass, dust and pen marks are told apart by colour.

Colour is compared as optical density, -ln(value / white). Haematoxylin and eosin both absorb green most, so that tissue
has a spread between its channels; glass, shadows and cover-slip edges have none.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid

CELL_UM = 8.0
"""Size of a cell of the map, about; a nucleus is as large, and blur of the focus is not seen."""
_BLOCK = 4096  # px; side of what is read at once
_SPREAD = (0.04, 0.06)  # smallest and largest threshold: an empty slide has no tissue, a full one is all tissue
_GLASS = (200.0, 12.0)  # cells are glass if as bright as this, their channels as alike
_GLASS_SHARE = 1e-3  # of all cells, from which on they tell the white of the slide
_SMALLEST_UM2 = 2000.0  # pieces and holes below are dust and lumina
_PEN_RIM = 3  # cells around a pen mark that it shades
_GAP_UM = 200.0  # half the width of a blank gap between fields of view that is no gap


@dataclass(frozen=True)
class Raster:
    """A map over an image.

    Attributes
    ----------
    inside
        (H, W) bool. Cell (row, column) covers level-0 px [column, column + 1) x [row, row + 1) times `cell`.
    cell
        Side of a cell in level-0 px.
    mpp
        Side of a cell in um.
    """

    inside: NDArray[np.bool_]
    cell: float
    mpp: float

    def share(self, corners: NDArray[np.floating], side: float) -> NDArray[np.float64]:
        """Share of squares that is inside, exact to fractions of a cell.

        Parameters
        ----------
        corners
            (N, 2) x, y of their first corners, level-0 px.
        side
            Their side, level-0 px.
        """
        height, width = self.inside.shape
        integral = np.zeros((height + 1, width + 1))
        integral[1:, 1:] = self.inside.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
        low = np.asarray(corners, dtype=np.float64) / self.cell
        high = low + side / self.cell

        def upto(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
            at = [np.clip(y, 0, height), np.clip(x, 0, width)]
            found: NDArray[np.float64] = ndimage.map_coordinates(integral, at, order=1, mode="nearest")
            return found

        area = upto(high[:, 0], high[:, 1]) - upto(low[:, 0], high[:, 1])
        area += upto(low[:, 0], low[:, 1]) - upto(high[:, 0], low[:, 1])
        return np.clip(area * (self.cell / side) ** 2, 0, 1)


def tissue_mask(image: Pyramid, mpp: float) -> Raster:
    """Find the tissue; memory does not grow with the image but by its map.

    Parameters
    ----------
    image
        Colour image.
    mpp
        Size of a level-0 pixel in um.

    Raises
    ------
    InputError
        The image has a single channel, or is smaller than a cell.
    """
    if image.channels != 3:
        raise InputError(f"{image.path}: got an image of one channel, expected colour (H&E)")
    level = image.level_for(CELL_UM / mpp)
    downsample = image.levels[level].downsample
    factor = max(1, round(CELL_UM / mpp / downsample))
    colours = cell_means(image, level, factor)
    if not colours.size:
        raise InputError(f"{image.path}: got {image.size} px of {mpp} um, expected at least {CELL_UM} um each way")
    cell = factor * downsample
    return Raster(_find(colours, cell * mpp), cell, cell * mpp)


def cell_means(image: Pyramid, level: int, factor: int) -> NDArray[np.float32]:
    """Mean colour (H, W, 3), or value (H, W, 1), of cells of `factor` x `factor` px of a level, read block by block."""
    grid = image.levels[level]
    across, down = grid.width // factor, grid.height // factor
    means = np.empty((down, across, image.channels), np.float32)
    step = max(1, _BLOCK // factor)
    for row in range(0, down, step):
        for column in range(0, across, step):
            rows, columns = min(step, down - row), min(step, across - column)
            pixels = image.read(level, column * factor, row * factor, columns * factor, rows * factor)
            shape = (rows, factor, columns, factor, image.channels)
            means[row : row + rows, column : column + columns] = pixels.reshape(shape).mean(
                axis=(1, 3), dtype=np.float32
            )
    return means


def _find(colours: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """Tissue among cells of mean colours (H, W, 3) that are `mpp` um wide."""
    white = _white(colours.reshape(-1, 3))
    density = -np.log(np.clip(colours, 1, None) / white)
    pen = ndimage.binary_dilation(_pen(density), iterations=_PEN_RIM)
    smooth = ndimage.gaussian_filter(density, (1, 1, 0))
    spread = smooth.max(axis=-1) - smooth.min(axis=-1)
    stained = ~pen & (spread > _threshold(spread[~pen]))
    smallest = _SMALLEST_UM2 / mpp**2
    stained = _without_small(stained, smallest)
    return ~_without_small(~stained, smallest) & ~pen


def _white(colours: NDArray[np.float32]) -> NDArray[np.floating]:
    """Colour of the glass (3,): the median of the bright cells without colour, which a few ringing ones cannot move."""
    glass = colours[(colours.min(axis=1) >= _GLASS[0]) & (np.ptp(colours, axis=1) <= _GLASS[1])]
    return np.median(glass, axis=0) if len(glass) > _GLASS_SHARE * len(colours) else np.full(3, 255.0)


def _threshold(spread: NDArray[np.floating]) -> float:
    """Threshold between glass and tissue; the lowest when even the paler half of the cells is tissue."""
    if not spread.size:
        return _SPREAD[1]
    threshold = _otsu(spread)
    lowest, highest = _SPREAD
    pale = spread[spread <= threshold]
    return lowest if pale.mean() > lowest else float(np.clip(threshold, lowest, highest))


def _pen(density: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Blue, green and black ink (H, W): absorbs red more than green, or everything."""
    red, green = density[..., 0], density[..., 1]
    most, least = density.max(axis=-1), density.min(axis=-1)
    coloured = red > 1.15 * green + 0.12
    black = (least > 1.0) & (most - least < 0.35 * most)
    return ndimage.binary_opening(coloured | black, structure=np.ones((2, 2)))


def _otsu(values: NDArray[np.floating], bins: int = 256) -> float:
    """Threshold between two groups of values (Otsu 1979): the variance between them is largest there."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1 + int(np.nanargmax(np.where(above > 0, between, 0)))])


def _without_small(mask: NDArray[np.bool_], smallest: float) -> NDArray[np.bool_]:
    """Mask without its 4-connected pieces of fewer than `smallest` cells."""
    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= smallest
    large[0] = False
    return large[pieces]


def imaged(other: Pyramid, pixel: float, raster: Raster, to_other: NDArray[np.floating]) -> Raster:
    """Find where another image of the same section has been taken: where it covers the raster and is not blank.

    A microscope that images fields of view leaves the fields that it skips at exactly 0. Blank gaps of less than
    0.4 mm are dark background inside a field.

    Parameters
    ----------
    other
        Image of one channel (DAPI).
    pixel
        Size of its level-0 pixel in um.
    raster
        The grid to fill.
    to_other
        (3, 3) matrix: level-0 pixel of the raster's image -> level-0 pixel of the other.
    """
    level = other.level_for(CELL_UM / pixel)
    factor = max(1, round(CELL_UM / pixel / other.levels[level].downsample))
    cell = factor * other.levels[level].downsample
    taken = _closed(cell_means(other, level, factor)[..., 0] > 0, _GAP_UM / (cell * pixel))
    inside = np.zeros_like(raster.inside)
    columns = (np.arange(inside.shape[1]) + 0.5) * raster.cell
    for row in range(len(inside)):
        points = to_other[:2, :2] @ np.stack([columns, np.full_like(columns, (row + 0.5) * raster.cell)])
        x, y = np.floor((points + to_other[:2, 2:]) / cell).astype(np.int64)
        there = (x >= 0) & (y >= 0) & (x < taken.shape[1]) & (y < taken.shape[0])
        inside[row, there] = taken[y[there], x[there]]
    return Raster(inside, raster.cell, raster.mpp)


def _closed(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Close gaps of less than twice `radius` cells; the rim of the map does not count as a gap."""
    if mask.all() or not mask.any():
        return mask
    pad = int(np.ceil(radius)) + 1
    wide = np.pad(mask, pad, mode="edge")
    grown = ndimage.distance_transform_edt(~wide) <= radius
    closed = ndimage.distance_transform_edt(grown) > radius if not grown.all() else grown
    found: NDArray[np.bool_] = closed[pad:-pad, pad:-pad] | mask
    return found
