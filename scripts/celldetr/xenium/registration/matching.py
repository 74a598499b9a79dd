"""Shifts between maps by normalised cross-correlation, block by block."""

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Values = NDArray[np.float32]


def band(values: Values, fine: float = 1.0, wide: float = 8.0) -> Values:
    """Keep what is between two sizes (samples), so that gradients and noise do not count; scaled to unit deviation."""
    low, high = np.percentile(values, [0.5, 99.5])
    clipped = np.clip(values, low, high)
    kept = ndimage.gaussian_filter(clipped, fine) - ndimage.gaussian_filter(clipped, wide)
    deviation = kept.std()
    scaled: Values = kept / deviation if deviation > 0 else kept
    return scaled


def match_blocks(fixed: Values, moving: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find each block in a larger block around the same place.

    Parameters
    ----------
    fixed
        Blocks (n, b, b).
    moving
        Blocks (n, b + 2 r, b + 2 r) with the same centres.

    Returns
    -------
    shifts
        (n, 2) x and y in samples: what is at p in `fixed` is at p + shift in `moving`; to a fraction of a sample.
    score
        (n,) trust from 0 to 1: the correlation at that place, times how clearly it beats places that are not near.
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
    count = len(fixed)
    flat = correlation.reshape(count, -1).argmax(axis=1)
    row, column = np.divmod(flat, 2 * reach + 1)
    peak = correlation.reshape(count, -1)[np.arange(count), flat]
    score = np.empty(count)
    shifts = np.empty((count, 2))
    for index in range(count):
        shifts[index] = _vertex(correlation[index], row[index], column[index]) - reach
        score[index] = max(peak[index], 0) * _clarity(correlation[index], row[index], column[index], peak[index])
    return shifts, score


def _window_sums(values: NDArray[np.floating], side: int) -> NDArray[np.float64]:
    """Sum over all windows of a side: (n, B, B) -> (n, B - side + 1, B - side + 1)."""
    total = np.pad(values.astype(np.float64).cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    sums: NDArray[np.float64] = (
        total[:, side:, side:] - total[:, :-side, side:] - total[:, side:, :-side] + total[:, :-side, :-side]
    )
    return sums


def _vertex(surface: NDArray[np.float64], row: int, column: int) -> NDArray[np.float64]:
    """Place (x, y) of a peak between samples, by parabolas."""
    place = []
    for index, line in ((column, surface[row]), (row, surface[:, column])):
        offset = 0.0
        if 0 < index < len(line) - 1:
            before, here, after = line[index - 1 : index + 2]
            bend = before - 2 * here + after
            offset = float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0
        place.append(index + offset)
    return np.array(place)


def _clarity(surface: NDArray[np.float64], row: int, column: int, peak: float) -> float:
    """How far a peak is above all that is not next to it: 0 to 1; a peak at the edge of the search counts little."""
    if peak <= 0:
        return 0.0
    others = surface.copy()
    others[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4] = -1
    second = max(float(others.max()), 0.0)
    edge = row in (0, len(surface) - 1) or column in (0, len(surface) - 1)
    return (1 - second / peak) * (0.1 if edge and len(surface) > 1 else 1.0) if len(surface) > 7 else 1.0
