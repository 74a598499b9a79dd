"""Figures 4b and 4c: losses of contrastive pretraining, and how well anchors find their nuclei."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from celldetr.report.style import STYLE
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.runtime.npz import read_npz, write_npz

READABLE = (6, 40)
"""Nuclei of a patch that make a readable heat map."""

Log = Sequence[Mapping[str, Any]]
_PARTS = {"contrastive": "contrastive", "nucleus": "nucleus (focal)", "l1": "box L1", "giou": "box GIoU"}
_TRAIN, _VAL = "#8A8A8A", "#0057C2"


@dataclass(frozen=True)
class DrawnSimilarities:
    """Cosine similarity of the anchors of P patches to all originals of their patch.

    Attributes
    ----------
    patch
        Index of each patch in the store (P,).
    counts
        Nuclei n of each patch (P,).
    similarity
        (P, N, N); row i, column j: the anchor of nucleus i and the original of nucleus j, in [-1, 1]. NaN from n on.
    """

    patch: NDArray[np.int64]
    counts: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.patch)


def choose_readable(box_ptr: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose patches with at least two nuclei at random, in order; those of a readable number of nuclei come first.

    Parameters
    ----------
    box_ptr
        Offsets (N + 1,) of the nuclei of each patch.
    count
        Patches wanted.
    seed
        Seed of the draw.

    Returns
    -------
    NDArray
        Indices (at most `count`,).
    """
    sizes = np.diff(box_ptr)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes >= 2))
    readable = (sizes[order] >= READABLE[0]) & (sizes[order] <= READABLE[1])
    return np.asarray(np.sort(order[np.argsort(~readable, kind="stable")][:count]), dtype=np.int64)


def write_similarities(path: str | os.PathLike[str], drawn: DrawnSimilarities) -> None:
    """Write the heat maps as an NPZ file."""
    write_npz(path, drawn)


def read_similarities(path: str | os.PathLike[str]) -> DrawnSimilarities:
    """Read what `write_similarities` wrote.

    Raises
    ------
    InputError
        Not such a file.
    """
    return DrawnSimilarities(**read_npz(path, DrawnSimilarities, "similarity"))


def write_retrieval(path: str | os.PathLike[str], measured: Mapping[str, Any]) -> None:
    """Write what was measured over all patches as JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def read_retrieval(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_retrieval` wrote.

    Raises
    ------
    InputError
        Not such a file.
    """
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: measured[name] for name in ("store", "retrieval", "chance", "anchors", "patches")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: got {error!r}, expected a JSON file of the similarity rule; run that rule again"
        ) from error


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the log of a run of contrastive pretraining; epoch 0 is the model before training.

    Raises
    ------
    InputError
        Not such a log.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        parts = [part for line in lines for part in (line["train"], line["val"]) if part]
        contrastive = bool(parts) and all("contrastive" in part for part in parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}), expected the log of a training run") from error
    if not contrastive:
        raise InputError(f"{path}: got no contrastive losses, expected the log of an experiment of stage ssl")
    return lines


def figure4b(log: Log, title: str) -> Figure:
    """Draw the losses in training and validation per epoch: the weighted sum, and its parts without weights.

    Parameters
    ----------
    log
        Lines of `read_log`.
    title
        What was trained.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, name in zip(figure.subplots(1, 5), ("loss", *_PARTS), strict=True):
            for part, label, colour in (("train", "training", _TRAIN), ("val", "validation", _VAL)):
                epochs, values = _series(log, part, name)
                axis.plot(epochs, values, label=label, color=colour, marker="o", markersize=2.5, linewidth=1.3)
            axis.set_title(_PARTS.get(name, "weighted sum"), fontsize=9)
            _tidy(axis)
        figure.axes[0].legend(fontsize=8, frameon=False)
        figure.axes[0].set_ylabel("loss")
        figure.suptitle(title, fontsize=10, weight="bold")
    return figure


def figure4c(drawn: DrawnSimilarities, measured: Mapping[str, Any], log: Log, title: str) -> Figure:
    """Draw heat maps of the similarity of anchors to originals, and the retrieval accuracy per epoch.

    Parameters
    ----------
    drawn
        Patches to draw, at least one.
    measured
        ``store``, ``retrieval``, ``chance``, ``anchors`` and ``patches`` of the similarity rule.
    log
        Lines of `read_log`.
    title
        What was measured.

    Raises
    ------
    InputError
        No patch has two nuclei.
    """
    if not len(drawn) or measured["retrieval"] is None:
        raise InputError("figure 4c: got no patch with two nuclei or more, expected at least one")
    with matplotlib.rc_context(STYLE):
        count = len(drawn)
        figure = Figure(figsize=(2.7 * count + 4.2, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.15])
        for axis, patch, n, values in zip(axes, drawn.patch, drawn.counts, drawn.similarity, strict=False):
            image = axis.imshow(values[:n, :n], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
            axis.set_title(f"patch {patch}, {n} nuclei", fontsize=8)
            axis.set_xlabel("original")
            axis.tick_params(labelsize=7)
        axes[0].set_ylabel("anchor")
        figure.colorbar(image, ax=list(axes[:-1]), label="cosine similarity", shrink=0.75, pad=0.015)
        _draw_retrieval(axes[-1], log)
        figure.suptitle(
            f"{title}: {measured['retrieval']:.1%} of {measured['anchors']:,} anchors find their nucleus in "
            f"{measured['patches']:,} patches of {measured['store']} (chance {measured['chance']:.1%})",
            fontsize=10,
            weight="bold",
        )
    return figure


def _draw_retrieval(axis: Axes, log: Log) -> None:
    lines = (
        ("retrieval", "retrieval", "#1A1A1A"),
        ("own", "similarity to own original", "#B2182B"),
        ("others", "similarity to others", "#2166AC"),
        ("spread", "spread of embeddings", _TRAIN),
    )
    for name, label, colour in lines:
        epochs, values = _series(log, "val", name)
        axis.plot(epochs, values, label=label, color=colour, marker="o", markersize=2.5, linewidth=1.3)
    axis.set_title("validation patches of pretraining", fontsize=8)
    axis.set_ylim(min(0, axis.get_ylim()[0]), 1.05)
    axis.legend(fontsize=7, frameon=False, loc="center right")
    _tidy(axis)


def _series(log: Log, part: str, name: str) -> tuple[list[int], list[float]]:
    lines = [line for line in log if line[part]]
    values = [line[part][name] for line in lines]
    return [line["epoch"] for line in lines], [float("nan") if value is None else value for value in values]


def _tidy(axis: Axes) -> None:
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
