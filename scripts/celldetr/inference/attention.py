"""Where a model looks: the share of its attention inside boxes, and sampling points of a few nuclei for figure 3.

Without torch, because figure 3 reads the files that are written here.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.runtime.files import read_npz
from celldetr.store import PatchStore

MARGIN = 0.125  # of the patch: nuclei to draw are at least this far from its edge, if there are enough of them
EDGE = 1e-3  # px; points of the box-constrained attention may lie exactly on the edge, up to rounding
SIZES = (25.0, 90.0)  # percentiles of the box area of a class between which nuclei are drawn


class PatchAttention(NamedTuple):
    """The D detections of a patch and what the last decoder layer sampled for each."""

    boxes: NDArray[np.float32]
    """(D, 4), xyxy px; they may reach beyond the patch."""
    points: NDArray[np.float32]
    """Sampling points (D, T, 2), x then y, px; T = heads * levels * points per level."""
    weights: NDArray[np.float32]
    """Attention weights (D, T); their sum over T is 1."""


_Row = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Box, points and weights of a detection."""


@dataclass(frozen=True)
class DrawnNuclei:
    """F nuclei of figure 3 with the attention of one model; every model shows the same nuclei of a store."""

    patch: NDArray[np.int64]
    """Index of the patch of each nucleus (F,)."""
    nucleus: NDArray[np.int64]
    """Index of the nucleus in the store (F,)."""
    label: NDArray[np.int8]
    """Class of the nucleus (F,)."""
    true_box: NDArray[np.float32]
    """(F, 4), xyxy px."""
    image: NDArray[np.uint8]
    """Whole patches (F, S, S, 3)."""
    found: NDArray[np.bool_]
    """Whether a detection is paired with the nucleus (F,). If not, its entries below are NaN."""
    box: NDArray[np.float32]
    """Predicted boxes (F, 4), xyxy px."""
    points: NDArray[np.float32]
    """(F, T, 2), as in `PatchAttention`."""
    weights: NDArray[np.float32]
    """(F, T)."""
    classes: tuple[str, ...]
    mpp: float
    """um per px."""

    def __len__(self) -> int:
        return len(self.patch)


def choose_nuclei(store: PatchStore, count: int, seed: int) -> NDArray[np.int64]:
    """Choose nuclei to draw from the truth alone, so that every model shows the same ones.

    Classes take turns. Within a class, a random nucleus is taken of those well inside their patch and of usual size,
    from an unused patch if there is one. Returns indices of at most `count` nuclei (F,), in order of class.
    """
    rng = np.random.default_rng(seed)
    boxes, labels = np.asarray(store.boxes, dtype=np.float64), np.asarray(store.labels)
    patch = np.repeat(np.arange(store.n_patches), np.diff(store.box_ptr))
    waiting = {
        label: _candidates(boxes, np.flatnonzero(labels == label), store.patch_size, rng)
        for label in np.unique(labels[labels >= 0]).tolist()
    }
    if not waiting:
        waiting = {-1: _candidates(boxes, np.arange(len(boxes)), store.patch_size, rng)}
    chosen: list[int] = []
    while len(chosen) < count and any(waiting.values()):
        for candidates in waiting.values():
            if not candidates or len(chosen) == count:
                continue
            taken = set(patch[chosen].tolist())
            fresh = (k for k, nucleus in enumerate(candidates) if patch[nucleus] not in taken)
            chosen.append(candidates.pop(next(fresh, 0)))
    indices = np.array(chosen, dtype=np.int64)
    return indices[np.lexsort((indices, labels[indices]))]


def _candidates(
    boxes: NDArray[np.float64], nuclei: NDArray[np.int64], patch_size: int, rng: np.random.Generator
) -> list[int]:
    """Nuclei of a class in random order, those well inside their patch and of usual size first."""
    size = boxes[nuclei, 2:] - boxes[nuclei, :2]
    area = size.prod(axis=1)
    low, high = np.percentile(area, SIZES) if len(area) else (0.0, 0.0)
    edge = MARGIN * patch_size
    inside = (boxes[nuclei, :2] >= edge).all(axis=1) & (boxes[nuclei, 2:] <= patch_size - edge).all(axis=1)
    last = ~(inside & (area >= low) & (area <= high))
    order = rng.permutation(len(nuclei))
    found: list[int] = nuclei[order[np.argsort(last[order], kind="stable")]].tolist()
    return found


def share_inside(
    points: NDArray[np.floating], weights: NDArray[np.floating], boxes: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Share (D,) of the weights (D, T) of points (D, T, 2) that lie in their box (D, 4), edges included (to `EDGE` px).

    Points and boxes (xyxy) are in px.
    """
    low, high = boxes[:, None, :2] - EDGE, boxes[:, None, 2:] + EDGE
    inside = ((points >= low) & (points <= high)).all(axis=-1)
    values = np.asarray(weights, dtype=np.float64)
    return np.asarray((values * inside).sum(axis=1) / values.sum(axis=1))


def measure_attention(
    patches: Iterable[PatchAttention], store: PatchStore, *, nuclei: NDArray[np.int64], radius: float
) -> tuple[DrawnNuclei, dict[str, Any]]:
    """Measure which share of the attention of each detection lies inside the nucleus that it is paired with.

    Detections of each patch of the store in order are paired with the truth by box centres, at most `radius` px apart,
    as in the evaluation. The weights of the heads are averaged (paper, figure 3).

    Returns the nuclei (indices (F,)) to draw; and ``nuclei`` (number of pairs), ``share_true_box`` and
    ``share_predicted_box`` (means over them, None without any), ``n_truth``, ``n_detections``, and per class ``nuclei``
    and ``share_true_box``.
    """
    paired, in_true, in_predicted = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
    drawn: dict[int, _Row] = {}
    n_detections = 0
    for index, patch in enumerate(patches):
        first, stop = (int(end) for end in store.box_ptr[index : index + 2])
        true, boxes = store.boxes[first:stop], patch.boxes.clip(0, store.patch_size)
        pairs = pair_nuclei(_one_image(true), _one_image(boxes), radius)
        n_detections += len(boxes)
        if not len(pairs.truth):
            continue
        points, weights = patch.points[pairs.predicted], patch.weights[pairs.predicted]
        paired.append(pairs.truth + first)
        in_true.append(share_inside(points, weights, true[pairs.truth]))
        # The predicted boxes are not clipped here: points may lie beyond the edge of the patch.
        in_predicted.append(share_inside(points, weights, patch.boxes[pairs.predicted]))
        rows = zip(boxes[pairs.predicted], points, weights, strict=True)
        drawn |= {k: row for k, row in zip(paired[-1].tolist(), rows, strict=True) if k in nuclei}
    shares, labels = np.concatenate(in_true), store.labels[np.concatenate(paired)]
    of_classes = {name: shares[labels == k] for k, name in enumerate(store.classes)}
    return _drawn_nuclei(store, nuclei, drawn), {
        "nuclei": len(shares),
        "share_true_box": _mean(shares),
        "share_predicted_box": _mean(np.concatenate(in_predicted)),
        "n_truth": len(store.labels),
        "n_detections": n_detections,
        "classes": {name: {"nuclei": len(own), "share_true_box": _mean(own)} for name, own in of_classes.items()},
    }


def _one_image(boxes: NDArray[np.floating]) -> NucleusCentres:
    values = np.asarray(boxes, dtype=np.float64)
    centres = (values[:, :2] + values[:, 2:]) / 2
    return NucleusCentres(np.array([0, len(values)]), centres, np.zeros(len(values), dtype=np.int8))


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _drawn_nuclei(store: PatchStore, nuclei: NDArray[np.int64], drawn: Mapping[int, _Row]) -> DrawnNuclei:
    samples = max((len(weights) for *_, weights in drawn.values()), default=0)
    missed: _Row = (np.full(4, np.nan), np.full((samples, 2), np.nan), np.full(samples, np.nan))
    rows = [drawn.get(nucleus, missed) for nucleus in nuclei.tolist()]
    box, points, weights = (
        np.array([row[k] for row in rows], np.float32).reshape(len(rows), *missed[k].shape) for k in range(3)
    )
    patch = np.searchsorted(store.box_ptr, nuclei, side="right") - 1
    return DrawnNuclei(
        patch=patch.astype(np.int64),
        nucleus=nuclei,
        label=store.labels[nuclei],
        true_box=store.boxes[nuclei],
        image=store.images(patch),
        found=np.array([nucleus in drawn for nucleus in nuclei.tolist()], dtype=bool),
        box=box,
        points=points,
        weights=weights,
        classes=store.classes,
        mpp=float(store.mpp),
    )


def read_drawn(path: str | os.PathLike[str]) -> DrawnNuclei:
    """Read the file that `celldetr.runtime.files.write_npz` made of `DrawnNuclei`."""
    arrays = read_npz(path, DrawnNuclei, "attention")
    plain = {"classes": tuple(map(str, arrays["classes"])), "mpp": float(arrays["mpp"])}
    return DrawnNuclei(**{**arrays, **plain})


def read_share(path: str | os.PathLike[str]) -> tuple[float, int]:
    """Read the mean share inside the true box (NaN if nothing was detected) and its number of nuclei."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    mean = record["share_true_box"]
    return float("nan") if mean is None else float(mean), record["nuclei"]
