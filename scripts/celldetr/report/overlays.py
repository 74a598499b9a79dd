"""Detections beside the true nuclei of some test patches."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.colours import class_colours
from celldetr.evaluation.predictions import Predictions
from celldetr.report.style import CASING, cased, styled
from celldetr.runtime.errors import InputError

_COLUMNS = 3  # pairs of panels beside each other
_LINE, _CASED = 1.2, 2.4  # widths of a line and of the dark one below it, points


def choose_patches(box_ptr: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose random patches with nuclei by the offsets (N + 1,) of their nuclei; others fill up if there are too few.

    Returns ascending indices (at most `count`,).
    """
    sizes = np.diff(box_ptr)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(sizes[order] == 0, kind="stable")]
    return np.asarray(np.sort(order[:count]), dtype=np.int64)


@styled
def overlays(
    images: NDArray[np.uint8],
    patches: NDArray[np.int64],
    truth: Sequence[tuple[NDArray[np.floating], NDArray[np.integer]]],
    predictions: Predictions,
    *,
    title: str,
    instances: NDArray[np.integer] | None = None,
) -> Figure:
    """Draw patches twice, with the true and with the predicted boxes, coloured by class.

    Patches `images` (B, S, S, 3) with their indices `patches` in the store (B,); `truth`: boxes (n, 4), xyxy px, and
    labels (n,) of each; `predictions` of the whole fold. If these have masks, outlines are drawn in place of boxes,
    those of the true nuclei from their instance maps `instances` (B, S, S).

    Raises
    ------
    InputError
        There are no patches.
    """
    if len(images) == 0:
        raise InputError("overlays: got a test store without patches, expected at least one")
    columns = min(_COLUMNS, len(images))
    n_rows = -(-len(images) // columns)
    height = 2.4 * n_rows + 0.65
    figure = Figure(figsize=(4.3 * columns + 0.1, height))
    edges = {"left": 0.01, "right": 0.99, "top": 1 - 0.5 / height, "bottom": 0.36 / height}
    grid = figure.add_gridspec(n_rows, columns, **edges, wspace=0.05, hspace=0.12)
    colours = class_colours(predictions.classes)
    for index, patch in enumerate(patches):
        pair = grid[index // columns, index % columns].subgridspec(1, 2, wspace=0.02)
        found = predictions.select(predictions.patch == patch)
        boxes, labels = truth[index]
        left, right = (figure.add_subplot(pair[side]) for side in range(2))
        for axis, drawn, of in ((left, boxes, labels), (right, found.boxes, found.labels)):
            _show(axis, images[index])
            line_colours = [colours[label] for label in of]
            if instances is None:
                _draw_boxes(axis, drawn, line_colours)
            else:
                maps = instances[index] if axis is left else found.instances(int(patch), images.shape[1])
                _draw_outlines(axis, maps, line_colours)
        left.set_title(f"patch {patch}: {len(boxes)} true", fontsize=8, pad=2)
        right.set_title(f"{len(found)} predicted", fontsize=8, pad=2)
    key = list(zip(predictions.classes, colours, strict=False))
    if any((labels < 0).any() for _, labels in truth):
        key.insert(0, ("no label", colours[-1]))
    handles = [Line2D([], [], color=colour, linewidth=2, label=name, path_effects=cased(3.4)) for name, colour in key]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9, borderaxespad=0.3)
    figure.suptitle(title, y=1 - 0.1 / height, va="top", weight="bold", fontsize=10)
    return figure


def _show(axis: Axes, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _draw_boxes(axis: Axes, boxes: NDArray[np.floating], colours: Sequence[str]) -> None:
    for (x0, y0, x1, y1), colour in zip(boxes.tolist(), colours, strict=True):
        for line, linewidth in ((CASING, _CASED), (colour, _LINE)):
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=line, linewidth=linewidth))


def _draw_outlines(axis: Axes, instances: NDArray[np.integer], colours: Sequence[str]) -> None:
    """Draw the outlines of an instance map (S, S), whose k-th nucleus has the k-th colour."""
    for index, place in enumerate(ndimage.find_objects(instances)):
        if place is None:  # its pixels belong to nuclei on top of it
            continue
        mask = np.pad(instances[place] == index + 1, 1).astype(float)
        y, x = (side.start - 0.5 + np.arange(length) for side, length in zip(place, mask.shape, strict=True))
        outline = axis.contour(x, y, mask, levels=[0.5], colors=[colours[index]], linewidths=_LINE)
        outline.set_path_effects(cased(_CASED))
