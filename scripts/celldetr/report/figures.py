"""Pictures for people: attention on a few nuclei (paper, figure 3), and predictions beside the truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke
from numpy.typing import NDArray

from celldetr.evaluation.predictions import Predictions
from celldetr.inference.attention import DrawnNuclei, check_same_nuclei, share_inside
from celldetr.report.style import STYLE, colour_of
from celldetr.runtime.errors import InputError

TRUTH_COLOUR = "#D55E00"
POINTS = LinearSegmentedColormap.from_list("points", ["#1B2A6B", "#2A7FB8", "#7FD3C4", "#FFF59A"])
VIEW_SHARE = 0.9  # of every model's attention that the view of a nucleus shows
VIEW_BOXES = (3.0, 7.0)  # smallest and largest side of a view, in sides of the nucleus' box


@dataclass(frozen=True)
class SystemShare:
    """Title of a model and its share of attention inside the true box over the test fold.

    Attributes
    ----------
    title
        Title in the figure.
    share
        Mean over `nuclei`; NaN if there are none.
    nuclei
        True nuclei with a detection.
    """

    title: str
    share: float
    nuclei: int


def figure3(drawn: Sequence[DrawnNuclei], systems: Sequence[SystemShare]) -> Figure:
    """Draw sampling points over nuclei: a row per nucleus, a column per model.

    Points are sized and coloured by attention weight. The number below a panel is the share of the weight inside the
    true box (solid outline); the predicted box is dashed. A nucleus without a detection is marked as missed.

    Parameters
    ----------
    drawn
        One entry per model, all of the same nuclei.
    systems
        Titles and shares, in the same order.

    Raises
    ------
    ConfigError, InputError
        Nothing to draw, or the models were run on different nuclei.
    """
    check_same_nuclei(drawn, [system.title for system in systems])
    n_rows, n_columns = len(drawn[0]), 1 + len(drawn)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.75 * n_columns + 0.75, 1.95 * n_rows + 1.05))
        FigureCanvasAgg(figure)
        width, height = figure.get_size_inches()
        axes = figure.subplots(
            n_rows,
            n_columns,
            squeeze=False,
            gridspec_kw={
                "left": 0.3 / width,
                "right": 1 - 0.62 / width,
                "top": 1 - 0.5 / height,
                "bottom": 0.72 / height,
                "wspace": 0.06,
                "hspace": 0.17,
            },
        )
        largest = _largest_weight(drawn)
        for row in range(n_rows):
            label = int(drawn[0].label[row])
            axes[row, 0].set_ylabel(drawn[0].classes[label] if label >= 0 else "no label", labelpad=4)
            view = _view(drawn, row)
            _draw_tissue(axes[row, 0], drawn[0], row, view)
            for column, of_system in enumerate(drawn, start=1):
                _draw_attention(axes[row, column], of_system, row, view, largest)
        _label(figure, axes, systems)
        _legend(figure, axes, largest)
    return figure


def _largest_weight(drawn: Sequence[DrawnNuclei]) -> float:
    """Weight at the top of the scale, the same for all panels."""
    weights = np.concatenate([item.weights[item.found].ravel() for item in drawn])
    return float(np.percentile(weights, 99.5)) if weights.size else 1.0


def _view(drawn: Sequence[DrawnNuclei], row: int) -> tuple[float, float, float, float]:
    """Square around a nucleus (x0, x1, y0, y1), px: as small as shows most of each model's attention."""
    box = drawn[0].true_box[row].astype(np.float64)
    centre, side = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max())
    reach = 0.0
    for item in drawn:
        if item.found[row]:
            distance = np.abs(item.points[row].astype(np.float64) - centre).max(axis=-1)
            order = np.argsort(distance)
            total = np.cumsum(item.weights[row][order].astype(np.float64))
            reach = max(reach, float(distance[order][np.searchsorted(total, VIEW_SHARE * total[-1])]))
    half = 0.5 * float(np.clip(2.1 * reach, VIEW_BOXES[0] * side, VIEW_BOXES[1] * side))
    half = min(half, drawn[0].image.shape[1] / 2)
    low = np.clip(centre - half, 0, drawn[0].image.shape[1] - 2 * half)
    return float(low[0]), float(low[0] + 2 * half), float(low[1]), float(low[1] + 2 * half)


def _show(axis: Axes, image: NDArray[np.uint8], view: tuple[float, float, float, float]) -> None:
    axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="bilinear", vmin=0, vmax=255)
    axis.set(xlim=view[:2], ylim=view[3:1:-1], xticks=[], yticks=[])


def _outline(axis: Axes, box: NDArray[np.floating], colour: str, style: Any = "-", width: float = 1.2) -> None:
    x0, y0, x1, y1 = map(float, box)
    axis.add_patch(
        Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=colour,
            linewidth=width,
            linestyle=style,
            path_effects=[withStroke(linewidth=width + 0.9, foreground="white", alpha=0.8), Normal()],
        )
    )


def _draw_tissue(axis: Axes, drawn: DrawnNuclei, row: int, view: tuple[float, float, float, float]) -> None:
    _show(axis, drawn.image[row], view)
    _outline(axis, drawn.true_box[row], TRUTH_COLOUR)
    length = max((um for um in (1, 2, 5, 10, 20, 50) if um / drawn.mpp <= 0.45 * (view[1] - view[0])), default=1)
    pixels, side = length / drawn.mpp, view[1] - view[0]
    x, y = view[1] - 0.06 * side, view[3] - 0.06 * side
    casing = [withStroke(linewidth=3, foreground="white"), Normal()]
    axis.plot([x - pixels, x], [y, y], color="black", linewidth=1.6, solid_capstyle="butt", path_effects=casing)
    axis.text(
        x - pixels / 2, y - 0.03 * side, f"{length} µm", ha="center", va="bottom", fontsize=7, path_effects=casing
    )


def _draw_attention(
    axis: Axes, drawn: DrawnNuclei, row: int, view: tuple[float, float, float, float], largest: float
) -> None:
    image = drawn.image[row].astype(np.float64)
    grey = image @ [0.299, 0.587, 0.114]
    _show(axis, np.repeat((60 + grey[..., None] * 0.72).clip(0, 255).astype(np.uint8), 3, axis=2), view)
    _outline(axis, drawn.true_box[row], TRUTH_COLOUR)
    if not drawn.found[row]:
        axis.set_xlabel("missed", fontsize=8, labelpad=2, weight="bold")
        return
    _outline(axis, drawn.box[row], "black", (0, (2.5, 1.5)), 0.8)
    points, weights = drawn.points[row], drawn.weights[row]
    order = np.argsort(weights, kind="stable")
    axis.scatter(
        points[order, 0],
        points[order, 1],
        s=_area(weights[order], largest),
        c=weights[order],
        cmap=POINTS,
        norm=Normalize(0, largest),
        linewidths=0.35,
        edgecolors="#101010",
        zorder=3,
    )
    share = share_inside(points[None], weights[None], drawn.true_box[row][None])[0]
    (x0, x1, y0, y1), (x, y) = view, points.T
    unseen = float(weights[(x < x0) | (x > x1) | (y < y0) | (y > y1)].sum() / weights.sum())
    text = f"{100 * share:.0f} % in box"
    axis.set_xlabel(f"{text}, {100 * unseen:.0f} % off view" if unseen >= 0.005 else text, fontsize=8, labelpad=2)


def _area(weights: NDArray[np.floating], largest: float) -> NDArray[np.float64]:
    """Area of a point in square points; grows with the weight and never vanishes."""
    return np.asarray(1.5 + 24.0 * np.clip(weights / largest, 0, 1), dtype=np.float64)


def _label(figure: Figure, axes: NDArray[Any], systems: Sequence[SystemShare]) -> None:
    axes[0, 0].set_title("H&E", weight="bold", pad=5)
    for axis, system in zip(axes[0, 1:], systems, strict=True):
        known = f"{100 * system.share:.1f} % in box, n = {system.nuclei:,}" if system.nuclei else "no nucleus detected"
        axis.set_title(known, fontsize=8, pad=4)
        axis.annotate(
            system.title,
            (0.5, 1),
            xytext=(0, 16),
            textcoords="offset points",
            xycoords="axes fraction",
            ha="center",
            va="bottom",
            weight="bold",
        )


def _legend(figure: Figure, axes: NDArray[Any], largest: float) -> None:
    width, height = figure.get_size_inches()
    top, bottom = axes[0, -1].get_position().y1, axes[-1, -1].get_position().y0
    tall = min(top - bottom, 2.4 / height)
    bar = figure.add_axes((1 - 0.52 / width, (top + bottom - tall) / 2, 0.1 / width, tall))
    scale = figure.colorbar(ScalarMappable(Normalize(0, 100 * largest), POINTS), cax=bar)
    scale.set_label("attention weight of a point, %", fontsize=8)
    scale.ax.tick_params(labelsize=7, length=2)
    handles = [
        Line2D([], [], color=TRUTH_COLOUR, linewidth=1.2, label="true box"),
        Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (2.5, 1.5)), label="predicted box"),
    ]
    figure.text(
        0.5,
        0.08 / height,
        "Above a column: mean over the detected nuclei (n) of the test fold. Below a panel: this nucleus.",
        ha="center",
        fontsize=8,
    )
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.26 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        borderaxespad=0,
    )


def choose_patches(box_ptr: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose patches with nuclei at random, in order; without enough of them, patches without nuclei join.

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
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(sizes[order] == 0, kind="stable")]
    return np.asarray(np.sort(order[:count]), dtype=np.int64)


def overlays(
    images: NDArray[np.uint8],
    patches: NDArray[np.int64],
    truth: Sequence[tuple[NDArray[np.floating], NDArray[np.integer]]],
    predictions: Predictions,
    *,
    title: str,
    columns: int = 3,
) -> Figure:
    """Draw patches twice, with the true boxes and with the predicted ones, coloured by class.

    Parameters
    ----------
    images
        Patches (B, S, S, 3).
    patches
        Their indices in the store (B,).
    truth
        Boxes (n, 4), xyxy px, and labels (n,) of each patch.
    predictions
        Detections of the whole fold.
    title
        Title of the picture.
    columns
        Pairs of panels beside each other.
    """
    if len(images) == 0:
        raise InputError("overlays: got a test store without patches, expected at least one")
    columns = min(columns, len(images))
    n_rows = -(-len(images) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * columns + 0.1, 2.4 * n_rows + 0.65))
        FigureCanvasAgg(figure)
        height = figure.get_size_inches()[1]
        grid = figure.add_gridspec(
            n_rows, columns, left=0.01, right=0.99, top=1 - 0.5 / height, bottom=0.36 / height, wspace=0.05, hspace=0.12
        )
        for index, patch in enumerate(patches):
            pair = grid[index // columns, index % columns].subgridspec(1, 2, wspace=0.02)
            found = predictions.select(predictions.patch == patch)
            sides = (("truth", *truth[index]), ("predicted", found.boxes, found.labels))
            for side, (word, boxes, labels) in enumerate(sides):
                axis = figure.add_subplot(pair[side])
                _show(axis, images[index], (0, images.shape[2], 0, images.shape[1]))
                _draw_boxes(axis, boxes, labels)
                name = f"patch {patch}: {len(boxes)} true" if side == 0 else f"{len(boxes)} {word}"
                axis.set_title(name, fontsize=8, pad=2)
        used = sorted({int(label) for _, labels in truth for label in labels} | set(range(len(predictions.classes))))
        _class_legend(figure, used, predictions.classes)
        figure.suptitle(title, y=1 - 0.1 / height, va="top", weight="bold", fontsize=10)
    return figure


def _draw_boxes(axis: Axes, boxes: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
    for box, label in zip(boxes, labels, strict=True):
        x0, y0, x1, y1 = map(float, box)
        for colour, width in (("#1A1A1A", 1.7), (colour_of(int(label)), 1.0)):
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width))


def _class_legend(figure: Figure, labels: Sequence[int], classes: Sequence[str]) -> None:
    casing = [withStroke(linewidth=3.4, foreground="#1A1A1A"), Normal()]
    handles = [
        Line2D(
            [],
            [],
            color=colour_of(label),
            linewidth=2,
            label=classes[label] if label >= 0 else "no label",
            path_effects=casing,
        )
        for label in labels
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9, borderaxespad=0.3)
