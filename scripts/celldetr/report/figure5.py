"""Figure 5 of the paper: nuclei per cell type in the Xenium patches (a), and which types are confused (b)."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from celldetr.evaluation.matching import pair_nuclei
from celldetr.evaluation.predictions import Predictions, ScoreRule
from celldetr.evaluation.scoring import predicted_nuclei, truth_nuclei
from celldetr.evaluation.truth import TruthStore
from celldetr.report.style import STYLE, UNLABELLED_COLOUR, colour_of
from celldetr.runtime.errors import InputError

MISSED = "missed"
UNLABELLED = "unlabelled"
_BARS_ACROSS = 4  # samples beside each other in figure 5a


def composition(counts: Mapping[str, Mapping[str, int]]) -> pd.DataFrame:
    """Table of nuclei per sample (rows) and class (columns, the unlabelled last).

    Parameters
    ----------
    counts
        Sample -> the attribute ``counts`` of its store.

    Raises
    ------
    InputError
        No samples, or samples of different classes.
    """
    if not counts:
        raise InputError("figure 5: got no samples, expected the store of at least one")
    kinds = {tuple(values) for values in counts.values()}
    if len(kinds) > 1:
        raise InputError(f"figure 5: got samples of different classes {sorted(kinds)}; make their stores again")
    return pd.DataFrame(counts).T.astype(np.int64)


def confusion(predictions: Predictions, store: TruthStore, nucleus_threshold: float, radius: float) -> pd.DataFrame:
    """Count nuclei of each true class (rows) by what was predicted for them (columns, the missed last).

    Detections with a nucleus score of at least `nucleus_threshold` count, with their best class however low its score:
    the table tells which classes are confused, not which are sure. They are paired as for the scores: by the distance
    of box centres, up to `radius` px. Nuclei without a label are left out.

    Raises
    ------
    InputError
        Predictions and store do not belong together.
    """
    if predictions.classes != tuple(store.classes) or predictions.n_patches != store.n_patches:
        raise InputError(
            f"predictions are of {predictions.n_patches} patches with classes {predictions.classes}, the store has "
            f"{store.n_patches} with {tuple(store.classes)}; predict again"
        )
    kept = ScoreRule("both_thresholds", nucleus_threshold, class_threshold=0.0).keep(predictions)
    truth, predicted = truth_nuclei(store), predicted_nuclei(kept)
    pairs = pair_nuclei(truth, predicted, radius)
    found = np.full(len(truth.labels), len(store.classes), dtype=np.int64)
    found[pairs.truth] = predicted.labels[pairs.predicted]
    table = np.zeros((len(store.classes), len(store.classes) + 1), dtype=np.int64)
    known = truth.labels >= 0
    np.add.at(table, (truth.labels[known].astype(np.int64), found[known]), 1)
    return pd.DataFrame(table, index=list(store.classes), columns=[*store.classes, MISSED])


def figure5a(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Draw the composition of each sample as a bar, nuclei per type; the share with a label stands in its title.

    Parameters
    ----------
    table
        Result of `composition`.
    titles
        Sample -> what it is called in the figure.
    """
    with matplotlib.rc_context(STYLE):
        across = min(len(table), _BARS_ACROSS)
        down = -(-len(table) // across)
        figure = Figure(figsize=(2.6 + 2.3 * across, 3.4 * down), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for axis in axes[len(table) :]:
            axis.remove()
        for axis, (sample, row) in zip(axes[: len(table)], table.iterrows(), strict=True):
            colours = [UNLABELLED_COLOUR if name == UNLABELLED else colour_of(k) for k, name in enumerate(table)]
            places = np.arange(len(row))[::-1]
            bars = axis.barh(places, row, color=colours, edgecolor="#444444", linewidth=0.5)
            axis.bar_label(bars, [f"{value:,}" for value in row], padding=2, fontsize=7)
            axis.set_yticks(places, list(table.columns))
            axis.margins(x=0.22)
            share = 1 - row[UNLABELLED] / max(1, row.sum())
            axis.set_title(f"{titles[str(sample)]}\n{row.sum():,} nuclei, {share:.0%} with a type", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="x", labelsize=7)
        axes[0].set_xlabel("nuclei in patches")
    return figure


def figure5b(table: pd.DataFrame, title: str) -> Figure:
    """Draw the confusion of types: rows sum to 1, the number of true nuclei stands at each.

    Parameters
    ----------
    table
        Result of `confusion`.
    title
        What was predicted.
    """
    totals = table.sum(axis=1).to_numpy()
    shares = table.div(table.sum(axis=1).replace(0, np.nan), axis=0).to_numpy(float)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        _write_shares(axis, shares)
        axis.set_xticks(range(table.shape[1]), list(table.columns), rotation=45, ha="right")
        axis.set_yticks(range(len(table)), [f"{name} ({n:,})" for name, n in zip(table.index, totals, strict=True)])
        axis.axvline(table.shape[1] - 1.5, color="#444444", linewidth=0.8)
        axis.set_xlabel("predicted type")
        axis.set_ylabel("type by gene expression (nuclei)")
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, label="share of the true nuclei")
    return figure


def _write_shares(axis: Axes, shares: NDArray[np.float64]) -> None:
    for row, column in np.ndindex(*shares.shape):
        value = shares[row, column]
        if np.isfinite(value) and value >= 0.005:
            colour = "white" if value > 0.55 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
