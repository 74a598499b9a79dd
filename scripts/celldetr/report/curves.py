"""Learning curves as a picture."""

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from celldetr.runtime.files import atomic


def draw_curves(path: str | os.PathLike[str], history: Sequence[dict[str, Any]], best: int | None) -> None:
    """Draw the losses and the validation scores of a run.

    Parameters
    ----------
    path
        PNG file to write.
    history
        Lines of the log, one per epoch.
    best
        Epoch whose weights became the model, marked by a line.
    """
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    total, parts, found = figure.subplots(1, 3)
    trained = [line for line in history if line["train"]]
    validated = [line for line in history if line["val"]]
    losses = [line["train"]["loss"] for line in trained]
    total.plot([line["epoch"] for line in trained], losses, label="training", color="0.5")
    when = [line["epoch"] for line in validated]
    if validated:
        total.plot(when, [line["val"]["loss"] for line in validated], label="validation", color="C0")
        names = [name for name in ("nucleus", "l1", "giou", "classes", "contrastive") if name in validated[0]["val"]]
        for index, name in enumerate(names):
            parts.plot(when, [line["val"][name] for line in validated], label=name, color=f"C{index}")
        detection = [_value(line["val"]["detection"]["f1"]) for line in validated]
        found.plot(when, detection, label="detection", color="black", linewidth=2)
        for name in (key for key in ("retrieval", "spread") if key in validated[0]["val"]):
            found.plot(when, [_value(line["val"][name]) for line in validated], label=name, linewidth=2)
        for index, name in enumerate(validated[0]["val"].get("f1", {})):
            values = [_value(line["val"]["f1"][name]) for line in validated]
            found.plot(when, values, label=name, color=f"C{index}", linewidth=1)
    learned = "Validation F" if not validated or "f1" in validated[0]["val"] else "Validation"
    titles = ("Weighted loss, all layers", "Validation losses, last layer", learned)
    for axes, title in zip((total, parts, found), titles, strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if best is not None:
            label = f"epoch {best}, the model" if axes is total else None
            axes.axvline(best, color="0.7", linestyle="--", linewidth=1, label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    found.set_ylim(0, 1)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _value(number: float | None) -> float:
    return float("nan") if number is None else number
