"""One-to-one matching of true and predicted nuclei by the distance of their centres (paper, 4.2)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


@dataclass(frozen=True)
class NucleusCentres:
    """Centres and labels of the nuclei of a fold, image by image."""

    ptr: NDArray[np.int64]  # the nuclei of image i are ptr[i]:ptr[i + 1] (N + 1,)
    centres: NDArray[np.float64]  # (M, 2) x then y, px
    labels: NDArray[np.integer]  # 0-based class (M,); -1 = unlabelled nucleus

    def __post_init__(self) -> None:
        assert self.centres.shape == (len(self.labels), 2)
        assert self.ptr[-1] == len(self.labels)

    @property
    def n_images(self) -> int:
        """Number of images, including images without nuclei."""
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


def pair_nuclei(truth: NucleusCentres, predicted: NucleusCentres, radius: float) -> Pairs:
    """Match each image by the Hungarian algorithm on the distances between all true and predicted centres.

    Pairs more than `radius` px apart are dropped after the assignment, not before, as HoVer-Net does: distant nuclei
    can compete for the same partner. A pair at exactly `radius` is kept.
    """
    assert truth.n_images == predicted.n_images
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for t0, t1, p0, p1 in zip(truth.ptr, truth.ptr[1:], predicted.ptr, predicted.ptr[1:], strict=False):
        distance = cdist(truth.centres[t0:t1], predicted.centres[p0:p1])
        row, column = linear_sum_assignment(distance)
        near = distance[row, column] <= radius
        rows.append(row[near] + t0)
        columns.append(column[near] + p0)
    return Pairs(np.concatenate(rows), np.concatenate(columns))
