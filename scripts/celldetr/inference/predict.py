"""A trained model on the patches of a store: predictions of a test fold, and where the model looks."""

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.predictions import PredictionsWriter
from celldetr.inference.attention import DrawnNuclei, share_inside
from celldetr.model.celldetr import CellDETR
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
    precision: str = "fp32",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> int:
    """Predict all patches of a store in order and write them as Parquet.

    Parameters
    ----------
    model
        Model on `device`.
    store
        Patch store of the test fold.
    path
        File to write, see `celldetr.evaluation.predictions`. Boxes are clipped to the patch, px.
    nucleus_threshold
        Smallest nucleus score that is kept.
    batch_size
        Patches at once.
    class_map
        Class of the model -> class of the store, for a model that was trained on other classes (zero-shot transfer,
        paper, 4.4). The score of a class is the largest of those that map to it; a class that none maps to scores 0
        and is listed under ``absent`` in the file.
    device
        Where the model is, e.g. ``cpu`` or ``cuda``.
    precision
        See `celldetr.model.device.computing_in`.
    metadata
        More JSON values to keep in the file.
    progress
        Show a bar.

    Returns
    -------
    int
        Number of detections written.

    Raises
    ------
    InputError
        The model was trained for other classes than those of the store, and the map does not bring them together.
    ConfigError
        Unknown precision.
    """
    sources = _class_sources(model, store, class_map)
    absent = [name for name, columns in zip(store.classes, sources, strict=True) if not columns]
    precise = computing_in(precision, device)
    with (
        PredictionsWriter(
            path,
            classes=store.classes,
            n_patches=store.n_patches,
            nucleus_threshold=nucleus_threshold,
            metadata={**(metadata or {}), **({"absent": absent} if absent else {})},
        ) as writer,
        precise,
    ):
        for start, images in _batches(store, batch_size, device, progress):
            for offset, found in enumerate(model.predict(images, nucleus_threshold)):
                writer.append(
                    np.full(len(found.query), start + offset),
                    _numpy(found.query),
                    _clipped(found.boxes, store.patch_size),
                    _numpy(found.nucleus_score),
                    _mapped(_numpy(found.class_scores), sources),
                )
    if store.n_patches and not writer.n_detections:
        log.warning(
            "%s: no detection in %d patches reached a nucleus score of %g: the model is hardly trained, or the "
            "threshold is too high",
            path,
            store.n_patches,
            nucleus_threshold,
        )
    return writer.n_detections


@dataclass
class _Shares:
    """Shares of attention of the nuclei seen so far."""

    n_detections: int
    nuclei: list[NDArray[np.int64]]
    in_true: list[NDArray[np.float64]]
    in_predicted: list[NDArray[np.float64]]


def measure_attention(
    model: CellDETR,
    store: PatchStore,
    *,
    nuclei: NDArray[np.int64],
    nucleus_threshold: float,
    batch_size: int,
    radius: float,
    device: str = "cpu",
    precision: str = "fp32",
    progress: bool = False,
) -> tuple[DrawnNuclei, dict[str, Any]]:
    """Measure how much attention of each detection falls inside the nucleus that it is paired with.

    Attention is that of the last decoder layer's cross-attention: sampling points of all heads and levels, the weights
    of the heads averaged (paper, figure 3). Detections are paired with the truth as in the evaluation, by box centres.

    Parameters
    ----------
    model, store, nucleus_threshold, batch_size, device, precision, progress
        As in `predict_fold`.
    nuclei
        Indices (F,) of the nuclei to draw, see `celldetr.inference.attention.choose_nuclei`.
    radius
        Largest distance of a pair, px.

    Returns
    -------
    DrawnNuclei
        Points and weights of the nuclei to draw.
    dict
        ``nuclei`` (paired ones), ``share_true_box`` and ``share_predicted_box`` (means over them; None without any),
        ``n_truth``, ``n_detections``, and per class ``nuclei`` and ``share_true_box``.
    """
    _check_classes(model, store)
    shares = _Shares(0, [], [], [])
    rows: dict[int, dict[str, NDArray[Any]]] = {}
    wanted = set(nuclei.tolist())
    with computing_in(precision, device):
        for start, images in _batches(store, batch_size, device, progress):
            for offset, (found, points) in enumerate(model.attention(images, nucleus_threshold)):
                seen = _pair_patch(store, start + offset, found, points, radius, shares)
                rows |= {int(k): row for k, row in seen if int(k) in wanted}
    return _drawn(store, nuclei, rows), _summary(store, shares)


def _pair_patch(
    store: PatchStore, patch: int, found: Any, sampling: Any, radius: float, shares: _Shares
) -> list[tuple[int, dict[str, NDArray[Any]]]]:
    """Pair the detections of a patch, add their shares, and return what each paired nucleus may be drawn with."""
    boxes = _clipped(found.boxes, store.patch_size)
    shares.n_detections += len(boxes)
    first, stop = (int(end) for end in store.box_ptr[patch : patch + 2])
    true = store.boxes[first:stop]
    pairs = pair_nuclei(_one_image(true), _one_image(boxes), radius)
    if len(pairs.truth) == 0:
        return []
    points = _numpy(sampling.locations).reshape(len(boxes), -1, 2)[pairs.predicted] * store.patch_size
    weights = _numpy(sampling.weights).reshape(len(boxes), -1)[pairs.predicted]
    weights = weights / weights.sum(axis=1, keepdims=True)
    shares.nuclei.append(pairs.truth + first)
    shares.in_true.append(share_inside(points, weights, true[pairs.truth]))
    whole = _numpy(found.boxes)[pairs.predicted]  # not clipped: points may lie beyond the edge of the patch
    shares.in_predicted.append(share_inside(points, weights, whole))
    scores = _numpy(found.nucleus_score)[pairs.predicted]
    return [
        (
            first + int(nucleus),
            {"box": boxes[pairs.predicted[k]], "score": scores[k], "points": points[k], "weights": weights[k]},
        )
        for k, nucleus in enumerate(pairs.truth)
    ]


def _one_image(boxes: NDArray[np.floating]) -> NucleusCentres:
    values = np.asarray(boxes, dtype=np.float64)
    centres = (values[:, :2] + values[:, 2:]) / 2
    return NucleusCentres(np.array([0, len(values)]), centres, np.zeros(len(values), dtype=np.int8))


def _drawn(store: PatchStore, nuclei: NDArray[np.int64], rows: Mapping[int, Mapping[str, Any]]) -> DrawnNuclei:
    count = len(nuclei)
    size = max((len(row["weights"]) for row in rows.values()), default=0)
    arrays = {
        "box": np.full((count, 4), np.nan, dtype=np.float32),
        "score": np.full(count, np.nan, dtype=np.float32),
        "points": np.full((count, size, 2), np.nan, dtype=np.float32),
        "weights": np.full((count, size), np.nan, dtype=np.float32),
    }
    for index, nucleus in enumerate(nuclei.tolist()):
        for key, value in rows.get(nucleus, {}).items():
            arrays[key][index] = value
    patch = np.searchsorted(store.box_ptr, nuclei, side="right") - 1
    images = np.zeros((0, store.patch_size, store.patch_size, 3), np.uint8)
    return DrawnNuclei(
        patch=patch.astype(np.int64),
        nucleus=nuclei,
        label=store.labels[nuclei],
        true_box=store.boxes[nuclei],
        image=np.stack([store.read(int(index)).image for index in patch]) if count else images,
        found=np.array([nucleus in rows for nucleus in nuclei.tolist()], dtype=bool),
        box=arrays["box"],
        nucleus_score=arrays["score"],
        points=arrays["points"],
        weights=arrays["weights"],
        classes=store.classes,
        mpp=float(store.mpp),
    )


def _summary(store: PatchStore, shares: _Shares) -> dict[str, Any]:
    labels = store.labels[np.concatenate([np.empty(0, np.int64), *shares.nuclei])]
    in_true = np.concatenate([np.empty(0), *shares.in_true])
    in_predicted = np.concatenate([np.empty(0), *shares.in_predicted])
    classes = {
        name: {"nuclei": int((labels == k).sum()), "share_true_box": _mean(in_true[labels == k])}
        for k, name in enumerate(store.classes)
    }
    return {
        "nuclei": len(in_true),
        "share_true_box": _mean(in_true),
        "share_predicted_box": _mean(in_predicted),
        "n_truth": len(store.labels),
        "n_detections": shares.n_detections,
        "classes": classes,
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _check_classes(model: CellDETR, store: PatchStore) -> None:
    if tuple(model.settings.classes) != tuple(store.classes):
        raise InputError(
            f"the model has classes {tuple(model.settings.classes)}, the store {store.path} {tuple(store.classes)}; "
            "predict with a model that was trained on these classes"
        )


def _class_sources(model: CellDETR, store: PatchStore, class_map: Mapping[str, str] | None) -> list[list[int]]:
    """For each class of the store, the classes of the model whose scores it gets."""
    names = tuple(model.settings.classes)
    if class_map is None or names == tuple(store.classes):
        _check_classes(model, store)
        return [[index] for index in range(len(names))]
    unmapped = [name for name in names if class_map.get(name) not in store.classes]
    if unmapped:
        raise InputError(
            f"the model has classes {unmapped} that map to none of {tuple(store.classes)}; predict with a model that "
            f"was trained on some of {tuple(class_map)}"
        )
    return [[k for k, name in enumerate(names) if class_map[name] == target] for target in store.classes]


def _mapped(scores: NDArray[np.float32], sources: list[list[int]]) -> NDArray[np.float32]:
    """Turn scores (D, K) of the model's classes into scores of the store's classes."""
    return np.stack([scores[:, columns].max(axis=1, initial=0.0) for columns in sources], axis=1)


def _batches(store: PatchStore, batch_size: int, device: str, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """Batches in order, (index of the first patch, images (B, 3, S, S) in [0, 1]); one is read ahead."""
    starts = range(0, store.n_patches, batch_size)
    spans = [np.arange(start, min(start + batch_size, store.n_patches)) for start in starts]
    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(total=store.n_patches, unit="patch", disable=not progress, mininterval=5) as bar,
    ):
        ahead = reader.submit(store.images, spans[0]) if spans else None
        for number, span in enumerate(spans):
            assert ahead is not None
            pixels = torch.from_numpy(ahead.result())
            ahead = reader.submit(store.images, spans[number + 1]) if number + 1 < len(spans) else None
            yield int(span[0]), pixels.to(device).permute(0, 3, 1, 2).float() / 255
            bar.update(len(span))


def _clipped(boxes: Tensor, size: int) -> NDArray[np.float32]:
    return _numpy(boxes.float().clamp(0, size))


def _numpy(values: Tensor) -> NDArray[Any]:
    return (values.float() if values.is_floating_point() else values).cpu().numpy()
