"""Figure 5 of the paper: nuclei per cell type in the Xenium patches (a), and which types are confused (b)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from celldetr.config.colours import class_colours
from celldetr.evaluation.matching import pair_nuclei
from celldetr.evaluation.predictions import Predictions
from celldetr.evaluation.scoring import predicted_nuclei, truth_nuclei
from celldetr.report.style import LINE_COLOUR, styled
from celldetr.store import PatchStore

MISSED = "missed"
UNLABELLED = "unlabelled"
_BARS_ACROSS = 4  # samples beside each other in figure 5a


def composition(counts: Mapping[str, Mapping[str, int]]) -> pd.DataFrame:
    """Tabulate the attribute ``counts`` of stores: samples (rows) by class (columns, the unlabelled last)."""
    return pd.DataFrame(counts).T.astype(np.int64)


def confusion(predictions: Predictions, store: PatchStore, nucleus_threshold: float, radius_um: float) -> pd.DataFrame:
    """Count nuclei of each true class (rows) by predicted class (columns, the missed last).

    Detections with a nucleus score of at least `nucleus_threshold` count with their best class, however low its score:
    the table shows which classes are confused, not which are certain. Nuclei are paired as for the scores, by the
    distance of box centres up to `radius_um`. Unlabelled nuclei are left out.

    Raises
    ------
    InputError
        The predictions were made on another store.
    """
    predictions.check_store(store)
    kept = predictions.select(predictions.nucleus_score >= nucleus_threshold)
    truth, predicted = truth_nuclei(store), predicted_nuclei(kept)
    pairs = pair_nuclei(truth, predicted, radius_um / store.mpp)
    found = np.full(len(truth.labels), len(store.classes), dtype=np.int64)
    found[pairs.truth] = predicted.labels[pairs.predicted]
    table = np.zeros((len(store.classes), len(store.classes) + 1), dtype=np.int64)
    labelled = truth.labels >= 0
    np.add.at(table, (truth.labels[labelled].astype(np.int64), found[labelled]), 1)
    return pd.DataFrame(table, index=list(store.classes), columns=[*store.classes, MISSED])


@styled
def figure5a(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Draw the `composition` of each sample as bars; its title has the number of nuclei and the share with a type."""
    across = min(len(table), _BARS_ACROSS)
    down = -(-len(table) // across)
    figure = Figure(figsize=(2.6 + 2.3 * across, 3.4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axis in axes[len(table) :]:
        axis.remove()
    colours = class_colours([str(name) for name in table if name != UNLABELLED])
    places = np.arange(len(colours))[::-1]
    for axis, (sample, row) in zip(axes[: len(table)], table.iterrows(), strict=True):
        bars = axis.barh(places, row, color=colours, edgecolor=LINE_COLOUR, linewidth=0.5)
        axis.bar_label(bars, [f"{value:,}" for value in row], padding=2, fontsize=7)
        axis.set_yticks(places, list(table.columns))
        axis.margins(x=0.22)
        share = 1 - row[UNLABELLED] / max(1, row.sum())
        axis.set_title(
            f"{titles[str(sample)]}\n{row.sum():,} nuclei, {share:.0%} with a type", fontsize=8, parse_math=False
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=7)
    axes[0].set_xlabel("nuclei in patches")
    return figure


@styled
def figure5b(table: pd.DataFrame, title: str) -> Figure:
    """Draw a `confusion` of types; rows sum to 1 and are labelled with the number of true nuclei."""
    totals = table.sum(axis=1)
    shares = table.div(totals.replace(0, np.nan), axis=0).to_numpy(float)
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(shares):
        if value >= 0.005:  # not NaN
            colour = "white" if value > 0.55 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(table.shape[1]), list(table.columns), rotation=45, ha="right")
    axis.set_yticks(range(len(table)), [f"{name} ({n:,})" for name, n in totals.items()])
    axis.axvline(table.shape[1] - 1.5, color=LINE_COLOUR, linewidth=0.8)
    axis.set_xlabel("predicted type")
    axis.set_ylabel("type by gene expression (nuclei)")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, label="share of the true nuclei")
    return figure
