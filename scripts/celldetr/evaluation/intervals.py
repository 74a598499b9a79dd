"""Bootstrap intervals of the scores: the images of a fold are resampled."""

import numpy as np
from numpy.typing import NDArray

from celldetr.evaluation.metrics import scores

_DRAWS_AT_ONCE = 1 << 22  # bounds the memory


def intervals(
    counts: NDArray[np.int64], metric: str = "strict", *, resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Compute 95 % bootstrap percentile intervals of P, R and F.

    Images are drawn with replacement and their counts summed. Nuclei of one image stay together because their errors
    are not independent. The draws depend only on the seed and the number of images, so two systems scored on the same
    fold are compared on the same resamples. Resamples in which a score is undefined do not enter its interval.

    `counts` (N, R, len(COUNTS)) are those of `celldetr.evaluation.metrics.count_images` with the same metric.
    Returns lower and upper ends (2, R, 3); NaN if the score is undefined, or without images or resamples.
    """
    n_images, n_rows, n_counts = counts.shape
    ends = np.full((2, n_rows, 3), np.nan)
    if n_images == 0 or resamples == 0:
        return ends
    rng = np.random.default_rng(seed)
    flat = counts.reshape(n_images, -1).astype(np.float64)
    sums = np.empty((resamples, flat.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // n_images)
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        draws = rng.integers(n_images, size=(some, n_images)) + n_images * np.arange(some)[:, None]
        weights = np.bincount(draws.ravel(), minlength=some * n_images).reshape(some, n_images)
        sums[start : start + some] = weights.astype(np.float64) @ flat
    values = scores(sums.reshape(resamples, n_rows, n_counts), metric)
    for row, column in np.argwhere(~np.isnan(values).all(axis=0)):
        ends[:, row, column] = np.nanpercentile(values[:, row, column], [2.5, 97.5])
    return ends
