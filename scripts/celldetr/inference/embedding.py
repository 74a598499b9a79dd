"""Embeddings of nuclei in given boxes by the representation decoder."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.device import evaluating
from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore


def embed_patches(
    model: CellDETR,
    store: PatchStore,
    *,
    batch_size: int,
    device: str,
    patches: ArrayLike | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Embed the nuclei of the patches of a store in their true boxes, see `embed_boxes`.

    Yields the index of each patch, also of those without nuclei, and its embeddings (n, C) in the order of the store.
    `patches` are the indices (P,) wanted, None: all in order. Labels and classes of the store have no influence.

    Raises
    ------
    InputError
        See `embed_boxes`.
    """
    wanted = np.arange(store.n_patches) if patches is None else np.asarray(patches, dtype=np.int64)
    with tqdm(total=len(wanted), unit="patch", disable=not progress, mininterval=5) as bar:
        for start in range(0, len(wanted), batch_size):
            indices = wanted[start : start + batch_size].tolist()
            boxes = [store.boxes_of(index)[0] for index in indices]
            try:
                embedded = embed_boxes(model, store.images(indices), boxes, device=device)
            except InputError as error:
                raise InputError(f"{store.path}, patches {indices[0]} to {indices[-1]}: {error}") from error
            yield from zip(indices, embedded, strict=True)
            bar.update(len(indices))


def embed_boxes(
    model: CellDETR, images: NDArray[np.uint8], boxes: Sequence[NDArray[np.float32]], *, device: str
) -> list[NDArray[np.float32]]:
    """Embed the nuclei in given boxes, in float32, with dropout and gradients off.

    Nuclei are embedded as the model was trained: among the given nuclei of their image, see `CellDETR.represent`.
    Images do not influence each other.

    Takes images (B, S, S, 3), and for each the boxes (n, 4) of its nuclei, xyxy px; n = 0 is legal. Returns for each
    image the embeddings (n, C) in the same order. The model is on `device`.

    Raises
    ------
    InputError
        The model has no representation decoder, or computes values that are not finite.
    """
    if model.baseline:
        raise InputError(
            "the model is of mode baseline, which has no representation decoder and no embeddings; give a model of "
            "mode sequential or parallel"
        )
    counts = torch.tensor([len(of_image) for of_image in boxes])
    if not counts.any():
        return [np.empty((0, model.settings.d_model), dtype=np.float32) for _ in boxes]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(of_image) for of_image in boxes], batch_first=True)
    given = (xyxy_to_cxcywh(padded) / images.shape[1]).to(device)
    valid = (torch.arange(given.shape[1]) < counts[:, None]).to(device)
    pixels = float_images(torch.from_numpy(images).to(device))
    with evaluating(model):
        embeddings = model.represent(model.encode(pixels), given, valid)
    if not embeddings.isfinite().all():
        raise InputError("got embeddings that are not finite: the training of the model diverged; train it again")
    embeddings = embeddings.float().cpu()
    return [of_image[:count].numpy() for of_image, count in zip(embeddings, counts.tolist(), strict=True)]
