"""How all figures look, and how they are written. Apart from what is drawn: what draws data needs nothing of scores."""

import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from celldetr.runtime.files import atomic

# From the palettes of Okabe and Ito and of Tol (for colour-blind readers too); bright, as tissue is dark and pink.
CLASS_COLOURS = (
    *("#FF9A1F", "#4FC8FF", "#19DDA0", "#F7EC3C", "#FFFFFF"),
    *("#D55E00", "#0057C2", "#F4A6D0", "#999933", "#AAAAAA"),
)
UNLABELLED_COLOUR = "#000000"
STYLE: Any = {  # rc parameters
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9,
    "svg.hashsalt": "celldetr",
    "axes.linewidth": 0.6,
}
DPI = 200


def colour_of(label: int) -> str:
    """Colour of a class; -1 = nucleus without a label."""
    return UNLABELLED_COLOUR if label < 0 else CLASS_COLOURS[label % len(CLASS_COLOURS)]


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = DPI) -> None:
    """Write a figure under its name when it is complete; the ending (png, svg, pdf) tells the format.

    The same figure gives the same bytes: neither the time nor the version of matplotlib is written. `dpi` is for png.
    """
    kind = Path(path).suffix[1:].lower()
    fixed: dict[str, str | None] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {"Software": None})  # type: ignore[assignment]
    with atomic(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=fixed)
