"""Learning curves of a training run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from celldetr.report.style import CASING, SERIES_COLOURS, TRAIN_COLOUR, VAL_COLOUR, cased, class_colours, styled
from celldetr.runtime.errors import InputError

Log = Sequence[dict[str, Any]]
"""Lines of log.jsonl, one per epoch, with ``epoch``, ``train`` and ``val``; the last two may be None."""
_LOSSES = ("nucleus", "l1", "giou", "classes", "contrastive")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the log of a training run; in stage ssl, epoch 0 is the model before training.

    Raises
    ------
    InputError
        Not a log.
    """
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: got {error}, expected the log of a training run") from error


def series(log: Log, part: str, *keys: str) -> tuple[list[int], list[float]]:
    """Return the epochs in which a value was measured, and its values; NaN where it is undefined.

    Parameters
    ----------
    log
        Lines of the log.
    part
        ``train`` or ``val``.
    keys
        Path of the value in that part.
    """
    epochs, values = [], []
    for line in log:
        value = line[part]
        if not value:
            continue
        for key in keys:
            value = value[key]
        epochs.append(line["epoch"])
        values.append(float("nan") if value is None else value)
    return epochs, values


def tidy(axes: Axes) -> None:
    """Give axes of epochs a grid, whole numbers, and no frame at the top and right."""
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


@styled
def draw_curves(log: Log, chosen: int) -> Figure:
    """Draw the losses and the validation scores of a run.

    Parameters
    ----------
    log
        Lines of `read_log`.
    chosen
        Epoch whose weights became the model; a dashed line marks it.
    """
    measured: dict[str, Any] = next((line["val"] for line in log if line["val"]), {})
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    total, parts, found = figure.subplots(1, 3)
    total.plot(*series(log, "train", "loss"), label="training", color=TRAIN_COLOUR)
    if measured:
        total.plot(*series(log, "val", "loss"), label="validation", color=VAL_COLOUR)
        found.plot(*series(log, "val", "detection", "f1"), label="detection", color=CASING, linewidth=2)
    for name, colour in zip((name for name in _LOSSES if name in measured), SERIES_COLOURS, strict=False):
        parts.plot(*series(log, "val", name), label=name, color=colour)
    for name, colour in zip(("retrieval", "spread"), SERIES_COLOURS, strict=False):
        if name in measured:
            found.plot(*series(log, "val", name), label=name, color=colour, linewidth=2)
    classes = list(measured.get("f1", {}))
    for name, colour in zip(classes, class_colours(classes), strict=False):
        lines = series(log, "val", "f1", name)
        found.plot(*lines, label=name, color=colour, linewidth=1.4, path_effects=cased(2.4))
    titles = ("Weighted loss, all layers", "Validation losses, last layer", "Validation F")
    for axes, title in zip((total, parts, found), titles, strict=True):
        label = f"epoch {chosen}: the model" if axes is total else None
        axes.axvline(chosen, color="0.7", linestyle="--", linewidth=1, label=label)
        axes.set_title(title)
        tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    if "retrieval" in measured:
        found.set_title("Validation scores")
    found.set_ylim(0, 1)
    return figure
