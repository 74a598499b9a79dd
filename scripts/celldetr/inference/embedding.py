"""Embeddings of nuclei in given boxes by the representation decoder."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from celldetr.inference.batch import read_batch
from celldetr.model.celldetr import CellDETR
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

    See `celldetr.inference.batch.read_batch`. Takes images (B, S, S, 3), and for each the boxes (n, 4) of its nuclei,
    xyxy px; n = 0 is legal. Returns for each image the embeddings (n, C) in the same order. The model is on `device`.

    Raises
    ------
    InputError
        The model has no representation decoder, or computes values that are not finite.
    """
    embedded = read_batch(model, images, device=device, given=boxes)[1].embeddings
    return np.split(embedded, np.cumsum([len(of_image) for of_image in boxes])[:-1])
