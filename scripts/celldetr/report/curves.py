"""Learning curves of a training run."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from celldetr.config.colours import class_colours
from celldetr.report.style import CASING, SERIES_COLOURS, TRAIN_COLOUR, VAL_COLOUR, cased, styled
from celldetr.runtime.errors import InputError

_LOSSES = ("nucleus", "l1", "giou", "classes", "contrastive")
_DASHES = ("-", "--", ":")  # of further lines, when the colours are used up


def read_log(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the log of a training run: a row per epoch, columns like ``train.loss`` and ``val.detection.f1``.

    In stage ssl, epoch 0 is the model before training.

    Raises
    ------
    InputError
        Not a log.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return pd.json_normalize(lines).set_index("epoch")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: got {error}, expected the log of a training run") from error


def draw_series(axes: Axes, log: pd.DataFrame, name: str, **style: Any) -> None:
    """Draw a column of the log, if there is one, at the epochs that trained or validated; NaN leaves a gap."""
    if name in log:
        part = name.partition(".")[0]
        took_part = log.filter(regex=rf"^{part}\.").notna().any(axis=1)
        values = log.loc[took_part, name].astype(float)
        axes.plot(values.index, values, **style)


def tidy(axes: Axes) -> None:
    """Give axes of epochs a grid, whole numbers, and no frame at the top and right."""
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


@styled
def draw_curves(log: pd.DataFrame, chosen: int) -> Figure:
    """Draw the losses and the validation scores of a run; a dashed line marks the epoch chosen for the model.

    Systems that segment nuclei have no losses in validation: the parts of their training loss are drawn.
    """
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    total, parts, found = figure.subplots(1, 3)
    draw_series(total, log, "train.loss", label="training", color=TRAIN_COLOUR)
    draw_series(total, log, "val.loss", label="validation", color=VAL_COLOUR)
    draw_series(found, log, "val.detection.f1", label="detection", color=CASING, linewidth=2)
    validated = [f"val.{name}" for name in _LOSSES if f"val.{name}" in log]
    trained = [name for name in log.columns.astype(str) if name.startswith("train.") and name != "train.loss"]
    looks = [{"color": colour, "linestyle": dashes} for dashes in _DASHES for colour in SERIES_COLOURS]
    if not validated:
        parts.set_yscale("log")  # their weights differ
    for name, look in zip(validated or trained, looks, strict=False):
        draw_series(parts, log, name, label=name.partition(".")[2].replace("_", " "), **look)
    for name, colour in zip(("retrieval", "spread"), SERIES_COLOURS, strict=False):
        draw_series(found, log, f"val.{name}", label=name, color=colour, linewidth=2)
    classes = [name[7:] for name in log.columns.astype(str) if name.startswith("val.f1.")]
    for name, colour in zip(classes, class_colours(classes), strict=False):
        draw_series(found, log, f"val.f1.{name}", label=name, color=colour, linewidth=1.4, path_effects=cased(2.4))
    scores = "Validation scores" if "val.retrieval" in log else "Validation F"
    losses = (
        ("Weighted loss, all layers", "Validation losses, last layer")
        if validated
        else ("Weighted loss", "Parts of the training loss")
    )
    for axes, title in zip((total, parts, found), (*losses, scores), strict=True):
        label = f"epoch {chosen}: the model" if axes is total else None
        axes.axvline(chosen, color="0.7", linestyle="--", linewidth=1, label=label)
        axes.set_title(title)
        tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    found.set_ylim(0, 1)
    return figure
