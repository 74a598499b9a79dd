"""A trained model on the patches of a store: predictions of a test fold, and the points that it samples."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celldetr.config.base import Precision
from celldetr.evaluation.predictions import Predictions, write_predictions
from celldetr.inference.attention import PatchAttention
from celldetr.inference.fold import no_detections, patch_batches, warn_if_empty
from celldetr.inference.predictor import Predictor
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.compiled import Compile
from celldetr.model.device import computing_in
from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore

log = logging.getLogger(__name__)


def predict_fold(
    model: CellDETR,
    store: PatchStore,
    path: str | os.PathLike[str],
    *,
    nucleus_threshold: float,
    batch_size: int,
    class_map: Mapping[str, str] | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    compiling: Compile = "auto",
    embeddings: bool = False,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> int:
    """Predict all patches of a store in order, write them as Parquet, and return the number of detections.

    Boxes are clipped to the patch, px; the file is described in `celldetr.evaluation.predictions`. The model is on
    `device`; for precision and compiling see `Predictor`. `metadata` are more JSON values for the file. With
    `embeddings` the file also holds those of the detections, which a model of mode ``baseline`` does not have.

    `class_map` gives the class of the store for each class of a model that was trained on others (zero-shot transfer,
    paper, 4.4). The score of a class is the maximum of those mapped to it; a class without any scores 0 and is listed
    under ``absent`` in the file.

    Raises
    ------
    InputError
        The classes of the model are neither those of the store nor mapped to them by `class_map`; or see `Predictor`.
    """
    sources = _class_sources(model, store, class_map)
    own: dict[str, Any] = {"nucleus_threshold": nucleus_threshold, "mode": model.settings.mode}
    if absent := [name for name, columns in zip(store.classes, sources, strict=True) if not columns]:
        own["absent"] = absent
    if embeddings and model.baseline:
        log.warning("%s: a model of mode baseline has no embeddings, the file will have none", path)
    width = model.settings.d_model if embeddings and not model.baseline else None
    empty = no_detections(store, width, {**(metadata or {}), **own})
    predictor = Predictor(
        model,
        batch_size=batch_size,
        device=device,
        precision=precision,
        nucleus_threshold=nucleus_threshold,
        compiling=compiling,
        expected=store.n_patches,
    )

    def parts() -> Iterator[Predictions]:
        yield empty
        batches = ((start, images, None) for start, images in patch_batches(store, batch_size, progress))
        for start, found, _ in predictor.read(batches):
            scores = [found.class_scores[:, columns].max(axis=1, initial=0.0) for columns in sources]
            yield replace(
                empty,
                patch=found.image + start,
                query=found.query,
                boxes=found.boxes.clip(0, store.patch_size),
                nucleus_score=found.nucleus_score,
                class_scores=np.stack(scores, axis=1),
                embeddings=None if width is None else found.embeddings,
            )

    detections = write_predictions(path, parts())
    warn_if_empty(path, store, detections, nucleus_threshold)
    return detections


def attend_patches(
    model: CellDETR,
    store: PatchStore,
    *,
    nucleus_threshold: float,
    batch_size: int,
    device: str = "cpu",
    precision: Precision = "fp32",
    progress: bool = False,
) -> Iterator[PatchAttention]:
    """Predict all patches of a store in order and yield what the last decoder layer sampled for each detection.

    For parameters see `predict_fold`.
    """
    for _, images in patch_batches(store, batch_size, progress):
        with computing_in(precision, device):
            batch = model.attention(float_images(torch.from_numpy(images).to(device)), nucleus_threshold)
        for found, sampled in batch:
            weights = _numpy(sampled.weights.flatten(1))
            yield PatchAttention(
                _numpy(found.boxes),
                _numpy(sampled.locations.flatten(1, -2)) * store.patch_size,
                weights / weights.sum(axis=1, keepdims=True),
            )


def _class_sources(model: CellDETR, store: PatchStore, class_map: Mapping[str, str] | None) -> list[list[int]]:
    """List for each class of the store the model's classes that map to it."""
    names = tuple(model.settings.classes)
    if names == tuple(store.classes):
        return [[index] for index in range(len(names))]
    if class_map is None:
        raise InputError(
            f"the model has classes {names}, the store {store.path} {tuple(store.classes)}; predict with a model that "
            "was trained on these classes"
        )
    unmapped = [name for name in names if class_map.get(name) not in store.classes]
    if unmapped:
        raise InputError(
            f"the model has classes {unmapped} that map to none of {tuple(store.classes)}; predict with a model that "
            f"was trained on some of {tuple(class_map)}"
        )
    return [[k for k, name in enumerate(names) if class_map[name] == target] for target in store.classes]


def _numpy(values: Tensor) -> NDArray[Any]:
    return (values.float() if values.is_floating_point() else values).cpu().numpy()
