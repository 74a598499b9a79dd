"""Embeddings of nuclei in given boxes: what the representation decoder makes of the true boxes of a patch store."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import CellDETR
from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore


class EmbeddedPatch(NamedTuple):
    """Index of a patch of a store, and the embeddings (n, C) float32 of its nuclei in the order of the store."""

    patch: int
    embeddings: NDArray[np.float32]


def embed_store(
    model: CellDETR,
    store: PatchStore,
    *,
    batch_size: int,
    device: str,
    patches: ArrayLike | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Embed all nuclei of patches; see `embed_patches`, whose parameters these are, for more than memory holds.

    Returns
    -------
    NDArray
        (M, C) float32: the nuclei of the first patch in the order of the store, then those of the next one.
    """
    found = embed_patches(model, store, batch_size=batch_size, device=device, patches=patches, progress=progress)
    nothing = np.empty((0, model.settings.d_model), dtype=np.float32)
    return np.concatenate([nothing, *(one.embeddings for one in found)])


def embed_patches(
    model: CellDETR,
    store: PatchStore,
    *,
    batch_size: int,
    device: str,
    patches: ArrayLike | None = None,
    progress: bool = False,
) -> Iterator[EmbeddedPatch]:
    """Embed the nuclei of patches in their true boxes, in float32, with dropout and gradients off.

    Labels have no influence, and a patch has none on another one. Nuclei are embedded as the model was trained: among
    the true nuclei of their patch and the model's global tokens, and if it has the projection head of contrastive
    pretraining, as the originals there, by which self-attention knows no locations and no global tokens (paper, 3.3).

    Parameters
    ----------
    model
        Any model with a representation decoder, on `device`.
    store
        Patch store; its classes need not be those of the model.
    batch_size
        Patches at once.
    device
        Where the model is, e.g. ``cpu`` or ``cuda``.
    patches
        Indices (P,) of patches in the order wanted; none: all in order.
    progress
        Show a bar.

    Yields
    ------
    EmbeddedPatch
        For each patch, also for those without nuclei.

    Raises
    ------
    InputError
        The model has no representation decoder, or gives values that are not finite.
    """
    if model.baseline:
        raise InputError(
            "the model is of mode baseline, which has no representation decoder and no embeddings; give a model of "
            "mode sequential or parallel"
        )
    wanted = np.arange(store.n_patches) if patches is None else np.asarray(patches, dtype=np.int64)
    with tqdm(total=len(wanted), unit="patch", disable=not progress, mininterval=5) as bar:
        for start in range(0, len(wanted), batch_size):
            indices = wanted[start : start + batch_size].tolist()
            boxes = [store.boxes_of(index)[0] for index in indices]
            filled = [row for row, of_patch in enumerate(boxes) if len(of_patch)]
            embedded = [np.empty((0, model.settings.d_model), dtype=np.float32) for _ in indices]
            if filled:
                images = torch.from_numpy(store.images([indices[row] for row in filled])).to(device)
                found = _embed(model, images, [torch.from_numpy(boxes[row]) for row in filled])
                for row, values in zip(filled, found, strict=True):
                    embedded[row] = _finite(values, store.path, indices[row])
            yield from map(EmbeddedPatch, indices, embedded)
            bar.update(len(indices))


def _embed(model: CellDETR, images: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings (n, C) of the nuclei of each of B images (B, S, S, 3) uint8 with boxes (n, 4), xyxy px, n > 0."""
    size, counts = images.shape[1], torch.tensor([len(of_image) for of_image in boxes])
    padded = torch.nn.utils.rnn.pad_sequence(list(boxes), batch_first=True)
    given = (xyxy_to_cxcywh(padded) / size).to(images.device)
    valid = (torch.arange(given.shape[1]) < counts[:, None]).to(images.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = model.encode(images.permute(0, 3, 1, 2).float() / 255)
            if model.settings.projection:
                mask = _originals(valid, model.representation.global_tokens)
                embeddings = model.represent(features, given, valid, mask=mask, positions=False)
            else:
                embeddings = model.represent(features, given, valid)
    finally:
        model.train(training)
    return [of_image[:count] for of_image, count in zip(embeddings.float().cpu(), counts.tolist(), strict=True)]


def _originals(valid: Tensor, tokens: int) -> Tensor:
    """Who attends to whom without anchors (B, S + tokens, S + tokens): all to the nuclei and to themselves."""
    seen = torch.nn.functional.pad(valid, (0, tokens))
    return seen[:, None] | torch.eye(seen.shape[1], dtype=torch.bool, device=valid.device)


def _finite(values: Tensor, store: os.PathLike[str], patch: int) -> NDArray[np.float32]:
    if not torch.isfinite(values).all():
        raise InputError(
            f"{store}: patch {patch}: got embeddings that are not finite; the weights of the model are damaged, or its "
            "training diverged: train it again"
        )
    embeddings: NDArray[np.float32] = values.numpy()
    return embeddings
