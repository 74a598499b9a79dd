"""Figure 3 of the paper: where models look when they represent a nucleus."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from celldetr.inference.attention import DrawnNuclei, share_inside
from celldetr.report.style import ATTENTION_COLOURS, CASING, PREDICTED_COLOUR, TRUTH_COLOUR, cased, styled
from celldetr.runtime.errors import ConfigError

VIEW_SHARE = 0.9  # of each model's attention that the view of a nucleus shows
VIEW_BOXES = (3.0, 7.0)  # smallest and largest side of a view, in sides of the box
_WEIGHTS = LinearSegmentedColormap.from_list("weights", ATTENTION_COLOURS)
_DASHED: Any = (0, (2.5, 1.5))
_SCALE_BARS = (1, 2, 5, 10, 20, 50)  # um

View = tuple[float, float, float, float]
"""x0, x1, y0, y1 in px."""


class SystemShare(NamedTuple):
    """Title of a model, and its mean share of attention inside the true box over `nuclei` detected ones (NaN if 0)."""

    title: str
    share: float
    nuclei: int


@styled
def figure3(drawn: Sequence[DrawnNuclei], systems: Sequence[SystemShare]) -> Figure:
    """Draw sampling points over nuclei: a row per nucleus, a column per model.

    Points are sized and coloured by attention weight. The number below a panel is the share of the weight inside the
    true box (solid outline); the predicted box is dashed. A nucleus without a detection is marked as missed.

    Raises
    ------
    ConfigError
        Nothing to draw.
    """
    if not len(drawn[0]):
        raise ConfigError("figure 3: got no nuclei to draw, expected at least one in the test fold")
    n_rows, n_columns = len(drawn[0]), 1 + len(drawn)
    width, height = 1.75 * n_columns + 0.75, 1.95 * n_rows + 1.05
    figure = Figure(figsize=(width, height))
    edges = {"left": 0.3 / width, "right": 1 - 0.62 / width, "top": 1 - 0.5 / height, "bottom": 0.72 / height}
    axes = figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.06, "hspace": 0.17})
    weights = np.concatenate([item.weights[item.found].ravel() for item in drawn])
    largest = float(np.percentile(weights, 99.5)) if weights.size else 1.0  # top of the scale of all panels
    for row in range(n_rows):
        label = int(drawn[0].label[row])
        axes[row, 0].set_ylabel(drawn[0].classes[label] if label >= 0 else "no label", labelpad=4)
        view = _view(drawn, row)
        _draw_tissue(axes[row, 0], drawn[0], row, view)
        for column, of_system in enumerate(drawn, start=1):
            _draw_attention(axes[row, column], of_system, row, view, largest)
    axes[0, 0].set_title("H&E", weight="bold", pad=5)
    for axis, system in zip(axes[0, 1:], systems, strict=True):
        _head(axis, system)
    _legend(figure, axes, largest)
    return figure


def _view(drawn: Sequence[DrawnNuclei], row: int) -> View:
    """Smallest square around a nucleus that shows `VIEW_SHARE` of each model's attention, within `VIEW_BOXES`."""
    box = drawn[0].true_box[row].astype(np.float64)
    centre, side = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max())
    reach = 0.0
    for item in drawn:
        if item.found[row]:
            distance = np.abs(item.points[row].astype(np.float64) - centre).max(axis=-1)
            order = np.argsort(distance)
            total = np.cumsum(item.weights[row][order].astype(np.float64))
            reach = max(reach, float(distance[order][np.searchsorted(total, VIEW_SHARE * total[-1])]))
    patch_size = drawn[0].image.shape[1]
    half = min(0.5 * float(np.clip(2.1 * reach, VIEW_BOXES[0] * side, VIEW_BOXES[1] * side)), patch_size / 2)
    low = np.clip(centre - half, 0, patch_size - 2 * half)
    return float(low[0]), float(low[0] + 2 * half), float(low[1]), float(low[1] + 2 * half)


def _show(axis: Axes, image: NDArray[np.uint8], view: View) -> None:
    axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="bilinear", vmin=0, vmax=255)
    axis.set(xlim=view[:2], ylim=view[3:1:-1], xticks=[], yticks=[])


def _outline(axis: Axes, box: NDArray[np.floating], colour: str, style: Any = "-", width: float = 1.2) -> None:
    x0, y0, x1, y1 = map(float, box)
    line = {"edgecolor": colour, "linewidth": width, "linestyle": style}
    casing = cased(width + 0.9, "white", alpha=0.8)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, path_effects=casing, **line))


def _draw_tissue(axis: Axes, drawn: DrawnNuclei, row: int, view: View) -> None:
    """Draw the patch with the true box and a scale bar."""
    _show(axis, drawn.image[row], view)
    _outline(axis, drawn.true_box[row], TRUTH_COLOUR)
    side = view[1] - view[0]
    length = max((um for um in _SCALE_BARS if um / drawn.mpp <= 0.45 * side), default=1)
    pixels, x, y = length / drawn.mpp, view[1] - 0.06 * side, view[3] - 0.06 * side
    casing = cased(3, "white")
    axis.plot([x - pixels, x], [y, y], color="black", linewidth=1.6, solid_capstyle="butt", path_effects=casing)
    place: Any = {"ha": "center", "va": "bottom", "fontsize": 7}
    axis.text(x - pixels / 2, y - 0.03 * side, f"{length} µm", path_effects=casing, **place)


def _draw_attention(axis: Axes, drawn: DrawnNuclei, row: int, view: View, largest: float) -> None:
    """Draw the sampling points of a model over the patch in grey, with the true and the predicted box."""
    grey = drawn.image[row].astype(np.float64) @ [0.299, 0.587, 0.114]
    _show(axis, np.repeat((60 + grey[..., None] * 0.72).clip(0, 255).astype(np.uint8), 3, axis=2), view)
    _outline(axis, drawn.true_box[row], TRUTH_COLOUR)
    if not drawn.found[row]:
        axis.set_xlabel("missed", fontsize=8, labelpad=2, weight="bold")
        return
    _outline(axis, drawn.box[row], PREDICTED_COLOUR, _DASHED, 0.8)
    order = np.argsort(drawn.weights[row], kind="stable")
    points, weights = drawn.points[row][order], drawn.weights[row][order]
    axis.scatter(
        points[:, 0],
        points[:, 1],
        s=1.5 + 24.0 * np.clip(weights / largest, 0, 1),  # area in square points; never vanishes
        c=weights,
        cmap=_WEIGHTS,
        norm=Normalize(0, largest),
        linewidths=0.35,
        edgecolors=CASING,
        zorder=3,
    )
    share = share_inside(points[None], weights[None], drawn.true_box[row][None])[0]
    (x0, x1, y0, y1), (x, y) = view, points.T
    unseen = float(weights[(x < x0) | (x > x1) | (y < y0) | (y > y1)].sum() / weights.sum())
    text = f"{100 * share:.0f} % in box"
    axis.set_xlabel(f"{text}, {100 * unseen:.0f} % off view" if unseen >= 0.005 else text, fontsize=8, labelpad=2)


def _head(axis: Axes, system: SystemShare) -> None:
    """Write the title of a model and its share above its column."""
    known = f"{100 * system.share:.1f} % in box, n = {system.nuclei:,}" if system.nuclei else "no nucleus detected"
    axis.set_title(known, fontsize=8, pad=4)
    place: Any = {"xytext": (0, 16), "textcoords": "offset points", "xycoords": "axes fraction", "ha": "center"}
    axis.annotate(system.title, (0.5, 1), va="bottom", weight="bold", parse_math=False, **place)


def _legend(figure: Figure, axes: NDArray[Any], largest: float) -> None:
    """Draw the colour bar at the right, and the key below."""
    width, height = figure.get_size_inches()
    top, bottom = axes[0, -1].get_position().y1, axes[-1, -1].get_position().y0
    tall = min(top - bottom, 2.4 / height)
    bar = figure.add_axes((1 - 0.52 / width, (top + bottom - tall) / 2, 0.1 / width, tall))
    scale = figure.colorbar(ScalarMappable(Normalize(0, 100 * largest), _WEIGHTS), cax=bar)
    scale.set_label("attention weight of a point, %", fontsize=8, labelpad=1)
    scale.ax.tick_params(labelsize=7, length=2)
    note = "Above a column: mean over the detected nuclei (n) of the test fold. Below a panel: this nucleus."
    figure.text(0.5, 0.08 / height, note, ha="center", fontsize=8 * min(1, width / 5.9))
    handles = [
        Line2D([], [], color=TRUTH_COLOUR, linewidth=1.2, label="true box"),
        Line2D([], [], color=PREDICTED_COLOUR, linewidth=0.8, linestyle=_DASHED, label="predicted box"),
    ]
    place: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.26 / height), "borderaxespad": 0}
    figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=8, **place)
