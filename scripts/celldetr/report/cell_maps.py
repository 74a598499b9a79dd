"""The cells of a slide on its tissue: which of them are drawn where, coloured by type, and density of each type."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from celldetr.report.slide_pictures import length_text, round_length, thumbnail
from celldetr.report.style import CASING, PATCH_COLOUR, PREVIEW_DPI, cased, styled
from celldetr.slides.pyramid import Pyramid

FIELD_UM = 200.0
"""Side of a field, um."""
OVERVIEW = 1400
"""Longest side of the picture of the slide, px."""
POINTS = 1_000_000
"""Most cells that are drawn on the slide."""
_FIELDS = 2  # of each kind
_PART = 0.5  # of the width and height of the slide: if cells lie in less, only that part is shown
_POINT_PX = (1.0, 9.0)  # smallest and largest diameter of a cell on the slide
_GREYS = (85.0, 195.0)  # of the slide below its cells: neither black nor white, which are colours of classes
_PAPER = (205.0, 255.0)  # of the slide below densities
_BINS = 100  # squares of a density map along the longer side of the slide
_FINEST_UM = 25.0  # side of such a square, at least
_WINDOW_UM = 50.0  # standard deviation of the window that smooths densities, at least


@dataclass(frozen=True)
class DrawnCells:
    """Cells (n) that the model has seen, and the words and colours of their groups."""

    numbers: NDArray[np.int64]
    """Rows (n,) of the file, ascending."""
    centres: NDArray[np.float64]
    """(n, 2) um from the corner of the slide."""
    sizes: NDArray[np.float64]
    """Longer side (n,) of the box, um."""
    groups: NDArray[np.int64]
    """(n,) index of the type; the last group has none."""
    certainty: NDArray[np.float64]
    """Score (n,) of the type, or of the nucleus if there is no type; NaN if unknown."""
    nucleus_score: NDArray[np.float64]
    """(n,) NaN if unknown."""
    names: tuple[str, ...]
    """Names of the groups."""
    colours: tuple[str, ...]
    """Colours of the groups."""

    def __len__(self) -> int:
        return len(self.numbers)


class View(NamedTuple):
    """The part of a slide that its maps show."""

    pixels: NDArray[np.uint8]
    """(H, W, 3)."""
    corner: NDArray[np.float64]
    """First corner (2,), um from the corner of the slide."""
    size: NDArray[np.float64]
    """Width and height (2,), um."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top, um, as matplotlib has them."""
        (x0, y0), (x1, y1) = self.corner.tolist(), (self.corner + self.size).tolist()
        return x0, x1, y1, y0


@dataclass(frozen=True)
class Field:
    """A square of the slide that is shown enlarged."""

    letter: str
    why: str
    corner: NDArray[np.float64]
    """First corner (2,), um."""
    side: float
    """um."""
    members: NDArray[np.int64]
    """Cells (m,) of `DrawnCells` with their centre in it."""


def view_of(image: Pyramid, cells: DrawnCells, mpp: float) -> View:
    """Show the whole slide, or around its cells if they take less than half of its width and height; um per px."""
    size = np.array(image.size) * mpp
    low, high = np.zeros(2), size
    if len(cells):
        rim = 0.05 * np.ptp(cells.centres, axis=0).max() + FIELD_UM / 4
        around = np.clip([cells.centres.min(axis=0) - rim, cells.centres.max(axis=0) + rim], 0, size)
        if (np.ptp(around, axis=0) < _PART * size).all():
            low, high = around
    (x0, y0), (x1, y1) = (low / mpp).tolist(), (high / mpp).tolist()
    return View(thumbnail(image, OVERVIEW, (x0, y0, x1, y1)), low, high - low)


def choose_fields(cells: DrawnCells, extent: tuple[float, float]) -> list[Field]:
    """Choose fields where types mix, where cells are dense, and with a usual number of cells, apart from each other.

    `extent` is width and height of the slide in um. Of squares on a grid, types mix most where the number of typed
    cells times the entropy of their types is largest. A field is moved so that its cells are in the middle.
    """
    if not len(cells):
        return []
    side = min(FIELD_UM, *extent)
    shape = np.maximum(np.ceil(np.array(extent) / side).astype(int), 1)
    square = np.clip((cells.centres / side).astype(int), 0, shape - 1)
    place, groups = square[:, 1] * shape[0] + square[:, 0], len(cells.names)
    taken, place = np.unique(place, return_inverse=True)
    counts = np.bincount(place * groups + cells.groups, minlength=len(taken) * groups).reshape(-1, groups)
    total = counts.sum(axis=1)
    typed = counts[:, :-1]
    share = typed / np.maximum(typed.sum(axis=1, keepdims=True), 1)
    mixed = -(typed * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    ranks = {
        "types mix": -mixed,
        "cells are dense": -total.astype(float),
        "usual number of cells": np.abs(total - np.median(total)) - mixed / (1 + mixed.max()),
    }
    at = np.stack([taken % shape[0], taken // shape[0]], axis=1)
    free = np.ones(len(taken), dtype=bool)
    low = np.clip(cells.centres.min(axis=0) - np.median(cells.sizes), 0, np.array(extent) - side)
    high = np.clip(cells.centres.max(axis=0) + np.median(cells.sizes) - side, low, np.array(extent) - side)
    found: list[Field] = []
    for why, rank in ranks.items():
        for _ in range(_FIELDS):
            best = int(np.argmin(np.where(free, rank, np.inf)))
            if not free[best] or (why == "types mix" and mixed[best] <= 0):
                break
            free &= np.abs(at - at[best]).max(axis=1) > 1
            middle = cells.centres[place == best].mean(axis=0)
            corner = np.clip(middle - side / 2, low, high)
            members = np.flatnonzero(((cells.centres >= corner) & (cells.centres < corner + side)).all(axis=1))
            found.append(Field("ABCDEFGH"[len(found)], why, corner, side, members))
    return found


@styled
def slide_figure(view: View, fields: Sequence[Field], cells: DrawnCells | None, seed: int) -> Figure:
    """Draw the tissue with the places of fields, or also its cells, on grey tissue."""
    width, height = view.size * (OVERVIEW / view.size.max())
    figure = Figure(figsize=(width / PREVIEW_DPI, height / PREVIEW_DPI), dpi=PREVIEW_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    _show(axes, view, view.pixels if cells is None else _grey(view.pixels, *_GREYS))
    if cells is not None:
        drawn = np.random.default_rng(seed).permutation(len(cells))[:POINTS]  # so that no type lies above the others
        spacing = np.sqrt(width * height / max(1, len(drawn)))
        nucleus = float(np.median(cells.sizes)) * width / view.size[0] if len(cells) else 0
        diameter = float(np.clip(max(nucleus, 0.3 * spacing), *_POINT_PX))
        x, y = cells.centres[drawn].T
        axes.scatter(
            x,
            y,
            s=(diameter * 72 / PREVIEW_DPI) ** 2,
            c=np.array(cells.colours)[cells.groups[drawn]],
            edgecolors=CASING,
            linewidths=0.4 if diameter > 3 else 0,
        )
    for field in fields:
        for colour, line in (("white", 2.6), (PATCH_COLOUR, 1.4)):
            corner = field.corner.tolist()
            axes.add_patch(Rectangle(corner, field.side, field.side, fill=False, edgecolor=colour, linewidth=line))
        right = field.corner[0] + field.side < view.corner[0] + 0.95 * view.size[0]
        at = field.corner[0] + (field.side if right else 0)
        axes.annotate(
            field.letter,
            (at, field.corner[1]),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top",
            color=PATCH_COLOUR,
            fontsize=14,
            weight="bold",
            path_effects=cased(3, "white"),
        )
    _scale_bar(axes, view, fontsize=13)
    return figure


def density_squares(view: View) -> tuple[float, float]:
    """Side of the squares in which cells are counted, and standard deviation of the window that smooths them, um."""
    side = max(_FINEST_UM, round_length(view.size.max() / _BINS))
    return side, max(_WINDOW_UM, side)


@styled
def density_figure(view: View, cells: DrawnCells) -> Figure:
    """Draw the density of all cells and of each type over the slide, with one scale of colours."""
    side, window = density_squares(view)
    present = [group for group in range(len(cells.names)) if (cells.groups == group).any()]
    counts = [_counts(cells.centres, view, side)]
    counts += [_counts(cells.centres[cells.groups == group], view, side) for group in present]
    maps = [ndimage.gaussian_filter(one, window / side, mode="constant") / (side / 1000) ** 2 for one in counts]
    near = _closed(counts[0] > 0, max(1, round(window / side)))
    titles = [f"all cells ({len(cells):,})"]
    titles += [f"{cells.names[group]} ({(cells.groups == group).sum():,})" for group in present]
    across = min(len(maps), 3 if view.size[0] < 2.5 * view.size[1] else 2)
    down = -(-len(maps) // across)
    each = 9.6 / across
    figure = Figure(figsize=(10.4, down * (each * min(1.6, view.size[1] / view.size[0]) + 0.3)), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    paper = _grey(view.pixels, *_PAPER)
    most = max(float(one.max()) for one in maps)
    norm = PowerNorm(0.5, 0, most or 1)
    for axis, density, title in zip(axes, maps, titles, strict=False):
        _show(axis, view, paper)
        squares = view._replace(size=np.array(density.shape[::-1]) * side)
        shown = np.ma.array(density, mask=~near)
        image = axis.imshow(shown, norm=norm, cmap="magma_r", extent=squares.extent, interpolation="nearest")
        axis.set(xlim=view.extent[:2], ylim=view.extent[2:])
        axis.set_title(title, fontsize=9, parse_math=False)
        _scale_bar(axis, view)
    for axis in axes[len(maps) :]:
        axis.remove()
    ticks = {0.0, *(round_length(share * most) for share in (0.01, 0.04, 0.12, 0.25, 0.5, 1) if most)}
    figure.colorbar(
        image, ax=axes[: len(maps)].tolist(), label="cells per mm²", ticks=sorted(ticks), format="{x:,g}", aspect=40
    )
    return figure


def _counts(centres: NDArray[np.float64], view: View, side: float) -> NDArray[np.float64]:
    """Cells (H, W) in squares of some side, um."""
    shape = np.maximum(np.ceil(view.size[::-1] / side).astype(int), 1)
    row, column = np.clip(((centres - view.corner)[:, ::-1] / side).astype(int), 0, shape - 1).T
    return np.bincount(row * shape[1] + column, minlength=shape.prod()).reshape(shape).astype(np.float64)


def _closed(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Fill gaps of up to twice some width in a mask."""
    closed: NDArray[np.bool_] = ndimage.binary_closing(np.pad(mask, width), iterations=width)
    return closed[width:-width, width:-width]


def _grey(pixels: NDArray[np.uint8], low: float, high: float) -> NDArray[np.uint8]:
    """Brightness of pixels (H, W, 3), from its darker parts to white, between two values: (H, W, 3)."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
    dark = min(float(np.percentile(grey, 2)), 200.0)
    level = np.clip((grey - dark) / (255 - dark), 0, 1) * (high - low) + low
    return np.repeat(level.astype(np.uint8)[..., None], 3, axis=2)


def _show(axes: Axes, view: View, pixels: NDArray[np.uint8]) -> None:
    """Show the slide with axes in um."""
    axes.imshow(pixels, extent=view.extent, interpolation="antialiased")
    axes.set(xlim=view.extent[:2], ylim=view.extent[2:], xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _scale_bar(axes: Axes, view: View, fontsize: float = 9) -> None:
    """Draw a scale bar in the lower left corner."""
    longest, shortest = view.size.max(), view.size.min()
    length = round_length(longest / 5 if longest < 3 * shortest else shortest / 2)
    x, y = view.corner + (0.03 * view.size[0], view.size[1] - 0.03 * longest)
    axes.plot([x, x + length], [y, y], color=CASING, linewidth=2.5, path_effects=cased(4.5, "white"))
    axes.annotate(
        length_text(length),
        (x, y),
        xytext=(0, 4),
        textcoords="offset points",
        color=CASING,
        fontsize=fontsize,
        path_effects=cased(2.5, "white"),
    )
