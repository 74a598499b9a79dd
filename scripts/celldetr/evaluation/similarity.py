"""Similarity matrices of figure 4c, and the choice of their patches."""

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from celldetr.runtime.files import read_npz

READABLE = (6, 40)
"""Nuclei of a patch that make a readable heat map."""


@dataclass(frozen=True)
class DrawnSimilarities:
    """Cosine similarity of the anchors of P patches to all originals of their patch.

    Row i, column j of `similarity`: the anchor of nucleus i and the original of nucleus j, in [-1, 1]; NaN from n on.
    """

    patch: NDArray[np.int64]  # index in the store (P,)
    counts: NDArray[np.int64]  # nuclei n of each patch (P,)
    similarity: NDArray[np.float32]  # (P, N, N)

    def __len__(self) -> int:
        return len(self.patch)


def choose_readable(box_ptr: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose random patches with at least two nuclei by the offsets (N + 1,) of their nuclei.

    Those that make a readable heat map come first. Returns ascending indices (at most `count`,).
    """
    sizes = np.diff(box_ptr)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes >= 2))
    readable = (sizes[order] >= READABLE[0]) & (sizes[order] <= READABLE[1])
    return np.asarray(np.sort(order[np.argsort(~readable, kind="stable")][:count]), dtype=np.int64)


def read_similarities(path: str | os.PathLike[str]) -> DrawnSimilarities:
    """Read the file that `celldetr.runtime.files.write_npz` made of `DrawnSimilarities`."""
    return DrawnSimilarities(**read_npz(path, DrawnSimilarities, "similarity"))
