"""One-to-one matching of true and predicted nuclei by the distance of their centres (paper, 4.2)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of a fold, image after image.

    Attributes
    ----------
    ptr
        Nuclei of image i are ``ptr[i]:ptr[i + 1]`` (N + 1,).
    centres
        Centres (M, 2), x then y, px.
    labels
        0-based class (M,); -1 = nucleus without a label.
    """

    ptr: NDArray[np.int64]
    centres: NDArray[np.float64]
    labels: NDArray[np.integer]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if self.centres.shape != (count, 2):
            raise ValueError(f"centres: got shape {self.centres.shape}, expected ({count}, 2)")
        if self.ptr.ndim != 1 or len(self.ptr) == 0 or self.ptr[0] != 0 or self.ptr[-1] != count:
            raise ValueError(f"ptr: expected offsets from 0 to {count}, got shape {self.ptr.shape}")
        if (np.diff(self.ptr) < 0).any():
            raise ValueError("ptr: got decreasing offsets")
        if not np.isfinite(self.centres).all():
            raise ValueError(f"centres: {int((~np.isfinite(self.centres)).any(axis=1).sum())} are not finite")

    @property
    def n_images(self) -> int:
        """Images, with or without nuclei."""
        return len(self.ptr) - 1

    @property
    def image(self) -> NDArray[np.int64]:
        """Image of each nucleus (M,)."""
        return np.repeat(np.arange(self.n_images), np.diff(self.ptr))


@dataclass(frozen=True)
class Pairs:
    """Matched nuclei: `truth[k]` and `predicted[k]` (n,) index the nuclei of the fold."""

    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]


def pair_nuclei(truth: Nuclei, predicted: Nuclei, radius: float) -> Pairs:
    """Match per image: Hungarian on Euclidean centre distance between all truth and all predictions.

    Pairs farther apart than `radius` px are dropped after the assignment, not before it: a pair at exactly
    `radius` stays. So the assignment is that of HoVer-Net, in which distant nuclei can compete for the same
    partner.

    Raises
    ------
    ValueError
        Truth and predictions have different numbers of images.
    """
    if truth.n_images != predicted.n_images:
        raise ValueError(f"got {predicted.n_images} images of predictions, expected {truth.n_images}")
    rows, columns = [], []
    for t0, t1, p0, p1 in zip(truth.ptr, truth.ptr[1:], predicted.ptr, predicted.ptr[1:], strict=False):
        if t0 == t1 or p0 == p1:
            continue
        distance = cdist(truth.centres[t0:t1], predicted.centres[p0:p1])
        row, column = linear_sum_assignment(distance)
        near = distance[row, column] <= radius
        rows.append(row[near] + t0)
        columns.append(column[near] + p0)
    if not rows:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    return Pairs(np.concatenate(rows).astype(np.int64), np.concatenate(columns).astype(np.int64))
