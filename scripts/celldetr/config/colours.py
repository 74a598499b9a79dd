"""Colours of the classes, in pictures and in files for other tools."""

from collections.abc import Sequence

CLASS_COLOURS = {
    # PanNuke
    "neoplastic": "#FF9A1F",
    "inflammatory": "#4FC8FF",
    "connective": "#19DDA0",
    "necrotic": "#F7EC3C",
    "epithelial": "#FFFFFF",
    # cell types of Xenium
    "T": "#FF9A1F",
    "Myeloid": "#4FC8FF",
    "Malignant": "#19DDA0",
    "NK": "#F7EC3C",
    "Mast": "#8CFF66",
    "Fibroblast": "#D55E00",
    "Epithelial": "#0057C2",
    "Endothelial": "#E00060",
    "B": "#999933",
    "Plasma": "#AAAAAA",
}
"""From the palettes of Okabe and Ito and of Tol, which colour-blind readers can tell apart; bright, because tissue is
dark and pink."""
UNLABELLED_COLOUR = "#000000"
_WHITE, _GRAY = "#FFFFFF", "#555555"


def class_colours(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the colours of classes in order, then that of unlabelled nuclei: label -1 indexes the last one.

    Classes that are not in `CLASS_COLOURS` take its colours in order.
    """
    others = tuple(dict.fromkeys(CLASS_COLOURS.values()))
    known = (CLASS_COLOURS.get(name, others[index % len(others)]) for index, name in enumerate(classes))
    return (*known, UNLABELLED_COLOUR)


def colours_on_white(classes: Sequence[str]) -> list[str]:
    """Return the colours of classes for plots on white paper, where white points cannot be seen: gray instead."""
    return [_GRAY if colour == _WHITE else colour for colour in class_colours(classes)[:-1]]
