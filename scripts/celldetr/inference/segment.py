"""A segmentation system on the patches of a store: the predictions of a test fold, with masks."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from celldetr.config.base import Precision
from celldetr.evaluation.predictions import Predictions, write_predictions
from celldetr.inference.fold import no_detections, patch_batches, warn_if_empty
from celldetr.model.celldetr import float_images
from celldetr.model.device import computing_in
from celldetr.runtime.errors import InputError
from celldetr.segmentation.system import System
from celldetr.store import PatchStore


def segment_fold(
    model: System,
    store: PatchStore,
    path: str | os.PathLike[str],
    *,
    batch_size: int,
    device: str = "cpu",
    precision: Precision = "fp32",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> int:
    """Segment all patches of a store in order, write the nuclei as Parquet, and return their number.

    The model is on `device`. The system's own thresholds decide what is a nucleus: every row counts in the scores.
    ``query`` is the number of the nucleus in its patch. `metadata` are more JSON values for the file, which
    `celldetr.evaluation.predictions` describes.

    Raises
    ------
    InputError
        The classes of the model are not those of the store.
    """
    if model.settings.classes != store.classes:
        raise InputError(
            f"the model has classes {model.settings.classes}, the store {store.path} {store.classes}; predict with a "
            "model that was trained on these classes"
        )
    own = {**(metadata or {}), "nucleus_threshold": 0.0, "mode": "segmentation"}
    empty = replace(no_detections(store, None, own), masks=[])

    def parts() -> Iterator[Predictions]:
        yield empty
        for start, images in patch_batches(store, batch_size, progress):
            with torch.inference_mode(), computing_in(precision, device):
                found = model.segment(float_images(torch.from_numpy(images).to(device)))
            for patch, nuclei in enumerate(found, start=start):
                yield replace(
                    empty,
                    patch=np.full(len(nuclei.boxes), patch),
                    query=np.arange(len(nuclei.boxes)),
                    boxes=nuclei.boxes,
                    nucleus_score=nuclei.nucleus_score,
                    class_scores=nuclei.class_scores,
                    masks=nuclei.masks,
                )

    nuclei = write_predictions(path, parts())
    warn_if_empty(path, store, nuclei, 0.0)
    return nuclei
