"""Where a model looks: nuclei to draw, shares of attention inside boxes, and the file that keeps them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic
from celldetr.runtime.npz import read_npz, write_npz
from celldetr.store import PatchStore

MARGIN = 0.125  # of the patch: nuclei to draw keep this distance from its edge where there are enough of them
EDGE = 1e-3  # px; points of the box-constrained attention may lie exactly on the edge, up to rounding
SIZES = (25.0, 90.0)  # percentiles of box area of a class between which nuclei to draw are taken


@dataclass(frozen=True)
class DrawnNuclei:
    """What figure 3 needs of one model: F nuclei, the same for every model that saw the same store.

    Attributes
    ----------
    patch
        Index of the patch of each nucleus (F,).
    nucleus
        Index of the nucleus in the store (F,).
    label
        Class of the nucleus (F,).
    true_box
        Boxes (F, 4), xyxy px.
    image
        Whole patches (F, S, S, 3) uint8.
    found
        A detection is paired with the nucleus (F,). Where none is, the entries below are NaN.
    box
        Predicted boxes (F, 4), xyxy px.
    nucleus_score
        Nucleus scores (F,).
    points
        Sampling points (F, T, 2), x then y, px; T = heads * levels * points per level.
    weights
        Attention weights (F, T); their sum over T is 1.
    classes
        Class names.
    mpp
        um per px.
    """

    patch: NDArray[np.int64]
    nucleus: NDArray[np.int64]
    label: NDArray[np.int8]
    true_box: NDArray[np.float32]
    image: NDArray[np.uint8]
    found: NDArray[np.bool_]
    box: NDArray[np.float32]
    nucleus_score: NDArray[np.float32]
    points: NDArray[np.float32]
    weights: NDArray[np.float32]
    classes: tuple[str, ...]
    mpp: float

    def __len__(self) -> int:
        return len(self.patch)


def choose_nuclei(store: PatchStore, patch_size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Choose nuclei to draw from the truth alone, so that every model is shown on the same ones.

    Classes take turns. Within a class a nucleus is drawn at random among those well inside of their patch and
    of usual size, from patches not taken before as long as there are such.

    Parameters
    ----------
    store
        Patch store of the test fold.
    patch_size
        Side S of a patch, px.
    count
        Nuclei wanted; fewer are returned if the store has fewer.
    seed
        Seed of the draw.

    Returns
    -------
    NDArray
        Indices of the nuclei (F,), in order of class.
    """
    rng = np.random.default_rng(seed)
    boxes, labels = np.asarray(store.boxes, dtype=np.float64), np.asarray(store.labels)
    patch = np.repeat(np.arange(store.n_patches), np.diff(store.box_ptr))
    waiting = {
        label: _candidates(boxes, np.flatnonzero(labels == label), patch_size, rng)
        for label in np.unique(labels[labels >= 0]).tolist()
    }
    if not waiting:
        waiting = {-1: _candidates(boxes, np.arange(len(boxes)), patch_size, rng)}
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
    """Nuclei of a class in random order, the well visible ones first."""
    size = boxes[nuclei, 2:] - boxes[nuclei, :2]
    area = size.prod(axis=1)
    low, high = np.percentile(area, SIZES) if len(area) else (0.0, 0.0)
    edge = MARGIN * patch_size
    inside = (boxes[nuclei, :2] >= edge).all(axis=1) & (boxes[nuclei, 2:] <= patch_size - edge).all(axis=1)
    hard = ~(inside & (area >= low) & (area <= high))
    order = rng.permutation(len(nuclei))
    found: list[int] = nuclei[order[np.argsort(hard[order], kind="stable")]].tolist()
    return found


def share_inside(
    points: NDArray[np.floating], weights: NDArray[np.floating], boxes: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Share of the attention weight that falls on points inside a box, edges included (to `EDGE` px).

    Parameters
    ----------
    points
        Sampling points (D, T, 2), x then y, px.
    weights
        Attention weights (D, T).
    boxes
        One box per row (D, 4), xyxy px.

    Returns
    -------
    NDArray
        Shares (D,) in [0, 1].
    """
    low, high = boxes[:, None, :2] - EDGE, boxes[:, None, 2:] + EDGE
    inside = ((points >= low) & (points <= high)).all(axis=-1)
    values = np.asarray(weights, dtype=np.float64)
    return np.asarray((values * inside).sum(axis=1) / values.sum(axis=1))


def write_drawn(path: str | os.PathLike[str], drawn: DrawnNuclei) -> None:
    """Write the nuclei to draw as an NPZ file."""
    write_npz(path, drawn)


def read_drawn(path: str | os.PathLike[str]) -> DrawnNuclei:
    """Read what `write_drawn` wrote.

    Raises
    ------
    InputError
        Not such a file.
    """
    arrays = read_npz(path, DrawnNuclei, "attention")
    plain = {"classes": tuple(map(str, arrays["classes"])), "mpp": float(arrays["mpp"])}
    return DrawnNuclei(**{**arrays, **plain})


def write_share(path: str | os.PathLike[str], share: Mapping[str, Any]) -> None:
    """Write the shares of a fold as JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(share, indent=2) + "\n", encoding="utf-8")


def read_share(path: str | os.PathLike[str]) -> tuple[float, int]:
    """Read the mean share inside the true box (NaN if nothing was detected) and over how many nuclei it is.

    Raises
    ------
    InputError
        Not a file of `write_share`.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        mean, nuclei = record["share_true_box"], int(record["nuclei"])
        return (float("nan") if mean is None else float(mean)), nuclei
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: got {error!r}, expected a JSON file of the attention rule; run that rule again"
        ) from error


def check_same_nuclei(drawn: Sequence[DrawnNuclei], names: Sequence[str]) -> None:
    """Refuse to compare models on different nuclei.

    Raises
    ------
    ConfigError
        Nothing to draw.
    InputError
        The nuclei of two models differ.
    """
    if not drawn or not len(drawn[0]):
        raise ConfigError("figure 3: got no nuclei to draw, expected at least one in the test fold")
    for other, name in zip(drawn, names, strict=True):
        same = np.array_equal(other.nucleus, drawn[0].nucleus) and np.array_equal(other.image, drawn[0].image)
        if not same:
            raise InputError(
                f"attention of {name}: its nuclei are not those of {names[0]}; run the attention rule for both "
                "on the same store"
            )
