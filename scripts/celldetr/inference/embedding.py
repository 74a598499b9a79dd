"""Embeddings of nuclei in given boxes by the representation decoder."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from celldetr.inference.predictor import Predictor
from celldetr.model.celldetr import CellDETR
from celldetr.model.compiled import Compile
from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore


def embed_patches(
    model: CellDETR,
    store: PatchStore,
    *,
    batch_size: int,
    device: str,
    compiling: Compile = "auto",
    patches: ArrayLike | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Embed the nuclei of the patches of a store in their true boxes, in float32, see `Predictor`.

    Yields the index of each patch, also of those without nuclei, and its embeddings (n, C) in the order of the store.
    `patches` are the indices (P,) wanted, None: all in order. Labels and classes of the store have no influence.

    Raises
    ------
    InputError
        The model has no representation decoder, or computes values that are not finite.
    """
    wanted = np.arange(store.n_patches) if patches is None else np.asarray(patches, dtype=np.int64)
    predictor = Predictor(
        model, batch_size=batch_size, device=device, embeds="given", compiling=compiling, expected=len(wanted)
    )
    groups = [wanted[start : start + batch_size].tolist() for start in range(0, len(wanted), batch_size)]
    batches = ((group, store.images(group), [store.boxes_of(index)[0] for index in group]) for group in groups)
    done = 0
    with tqdm(total=len(wanted), unit="patch", disable=not progress, mininterval=5) as bar:
        try:
            for group, _, given in predictor.read(batches):
                ends = np.cumsum([len(store.boxes_of(index)[0]) for index in group])
                yield from zip(group, np.split(given.embeddings, ends[:-1]), strict=True)
                done += 1
                bar.update(len(group))
        except InputError as error:
            raise InputError(f"{store.path}, patches {groups[done][0]} to {groups[done][-1]}: {error}") from error
