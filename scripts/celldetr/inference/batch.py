"""What a batch of images becomes on the host: the nuclei found in it, and given nuclei in groups that fit memory."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from celldetr.model.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from celldetr.runtime.errors import InputError

MOST_PAIRS = 1 << 24
"""Pairs of nuclei, with padding, in the self-attention of given boxes at a time."""

Boxes = Sequence[NDArray[np.floating]]
"""For each image the boxes (n, 4) of its nuclei; n = 0 is legal."""


class FoundNuclei(NamedTuple):
    """The N nuclei found in a batch, image after image."""

    image: NDArray[np.int64]
    """Index of the image in the batch (N,)."""
    query: NDArray[np.int64]
    """Query that found it (N,)."""
    boxes: NDArray[np.float32]
    """(N, 4) xyxy px; a box may reach beyond the image."""
    nucleus_score: NDArray[np.float32]
    """(N,) in [0, 1]."""
    class_scores: NDArray[np.float32]
    """(N, K) in [0, 1]; K = 0 if not represented."""
    embeddings: NDArray[np.float32]
    """(N, C); C = 0 in mode ``baseline``, or if not represented."""


class GivenNuclei(NamedTuple):
    """The M nuclei in given boxes, image after image, in the order in which they were given."""

    class_scores: NDArray[np.float32]
    """(M, K) in [0, 1]; K = 0 without classes."""
    embeddings: NDArray[np.float32]
    """(M, C)."""


class Chosen(NamedTuple):
    """The N queries that found a nucleus, image after image."""

    image: NDArray[np.int64]
    query: NDArray[np.int64]
    rows: NDArray[np.float32]
    """(N, 5 + more): box, cxcywh in [0, 1], nucleus score, and what else the model says of a query."""

    @classmethod
    def of(cls, rows: NDArray[np.float32], nucleus_threshold: float) -> "Chosen":
        """Choose among all queries (B, Q, 5 + more); a score that is not a number is kept, so that it is seen."""
        image, query = np.nonzero(~(rows[..., 4] < np.float32(nucleus_threshold)))
        return cls(image, query, rows[image, query])

    def boxes(self, images: int) -> list[NDArray[np.float32]]:
        """Boxes of each image, cxcywh in [0, 1]."""
        return np.split(self.rows[:, :4], np.searchsorted(self.image, np.arange(1, images)))

    def nuclei(self, class_scores: NDArray[np.float32], embeddings: NDArray[np.float32], side: int) -> FoundNuclei:
        """Nuclei in images with a `side` (px) with their class scores (N, K) and embeddings (N, C)."""
        boxes = (cxcywh_to_xyxy(torch.from_numpy(self.rows[:, :4])) * side).numpy()
        return FoundNuclei(self.image, self.query, boxes, self.rows[:, 4], class_scores, embeddings)


class Group(NamedTuple):
    """Given nuclei of some images of a batch, padded to the same number R."""

    images: NDArray[np.int64]
    """Their indices in the batch (b,)."""
    boxes: NDArray[np.float32]
    """(b, R, 4) cxcywh in [0, 1]; zero at padding."""
    real: NDArray[np.bool_]
    """(b, R), False at padding."""


def normalised(boxes: Boxes, side: int) -> list[NDArray[np.float32]]:
    """Turn boxes, xyxy px of images with a `side`, into cxcywh in [0, 1]."""
    corners = np.concatenate([np.empty((0, 4), np.float32), *boxes]).astype(np.float32)
    found: NDArray[np.float32] = (xyxy_to_cxcywh(torch.from_numpy(corners)) / side).numpy()
    return np.split(found, np.cumsum([len(values) for values in boxes])[:-1])


def grouped(boxes: Boxes) -> list[Group]:
    """Group the images of a batch that have nuclei; each group is padded to its largest.

    Groups are small if there are thousands of nuclei in an image, as self-attention takes memory for each pair.
    """
    counts = np.array([len(values) for values in boxes])
    order = np.argsort(counts, kind="stable")
    order, groups = order[counts[order] > 0], []
    while len(order):
        fits = np.arange(1, len(order) + 1) * counts[order].astype(float) ** 2 <= MOST_PAIRS
        images, order = np.split(order, [max(1, int(np.searchsorted(~fits, True)))])
        images = np.sort(images)
        groups.append(padded_group(boxes, images, int(counts[images].max())))
    return groups


def padded_group(boxes: Boxes, images: NDArray[np.int64], size: int) -> Group:
    """Pad the boxes of images (b,) to a size; images beyond the end of `boxes` have none."""
    padded = np.zeros((len(images), size, 4), np.float32)
    real = np.zeros(padded.shape[:2], bool)
    for row, image in enumerate(images.tolist()):
        if image < len(boxes):
            padded[row, : len(boxes[image])], real[row, : len(boxes[image])] = boxes[image], True
    return Group(images, padded, real)


def ungrouped(groups: Sequence[Group], rows: Sequence[NDArray[np.float32]], width: int) -> NDArray[np.float32]:
    """Put rows (b, R, width) of each group in the order of the batch: (M, width), image after image."""
    parts = [values[group.real] for group, values in zip(groups, rows, strict=True)]
    image = [np.repeat(group.images, group.real.sum(axis=1)) for group in groups]
    order = np.argsort(np.concatenate([np.empty(0, np.int64), *image]), kind="stable")
    together: NDArray[np.float32] = np.concatenate([np.empty((0, width), np.float32), *parts])[order]
    return together


def require_finite(*columns: NDArray[np.float32]) -> None:
    """Refuse values that are not finite; `InputError`."""
    if not all(np.isfinite(values).all() for values in columns):
        raise InputError("got values that are not finite: the training of the model diverged; train it again")
