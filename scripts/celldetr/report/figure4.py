"""Figures 4b and 4c of the paper: losses of contrastive pretraining, and how well anchors find their nuclei."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from celldetr.evaluation.similarity import DrawnSimilarities
from celldetr.report.curves import draw_series, tidy
from celldetr.report.style import SIMILARITY_COLOURS, TRAIN_COLOUR, VAL_COLOUR, styled
from celldetr.runtime.errors import InputError

_LOSSES = {
    "loss": "weighted sum",
    "contrastive": "contrastive",
    "nucleus": "nucleus (focal)",
    "l1": "box L1",
    "giou": "box GIoU",
}
_RETRIEVAL = {
    "retrieval": "retrieval",
    "own": "similarity to own original",
    "others": "similarity to others",
    "spread": "spread of embeddings",
}
_LINE: Any = {"marker": "o", "markersize": 2.5, "linewidth": 1.3}


@styled
def figure4b(log: pd.DataFrame, title: str) -> Figure:
    """Draw the losses in training and validation per epoch: the weighted sum, and its parts without weights."""
    figure = Figure(figsize=(11.5, 2.9), layout="constrained")
    for axis, (name, heading) in zip(figure.subplots(1, len(_LOSSES)), _LOSSES.items(), strict=True):
        for part, label, colour in (("train", "training", TRAIN_COLOUR), ("val", "validation", VAL_COLOUR)):
            draw_series(axis, log, f"{part}.{name}", label=label, color=colour, **_LINE)
        axis.set_title(heading, fontsize=9)
        tidy(axis)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("loss")
    figure.suptitle(title, fontsize=10, weight="bold", parse_math=False)
    return figure


@styled
def figure4c(drawn: DrawnSimilarities, measured: Mapping[str, Any], log: pd.DataFrame, title: str) -> Figure:
    """Draw heat maps of the similarity of anchors to originals, and the retrieval accuracy per epoch.

    `measured`: ``store``, ``retrieval``, ``chance``, ``anchors`` and ``patches`` of the similarity rule.

    Raises
    ------
    InputError
        No patch has two nuclei.
    """
    if not len(drawn) or measured["retrieval"] is None:
        raise InputError("figure 4c: got no patch with two nuclei or more, expected at least one")
    count = len(drawn)
    figure = Figure(figsize=(2.7 * count + 4.2, 3.5), layout="constrained")
    *maps, right = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.15])
    for axis, patch, n, values in zip(maps, drawn.patch, drawn.counts, drawn.similarity, strict=True):
        image = axis.imshow(values[:n, :n], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(f"patch {patch}, {n} nuclei", fontsize=8)
        axis.set_xlabel("original")
        axis.tick_params(labelsize=7)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
    maps[0].set_ylabel("anchor")
    figure.colorbar(image, ax=maps, label="cosine similarity", shrink=0.75, pad=0.015)
    _draw_retrieval(right, log)
    figure.suptitle(
        f"{title}: {measured['retrieval']:.1%} of {measured['anchors']:,} anchors find their nucleus in "
        f"{measured['patches']:,} patches of {measured['store']} (chance {measured['chance']:.1%})",
        fontsize=10,
        weight="bold",
        parse_math=False,
    )
    return figure


def _draw_retrieval(axis: Axes, log: pd.DataFrame) -> None:
    for (name, label), colour in zip(_RETRIEVAL.items(), SIMILARITY_COLOURS, strict=True):
        draw_series(axis, log, f"val.{name}", label=label, color=colour, **_LINE)
    axis.set_title("validation patches of pretraining", fontsize=8)
    axis.set_ylim(min(0, axis.get_ylim()[0]), 1.05)
    axis.legend(fontsize=7, frameon=False, loc="center right")
    tidy(axis)
