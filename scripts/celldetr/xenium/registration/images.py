"""Maps of nuclear stain on a grid of the Xenium frame, read from gigapixel images piece by piece."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.transform import apply

# Optical density of hematoxylin, of eosin, and of what is left (Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23)
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_SIDE = 2048  # px of a region that is read at once
_VOID = 8  # pixels darker than this in all colours are no tissue but filling

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """Square samples in a frame of um: sample (row, column) covers `spacing` um from the corner on.

    Attributes
    ----------
    x, y
        Corner, um.
    spacing
        Side of a sample, um.
    width, height
        Samples.
    """

    x: float
    y: float
    spacing: float
    width: int
    height: int

    def centres(self, rows: slice, columns: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of samples, um: x (1, columns) and y (rows, 1)."""
        x = self.x + (np.arange(columns.start, columns.stop) + 0.5) * self.spacing
        y = self.y + (np.arange(rows.start, rows.stop) + 0.5) * self.spacing
        return x[None, :], y[:, None]


def window(centre: NDArray[np.float64], side: float, spacing: float) -> Grid:
    """Grid of about `side` um around a place (2,) um."""
    count = max(round(side / spacing), 1)
    return Grid(centre[0] - count * spacing / 2, centre[1] - count * spacing / 2, spacing, count, count)


def _hematoxylin_tables() -> NDArray[np.float32]:
    """Contribution (3, 256) of each value of each colour to hematoxylin."""
    stains = _STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)
    share = np.linalg.inv(stains)[:, 0]
    density = -np.log10((np.arange(256) + 1.0) / 256)
    return (share[:, None] * density).astype(np.float32)


_TABLES = _hematoxylin_tables()


def hematoxylin(pixels: NDArray[np.uint8]) -> Values:
    """Hematoxylin (h, w), in optical density, of an H&E image (h, w, 3) by colour deconvolution; never negative."""
    amount: Values = sum(table[pixels[..., colour]] for colour, table in enumerate(_TABLES))
    red, green, blue = np.moveaxis(pixels, -1, 0)
    amount[np.maximum(np.maximum(red, green), blue) < _VOID] = 0
    return np.maximum(amount, 0)


def intensity(pixels: NDArray[Any]) -> Values:
    """Root of the values of a single plane: bright nuclei do not drown the others."""
    return np.sqrt(pixels.astype(np.float32))


def colour(pixels: NDArray[np.uint8]) -> Values:
    """Colours (h, w, 3) as they are."""
    return pixels.astype(np.float32)


def sample(image: Pyramid, grid: Grid, um_to_px: NDArray[np.float64], convert: Callable[[Any], Values]) -> Values:
    """Average an image over the samples of a grid.

    Parameters
    ----------
    image
        H&E or DAPI.
    grid
        Where, um.
    um_to_px
        (3, 3), um of the grid's frame -> level-0 px of the image.
    convert
        Pixels -> values (h, w) or (h, w, k): `hematoxylin`, `intensity` or `colour`.

    Returns
    -------
    NDArray
        (height, width) or (height, width, k). Memory does not depend on the size of the image.
    """
    per_sample = grid.spacing * float(np.sqrt(abs(np.linalg.det(um_to_px[:2, :2]))))
    level = image.level_for(per_sample)
    down = image.levels[level].downsample
    ratio = per_sample / down
    step = int(np.clip(_SIDE / (1.5 * ratio), 8, 512))
    rows = []
    for top in range(0, grid.height, step):
        across = slice(top, min(top + step, grid.height))
        pieces = []
        for left in range(0, grid.width, step):
            x, y = grid.centres(across, slice(left, min(left + step, grid.width)))
            px = [um_to_px[axis, 0] * x + um_to_px[axis, 1] * y + um_to_px[axis, 2] for axis in (0, 1)]
            pieces.append(_piece(image, level, px[0] / down, px[1] / down, ratio, convert))
        rows.append(np.concatenate(pieces, axis=1))
    return np.concatenate(rows, axis=0)


def _piece(
    image: Pyramid,
    level: int,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    ratio: float,
    convert: Callable[[Any], Values],
) -> Values:
    """Values at places (h, w), px of a level, averaged over `ratio` px."""
    margin = int(np.ceil(ratio)) + 2
    grid = image.levels[level]
    x0, x1 = max(int(x.min()) - margin, -margin), min(int(x.max()) + margin + 2, grid.width + margin)
    y0, y1 = max(int(y.min()) - margin, -margin), min(int(y.max()) + margin + 2, grid.height + margin)
    if x0 >= x1 or y0 >= y1:
        one = np.full((1, 1, 3) if image.channels == 3 else (1, 1), image.background, dtype=image.dtype)
        values = convert(one)
        return np.broadcast_to(values, (*x.shape, *values.shape[2:])).astype(np.float32)
    values = convert(image.read(level, x0, y0, x1 - x0, y1 - y0))
    if ratio > 1.2:
        values = ndimage.uniform_filter(values, (round(ratio), round(ratio), *(0,) * (values.ndim - 2)))
        # an even window has its centre between pixels
        half = 0.5 if round(ratio) % 2 == 0 else 0.0
    else:
        half = 0.0
    places = [y - y0 - 0.5 + half, x - x0 - 0.5 + half]
    if values.ndim == 2:
        found: Values = ndimage.map_coordinates(values, places, order=1, mode="nearest")
        return found
    layers = [ndimage.map_coordinates(layer, places, order=1, mode="nearest") for layer in np.moveaxis(values, -1, 0)]
    return np.stack(layers, axis=-1)


def inside(image: Pyramid, um_to_px: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points (n, 2) um lie inside an image."""
    px = apply(um_to_px, points)
    within: NDArray[np.bool_] = np.all((px >= 0) & (px < np.array(image.size)), axis=1)
    return within
