"""How figures and tables look: colours beside those of the classes, fonts, and how a figure is written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, withStroke

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic

TRUTH_COLOUR, PREDICTED_COLOUR = "#D55E00", "#000000"  # boxes of figure 3
TRAIN_COLOUR, VAL_COLOUR = "#8A8A8A", "#0057C2"
SIMILARITY_COLOURS = ("#1A1A1A", "#B2182B", "#2166AC", TRAIN_COLOUR)  # retrieval, own, others, spread: figure 4c
SERIES_COLOURS = ("#0057C2", "#D55E00", "#009E73", "#CC79A7", "#999933")  # lines that are not classes, on white
CASING = "#1A1A1A"  # of lines in class colours, which are too pale for tissue and for white paper
LINE_COLOUR, MUTED_COLOUR = "#444444", "#999999"
SAMPLE_COLOUR, REFERENCE_COLOUR = "#0072B2", "#E69F00"  # cell types: a Xenium sample, and its reference
TISSUE_COLOUR, PATCH_COLOUR, INCOMPLETE_COLOUR = "#009E73", "#0050C8", "#D00000"  # on the overview of a slide
ATTENTION_COLOURS = ("#1B2A6B", "#2A7FB8", "#7FD3C4", "#FFF59A")  # from low to high weight
STYLE: Any = {  # rc parameters
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9,
    "svg.hashsalt": "celldetr",
    "axes.linewidth": 0.6,
}
BANNER = "Synthetic example data; says nothing about tissue."
DASH = "–"
DPI = 200
PREVIEW_DPI = 110
"""Resolution of pictures beside data; here, so that changing it does not make the data again."""
_P = ParamSpec("_P")


def cased(width: float, colour: str = CASING, alpha: float = 1.0) -> list[Any]:
    """Return path effects that draw a line of `width` points in `colour` below the line itself."""
    return [withStroke(linewidth=width, foreground=colour, alpha=alpha), Normal()]


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Let a function draw its figure in the style of this module."""
    decorated: Callable[_P, Figure] = matplotlib.rc_context(STYLE)(draw)
    return decorated


def save(figure: Figure, *paths: str | os.PathLike[str], dpi: int = DPI) -> None:
    """Write a figure atomically; the suffix of a path (png, svg) sets the format, `dpi` the resolution of a png.

    The same figure gives the same bytes: neither the time nor the version of matplotlib is written.
    """
    unwritten = {"png": "Software", "svg": "Date"}
    for path in paths:
        kind = Path(path).suffix[1:]
        if kind not in unwritten:
            raise InputError(f"{path}: got the suffix {kind!r}, expected png or svg")
        with atomic(path) as temporary, matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format=kind, dpi=dpi, metadata={unwritten[kind]: None})
