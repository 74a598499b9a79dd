"""One batch of images through a model: the nuclei that it finds, and the embeddings of nuclei in given boxes.

The images are encoded once for both; uint8 goes to the device, and all results come back in one transfer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celldetr.config.base import Precision
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import CellDETR, Features, ImagePredictions, float_images
from celldetr.model.device import computing_in, evaluating
from celldetr.runtime.errors import InputError

_MOST_PAIRS = 1 << 24
"""Pairs of nuclei, with padding, in the self-attention of given boxes at a time."""


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


def read_batch(
    model: CellDETR,
    images: NDArray[np.uint8],
    *,
    device: str,
    precision: Precision = "fp32",
    nucleus_threshold: float | None = None,
    given: Sequence[NDArray[np.floating]] | None = None,
    represent: bool = True,
) -> tuple[FoundNuclei, GivenNuclei]:
    """Find nuclei in images (B, S, S, 3), and embed those in given boxes, with dropout and gradients off.

    Images do not influence each other. Given nuclei are embedded among the given nuclei of their image, as the model
    was trained; see `CellDETR.represent`.

    Parameters
    ----------
    model, device, precision
        The model is on `device`; see `celldetr.model.device.computing_in`.
    nucleus_threshold
        Smallest nucleus score of a nucleus that is found; None: none is searched for.
    given
        For each image the boxes (n, 4) of its nuclei, xyxy px; n = 0 is legal. None: no nuclei are given. What is found
        beside given nuclei is not represented.
    represent
        Whether the nuclei that are found get class scores and embeddings.

    Raises
    ------
    InputError
        Nuclei are given to a model without a representation decoder, or values are not finite.
    """
    if given is not None and model.baseline:
        raise InputError(
            "the model is of mode baseline, which has no representation decoder and no embeddings; give a model of "
            "mode sequential or parallel"
        )
    pixels = float_images(torch.from_numpy(images).to(device))
    found = [pixels.new_empty(0, *shape) for shape in ((), (), (4,), (), (0,), (0,))]
    embedded = found[-2:]
    with computing_in(precision, device), evaluating(model):
        if given is None and nucleus_threshold is not None and represent:
            found = _columns(model.predict(pixels, nucleus_threshold))
        else:
            features = model.encode(pixels)
            if nucleus_threshold is not None:
                kept = model.keep(model.detect(features), images.shape[1:3], nucleus_threshold)
                nothing = kept.boxes[:, :0]
                found = [kept.image, kept.query, kept.boxes, kept.scores.amax(dim=-1), nothing, nothing]
            if given is not None:
                embeddings = _represent(model, features, given, images.shape[1])
                embedded = [model.classify(embeddings).sigmoid(), embeddings]
    image, query, *columns = _to_host([*found, *embedded])
    nuclei = FoundNuclei(image.astype(np.int64), query.astype(np.int64), *columns[:4])
    return nuclei, GivenNuclei(*columns[4:])


def _columns(found: Sequence[ImagePredictions]) -> list[Tensor]:
    """Columns of `FoundNuclei` on the device."""
    counts = torch.tensor([len(image.query) for image in found])
    names = ("query", "boxes", "nucleus_score", "class_scores")
    query, boxes, score, classes = (torch.cat([getattr(image, name) for image in found]) for name in names)
    own = [image.embeddings for image in found if image.embeddings is not None]
    index = torch.arange(len(found)).repeat_interleave(counts).to(query.device, non_blocking=True)
    return [index, query, boxes, score, classes, torch.cat(own) if own else boxes[:, :0]]


def _represent(model: CellDETR, features: Features, given: Sequence[NDArray[np.floating]], side: int) -> Tensor:
    """Embed the nuclei (M, C) in boxes, px of images with a `side`, image after image.

    Images are padded to the largest of their group. Groups are small if there are thousands of nuclei in an image, as
    self-attention takes memory for each pair.
    """
    counts = np.array([len(boxes) for boxes in given])
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    parts = [(order[:0], features.memory.new_empty(0, model.settings.d_model))]
    while len(order):
        fits = np.arange(1, len(order) + 1) * counts[order].astype(float) ** 2 <= _MOST_PAIRS
        group, order = np.split(order, [max(1, int(np.searchsorted(~fits, True)))])
        parts.append((group, _represent_group(model, features, [given[index] for index in group], group, side)))
    members = np.concatenate([np.repeat(group, counts[group]) for group, _ in parts])
    back = torch.from_numpy(np.argsort(members, kind="stable")).to(features.memory.device, non_blocking=True)
    return torch.cat([embeddings for _, embeddings in parts])[back]


def _represent_group(
    model: CellDETR, features: Features, given: Sequence[NDArray[np.floating]], group: NDArray[np.int64], side: int
) -> Tensor:
    """Embed the nuclei (m, C) of some images, of whose boxes none is missing; the largest sets the padding."""
    memory, counts = features.memory, np.array([len(boxes) for boxes in given])
    padded = np.zeros((len(given), counts.max(), 4), np.float32)
    real = np.arange(counts.max()) < counts[:, None]
    padded[real] = np.concatenate(list(given))
    places = torch.from_numpy(np.flatnonzero(real)).to(memory.device, non_blocking=True)
    boxes = xyxy_to_cxcywh(torch.from_numpy(padded).to(memory.device, non_blocking=True)) / side
    valid = None if real.all() else torch.from_numpy(real).to(memory.device, non_blocking=True)  # none: less memory
    if len(group) < len(memory) or (np.diff(group) != 1).any():
        memory = memory[torch.from_numpy(group).to(memory.device, non_blocking=True)]
    return model.represent(Features(memory, features.shapes), boxes, valid).flatten(0, 1)[places]


def _to_host(columns: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """Copy columns, (n,) or (n, k) each, from the device as float32 in one transfer.

    Raises
    ------
    InputError
        A value is not finite.
    """
    flat = [column.float().flatten() for column in columns]
    values = torch.cat(flat).cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError("got values that are not finite: the training of the model diverged; train it again")
    pieces = np.split(values, np.cumsum([len(column) for column in flat[:-1]]))
    return [piece.reshape(tuple(column.shape)) for piece, column in zip(pieces, columns, strict=True)]
