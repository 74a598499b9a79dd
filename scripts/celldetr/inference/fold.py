"""A test fold as any model predicts it: its patches in batches, and the origin of the predictions."""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from celldetr.config.base import Precision
from celldetr.evaluation.predictions import Predictions
from celldetr.model.device import best_device, resolve_precision
from celldetr.model.weights import trained_on
from celldetr.runtime.provenance import git_revision, sha256, versions
from celldetr.store import PatchStore
from celldetr.store.seen import refuse_seen_store

log = logging.getLogger(__name__)


def origin_of(
    model: str,
    store: PatchStore,
    *,
    experiment: str,
    split: int,
    declared: Collection[str] | None,
    precision: Precision,
) -> dict[str, Any]:
    """Say where the predictions of a test fold come from, after checking that the model file may be tested on it.

    `declared` are the groups that a user says the model has seen, beside those that its file says.

    Raises
    ------
    InputError
        The model has seen patches of the store, or nobody knows what it has seen.
    """
    seen = trained_on(model, declared, f"experiments.{experiment}.trained_on")
    refuse_seen_store(seen, store, model)
    device = best_device()
    return {
        "experiment": experiment,
        "trained_on": seen,
        "split": split,
        "model_sha256": sha256(model),
        "git_revision": git_revision(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": resolve_precision(precision, device),
    }


def no_detections(store: PatchStore, width: int | None, metadata: Mapping[str, Any]) -> Predictions:
    """Predictions of a store in which nothing was found, with embeddings of a width."""
    return Predictions(
        np.empty(0, int),
        np.empty(0, int),
        np.empty((0, 4)),
        np.empty(0),
        np.empty((0, len(store.classes))),
        classes=store.classes,
        n_patches=store.n_patches,
        metadata={**metadata, "test_store": store.path.stem, "store_digest": store.digest},
        embeddings=None if width is None else np.empty((0, width), np.float32),
    )


def patch_batches(store: PatchStore, batch_size: int, progress: bool) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield batches in order: index of the first patch, images (B, S, S, 3). One batch is read ahead."""
    starts = range(0, store.n_patches, batch_size)
    spans = [np.arange(start, min(start + batch_size, store.n_patches)) for start in starts]
    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(total=store.n_patches, unit="patch", disable=not progress, mininterval=5) as bar,
    ):
        ahead = reader.submit(store.images, spans[0]) if spans else None
        for number, span in enumerate(spans):
            assert ahead is not None
            images = ahead.result()
            ahead = reader.submit(store.images, spans[number + 1]) if number + 1 < len(spans) else None
            yield int(span[0]), images
            bar.update(len(span))


def warn_if_empty(path: str | os.PathLike[str], store: PatchStore, detections: int, nucleus_threshold: float) -> None:
    """Warn of predictions without a single detection."""
    if store.n_patches and not detections:
        log.warning(
            "%s: no detection in %d patches reached a nucleus score of %g: the model is not trained enough, or the "
            "threshold is too high",
            path,
            store.n_patches,
            nucleus_threshold,
        )
