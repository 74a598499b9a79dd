"""How well a contrastively pretrained model finds nuclei again from noised boxes (paper, 3.3 and figure 4c)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from celldetr.config.experiment import NoiseSettings
from celldetr.evaluation.similarity import DrawnSimilarities
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.device import computing_in, evaluating
from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore
from celldetr.training.contrastive import found_own, make_views, project_views, similarities, validation_draws
from celldetr.training.data import PatchData, ValidationBatches

_MEANS = {1: "retrieval", 2: "own", 3: "others"}


def measure_similarity(
    model: CellDETR,
    store: PatchStore,
    *,
    patches: NDArray[np.int64],
    seed: int,
    noise: NoiseSettings,
    batch_size: int,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[DrawnSimilarities, dict[str, Any]]:
    """Measure how well noised boxes (anchors) find their nucleus among all nuclei of the patch, in float32.

    Every nucleus has one anchor, as in the validation of contrastive pretraining; classes have no influence. `patches`
    are indices (P,) of those to draw; `seed` and `noise` are those of the anchors.

    Returns the matrices to draw; and ``retrieval`` (share of the anchors whose most similar original is their own),
    ``chance`` (the same for a random choice), ``own`` and ``others`` (mean similarity to the own original and to the
    others of the patch), all four None without a patch of at least two nuclei; ``anchors`` and ``patches`` (numbers).

    Raises
    ------
    InputError
        The model has no projection head.
    """
    if not model.settings.projection:
        raise InputError(
            "the model has no projection head, so its embeddings were not trained to be compared; give a model of an "
            "experiment of stage ssl"
        )
    matrices: dict[int, NDArray[np.float32]] = {}
    rows, wanted = [np.zeros((0, 4))], set(patches.tolist())
    for index, matrix, found in _similarity_of_patches(model, store, seed, noise, batch_size, device, progress):
        n = len(matrix)
        if n >= 2:
            own = np.trace(matrix) / n
            rows.append(np.array([[n, found, own * n, (matrix.sum() - own * n) / (n - 1)]]))
        if index in wanted:
            matrices[index] = matrix
    table = np.concatenate(rows)
    counts = np.array([len(matrices[patch]) for patch in patches.tolist()], dtype=np.int64)
    drawn = np.full((len(patches), *[counts.max(initial=0)] * 2), np.nan, dtype=np.float32)
    for row, patch in enumerate(patches.tolist()):
        drawn[row, : counts[row], : counts[row]] = matrices[patch]
    anchors = int(table[:, 0].sum())
    means = {name: float(table[:, k].sum() / anchors) if anchors else None for k, name in _MEANS.items()}
    chance = len(table) / anchors if anchors else None
    summary = {**means, "chance": chance, "anchors": anchors, "patches": len(table)}
    return DrawnSimilarities(patches, counts, drawn), summary


def _similarity_of_patches(
    model: CellDETR,
    store: PatchStore,
    seed: int,
    noise: NoiseSettings,
    batch_size: int,
    device: str,
    progress: bool,
) -> Iterator[tuple[int, NDArray[np.float32], int]]:
    """Yield the index of each patch, similarities (n, n) of anchors to originals, and how many find their own."""
    all_patches = pd.DataFrame({"store": store.path.stem, "patch": np.arange(store.n_patches), "part": "all"})
    batches = ValidationBatches(PatchData([store], all_patches, "all", cache="none"), batch_size)
    for number in tqdm(range(len(batches)), unit="batch", disable=not progress, mininterval=5):
        batch = batches[number].to(device)
        draws = validation_draws(batch.patches.tolist(), batch.targets, seed).to(device)
        views = make_views(batch.targets.boxes, draws, noise)
        with evaluating(model), computing_in("fp32", device):
            features = model.encode(float_images(batch.images))
            similarity = similarities(project_views(model, features, views), views)
        found, matrices = found_own(similarity, views).sum(dim=1).tolist(), similarity.cpu().numpy()
        for row, (patch, n) in enumerate(zip(batch.patches.tolist(), batch.targets.counts.tolist(), strict=True)):
            yield patch, matrices[row, n : 2 * n, :n], found[row]
