"""Maps of nuclear stain on a grid of the Xenium frame, read piece by piece, and shifts between maps by correlation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, ndimage

from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import Floats, apply
from celldetr.xenium.registration.field import DisplacementField

_READ_SIDE = 2048  # px of a region that is read at once

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """Square samples in the um frame."""

    x: float  # corner, um
    y: float
    spacing: float  # side of a sample, um
    width: int  # samples
    height: int

    def centres(self, rows: slice, columns: slice) -> tuple[Floats, Floats]:
        """Centres of samples, um: x (1, columns) and y (rows, 1)."""
        x = self.x + (np.arange(columns.start, columns.stop) + 0.5) * self.spacing
        y = self.y + (np.arange(rows.start, rows.stop) + 0.5) * self.spacing
        return x[None, :], y[:, None]


def window(centre: Floats, side: float, spacing: float) -> Grid:
    """Grid of about `side` um around a point (2,), um."""
    count = max(round(side / spacing), 1)
    return Grid(centre[0] - count * spacing / 2, centre[1] - count * spacing / 2, spacing, count, count)


def intensity(pixels: NDArray[Any]) -> Values:
    """Square root of a single plane, so that bright nuclei do not drown the others."""
    return np.sqrt(pixels.astype(np.float32))


def colour(pixels: NDArray[np.uint8]) -> Values:
    """Colours (h, w, 3), unchanged."""
    return pixels.astype(np.float32)


def sample(
    image: Pyramid,
    grid: Grid,
    um_to_px: Floats,
    convert: Callable[[Any], Values],
    field: DisplacementField | None = None,
) -> Values:
    """Average an image over the samples of a grid: (height, width), or (height, width, k).

    `um_to_px` (3, 3) maps um of the grid's frame to level-0 px of the image. `convert` turns pixels into values (h, w)
    or (h, w, k): `hematoxylin`, `intensity` or `colour`. A `field` moves the samples before. Memory does not depend on
    the size of the image.
    """
    per_sample = grid.spacing * float(np.sqrt(abs(np.linalg.det(um_to_px[:2, :2]))))
    level = image.level_for(per_sample)
    down = image.levels[level].downsample
    ratio = per_sample / down
    step = int(np.clip(_READ_SIDE / (1.5 * ratio), 8, 512))
    rows = []
    for top in range(0, grid.height, step):
        across = slice(top, min(top + step, grid.height))
        pieces = []
        for left in range(0, grid.width, step):
            x, y = grid.centres(across, slice(left, min(left + step, grid.width)))
            x, y = (x, y) if field is None else field.over(x, y)
            px = [um_to_px[axis, 0] * x + um_to_px[axis, 1] * y + um_to_px[axis, 2] for axis in (0, 1)]
            pieces.append(_piece(image, level, px[0] / down, px[1] / down, ratio, convert))
        rows.append(np.concatenate(pieces, axis=1))
    return np.concatenate(rows, axis=0)


def _piece(image: Pyramid, level: int, x: Floats, y: Floats, ratio: float, convert: Callable[[Any], Values]) -> Values:
    """Values at positions (h, w), px of a level, averaged over `ratio` px."""
    margin = int(np.ceil(ratio)) + 2
    grid = image.levels[level]
    x0, y0 = (max(int(values.min()) - margin, -margin) for values in (x, y))
    ends = (min(int(values.max()) + margin + 2, side + margin) for values, side in ((x, grid.width), (y, grid.height)))
    width, height = (max(end - start, 1) for end, start in zip(ends, (x0, y0), strict=True))
    values = convert(image.read(level, x0, y0, width, height))
    half = 0.0
    if ratio > 1.2:
        side = round(ratio)
        values = ndimage.uniform_filter(values, (side, side, *(0,) * (values.ndim - 2)))
        # the centre of an even window lies between pixels
        half = 0.5 if side % 2 == 0 else 0.0
    positions = [y - y0 - 0.5 + half, x - x0 - 0.5 + half]
    layers = [
        ndimage.map_coordinates(layer, positions, order=1, mode="nearest")
        for layer in np.moveaxis(np.atleast_3d(values), -1, 0)
    ]
    return np.stack(layers, axis=-1) if values.ndim == 3 else layers[0]


def inside(image: Pyramid, um_to_px: Floats, points: Floats) -> NDArray[np.bool_]:
    """Mask (n,) of the points (n, 2), um, that lie inside an image."""
    px = apply(um_to_px, points)
    return np.asarray(np.all((px >= 0) & (px < np.array(image.size)), axis=1))


def band(values: Values, fine: float = 1.0, wide: float = 8.0) -> Values:
    """Band-pass a map (difference of Gaussians, samples) to suppress noise and gradients; scale to unit deviation."""
    low, high = np.percentile(values, [0.5, 99.5])
    clipped = np.clip(values, low, high)
    kept = ndimage.gaussian_filter(clipped, fine) - ndimage.gaussian_filter(clipped, wide)
    deviation = kept.std()
    return np.asarray(kept / deviation if deviation > 0 else kept)


def match_blocks(fixed: Values, moving: Values) -> tuple[Floats, Floats]:
    """Find each block in a larger block around the same place by normalised cross-correlation.

    `fixed` are blocks (n, b, b), `moving` blocks (n, b + 2 r, b + 2 r) with the same centres. Returns shifts (n, 2), x
    and y in (fractions of) samples: point p of `fixed` lies at p + shift in `moving`; and scores (n,) from 0 to 1:
    correlation at the peak, times how clearly the peak beats distant places.
    """
    side = fixed.shape[1]
    reach = (moving.shape[1] - side) // 2
    template = fixed - fixed.mean(axis=(1, 2), keepdims=True)
    shape = [fft.next_fast_len(moving.shape[1], real=True)] * 2
    ahead = fft.rfft2(moving, shape)
    product = fft.irfft2(ahead * np.conj(fft.rfft2(template, shape)), shape)
    valid = slice(0, 2 * reach + 1)
    product = product[:, valid, valid]
    energy = _window_sums(moving.astype(np.float64) ** 2, side) - _window_sums(moving, side) ** 2 / side**2
    norm = np.sqrt(np.maximum(energy, 1e-12) * (template.astype(np.float64) ** 2).sum(axis=(1, 2))[:, None, None])
    correlation = np.where(norm > 1e-3, product / np.maximum(norm, 1e-3), 0)
    shifts, score = np.empty((len(fixed), 2)), np.empty(len(fixed))
    for index, surface in enumerate(correlation):
        row, column = np.unravel_index(surface.argmax(), surface.shape)
        shifts[index] = _vertex(surface, int(row), int(column)) - reach
        score[index] = max(surface.max(), 0) * _clarity(surface, int(row), int(column))
    return shifts, score


def _window_sums(values: NDArray[np.floating], side: int) -> Floats:
    """Sum over all windows of a side: (n, B, B) -> (n, B - side + 1, B - side + 1)."""
    total = np.pad(values.astype(np.float64).cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    lower, upper = total[:, side:], total[:, :-side]
    return np.asarray(lower[:, :, side:] - upper[:, :, side:] - lower[:, :, :-side] + upper[:, :, :-side])


def _vertex(surface: Floats, row: int, column: int) -> Floats:
    """Position (x, y) of a peak between samples; that of a peak at the edge is the sample."""
    position = np.array([column, row], dtype=np.float64)
    for axis, (index, line) in enumerate(((column, surface[row]), (row, surface[:, column]))):
        if 0 < index < len(line) - 1:
            position[axis] += peak_offset(*line[index - 1 : index + 2])
    return position


def peak_offset(before: ArrayLike, here: ArrayLike, after: ArrayLike) -> Floats:
    """Offset of a maximum from the middle one of three samples, by a parabola; -0.5 to 0.5."""
    before, here, after = (np.asarray(values) for values in (before, here, after))
    bend = np.minimum(before - 2 * here + after, -1e-9)
    return np.asarray(np.clip((before - after) / (2 * bend), -0.5, 0.5))


def _clarity(surface: Floats, row: int, column: int) -> float:
    """Share, 0 to 1, by which the peak exceeds all distant values; a peak at the edge of the search counts a tenth."""
    peak = surface[row, column]
    if peak <= 0:
        return 0.0
    if len(surface) <= 7:  # nothing is distant
        return 1.0
    others = surface.copy()
    others[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4] = -1
    second = max(float(others.max()), 0.0)
    edge = row in (0, len(surface) - 1) or column in (0, len(surface) - 1)
    return float((1 - second / peak) * (0.1 if edge else 1.0))
