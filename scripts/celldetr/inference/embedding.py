"""Embeddings of nuclei in given boxes by the representation decoder."""

from collections.abc import Iterator

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
    """Embed the nuclei of the patches of a store in their true boxes, in float32, see `read_batch`.

    Yields the index of each patch, also of those without nuclei, and its embeddings (n, C) in the order of the store.
    `patches` are the indices (P,) wanted, None: all in order. Labels and classes of the store have no influence.

    Raises
    ------
    InputError
        The model has no representation decoder, or computes values that are not finite.
    """
    wanted = np.arange(store.n_patches) if patches is None else np.asarray(patches, dtype=np.int64)
    with tqdm(total=len(wanted), unit="patch", disable=not progress, mininterval=5) as bar:
        for start in range(0, len(wanted), batch_size):
            indices = wanted[start : start + batch_size].tolist()
            boxes = [store.boxes_of(index)[0] for index in indices]
            try:
                embedded = read_batch(model, store.images(indices), device=device, given=boxes)[1].embeddings
            except InputError as error:
                raise InputError(f"{store.path}, patches {indices[0]} to {indices[-1]}: {error}") from error
            yield from zip(indices, np.split(embedded, np.cumsum([*map(len, boxes)])[:-1]), strict=True)
            bar.update(len(indices))
