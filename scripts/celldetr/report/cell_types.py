"""Picture of the quality of a sample's cell types."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from celldetr.config.classes import ST_TYPES
from celldetr.report.style import LINE_COLOUR, MUTED_COLOUR, REFERENCE_COLOUR, SAMPLE_COLOUR, styled

_BESIDE: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7, "color": LINE_COLOUR}
_MANY_UNLIKE = 0.2  # share of a type's cells
_NOTE_WIDTH = 140  # characters of a line above the panels


@styled
def cell_types_figure(figures: Mapping[str, Any], title: str) -> Figure:
    """Draw the figures of `celldetr.xenium.celltypes.qc.quality`."""
    notes = [line for note in cell_type_notes(figures) for line in textwrap.wrap(note, _NOTE_WIDTH)]
    figure = Figure(figsize=(13, 12.5 + 0.25 * len(notes)), layout="constrained")
    head = (
        f"{title}: {figures['labelled_share']:.1%} of {figures['cells']:,} cells labelled, "
        f"{figures['shared_genes']} genes shared with the reference"
    )
    figure.suptitle("\n".join([head, *notes]), fontsize=12, linespacing=1.4)
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1.15, 1.25))
    _labels(figure.add_subplot(grid[0, 0]), figures)
    _reasons(figure.add_subplot(grid[0, 1]), figures["reasons"])
    _composition(figure.add_subplot(grid[0, 2]), figures)
    _markers(figure, figure.add_subplot(grid[1, :]), figures["markers"])
    _confusion(figure.add_subplot(grid[2, :2]), figures)
    _agreement(figure.add_subplot(grid[2, 2]), figures)
    for axes in figure.axes:
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def cell_type_notes(figures: Mapping[str, Any]) -> list[str]:
    """Lines on what the reference lacks, labels that may have the wrong type, and types that are not used."""
    notes = list(figures["reference_warnings"])
    if figures["missing_types"]:
        notes.append(f"Not in the reference: {', '.join(figures['missing_types'])}: no cell can get these types")
    for found in figures["unknown_types"]:
        share = found["cells"] / max(1, figures["cells"])
        notes.append(
            f"{share:.1%} of the cells, those with few transcripts included, are of a type that the reference lacks "
            f"(most similar: {found['near']}; genes: {', '.join(found['genes'])})"
        )
    for name, share in figures["unlike"].items():
        if share is not None and share > _MANY_UNLIKE:
            notes.append(
                f"{share:.0%} of the cells that would be {name} are less like that type than reference cells as deep "
                "(xenium.cell_types.unlike_share): no label"
            )
    for name in figures["unused_types"]:
        notes.append(
            f"{name} is not used for training: estimated precision {figures['precision'][name]:.2f}, below "
            f"{figures['min_precision']:g} (xenium.cell_types.min_precision)"
        )
    return notes


def _without_cells(figures: Mapping[str, Any], name: str) -> str:
    """Why a type has no labelled cells; empty if it has some."""
    if name in figures["missing_types"]:
        return "not in the reference"
    if name in figures["unused_types"]:
        return f"not used: precision {figures['precision'][name]:.2f}"
    return "" if figures["labels"][name] else "0 cells"


def _labels(axes: Axes, figures: Mapping[str, Any]) -> None:
    numbers = figures["labels"]
    axes.bar(range(len(numbers)), list(numbers.values()), color=SAMPLE_COLOUR)
    for place, (name, number) in enumerate(numbers.items()):
        precision = figures["precision"][name]
        share = "" if precision is None else f" ({precision:.2f})"
        axes.text(place, max(number, 0.7) * 1.2, _without_cells(figures, name) or f"{number:,}{share}", **_BESIDE)
    axes.set_yscale("log")
    axes.set_ylim(0.7, max(10, *numbers.values()) ** 1.4)
    axes.set_ylabel("cells (log)")
    axes.set_title("Labelled cells (estimated precision)")
    _names(axes)


def _reasons(axes: Axes, reasons: Mapping[str, int]) -> None:
    total = max(1, sum(reasons.values()))
    places = range(len(reasons))
    shares = [number / total for number in reasons.values()]
    axes.barh(places, shares, color=[SAMPLE_COLOUR, *[MUTED_COLOUR] * (len(reasons) - 1)])
    for place, share in zip(places, shares, strict=True):
        axes.text(share + 0.01, place, f"{share:.1%}", va="center")
    axes.set_yticks(places, list(reasons))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(0.1, *shares))
    axes.set_xlabel("share of all cells")
    axes.set_title("Labelled, or why not")


def _composition(axes: Axes, figures: Mapping[str, Any]) -> None:
    for shift, (name, colour) in zip(
        (-0.2, 0.2), (("sample", SAMPLE_COLOUR), ("reference", REFERENCE_COLOUR)), strict=True
    ):
        shares = [figures["composition"][name][kind] for kind in ST_TYPES]
        axes.bar(np.arange(len(ST_TYPES)) + shift, shares, 0.4, color=colour, label=name)
    bottom = axes.get_ylim()[1] / 100
    for place, kind in enumerate(ST_TYPES):
        missing = kind in figures["missing_types"]
        axes.text(place if missing else place - 0.2, bottom, _without_cells(figures, kind), **_BESIDE)
    axes.set_ylabel("share of labelled cells")
    axes.set_title("Composition", pad=22)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1)
    _names(axes)


def _markers(figure: Figure, axes: Axes, markers: Mapping[str, Any]) -> None:
    share, mean = np.array(markers["share"]), np.array(markers["mean"])
    axes.set_title(
        "Markers of the reference's types in the labelled cells (area: share of cells with the gene)", pad=16
    )
    if not share.size:
        return
    row, column = np.indices(share.shape)
    points = axes.scatter(
        column, row, s=130 * share, c=mean, cmap="Blues", vmin=0, vmax=1, edgecolors=MUTED_COLOUR, linewidths=0.4
    )
    axes.set_xticks(range(len(markers["genes"])), markers["genes"], rotation=90)
    axes.set_yticks(range(len(markers["types"])), markers["types"])
    axes.set_ylim(len(markers["types"]) - 0.5, -0.5)
    axes.set_xlim(-0.7, len(markers["genes"]) - 0.3)
    for kind in dict.fromkeys(markers["of"]):
        places = [place for place, name in enumerate(markers["of"]) if name == kind]
        axes.axvline(places[-1] + 0.5, color=MUTED_COLOUR, linewidth=0.5)
        axes.text(float(np.mean(places)), 1.01, kind, ha="center", fontsize=8, transform=axes.get_xaxis_transform())
    figure.colorbar(points, ax=axes, label="mean, relative to the largest", fraction=0.02, pad=0.01)


def _confusion(axes: Axes, figures: Mapping[str, Any]) -> None:
    test, missing = figures["reannotation"], figures["missing_types"]
    counts = np.array(test["confusion"])
    rows = counts.sum(axis=1)
    shares = counts / np.maximum(rows, 1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        paint = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=paint, fontsize=8)
    f1 = {kind: "0 cells" if value is None else f"F1 {value:.2f}" for kind, value in test["f1"].items()}
    f1 |= dict.fromkeys(missing, "not in the reference")
    axes.set_yticks(range(len(ST_TYPES)), [f"{kind}  ({f1[kind]})" for kind in ST_TYPES])
    axes.set_xlabel("type with the largest fraction")
    axes.set_ylabel("true type")
    score = "–" if test["macro_f1"] is None else f"{test['macro_f1']:.2f}"
    axes.set_title(f"{test['cells']} held-out cells of the reference, thinned to the sample: macro F1 {score}")
    _names(axes)


def _agreement(axes: Axes, figures: Mapping[str, Any]) -> None:
    agreement = figures["agreement"]
    shares = [agreement["by_type"][kind] or 0 for kind in ST_TYPES]
    axes.bar(range(len(ST_TYPES)), shares, color=SAMPLE_COLOUR)
    for place, kind in enumerate(ST_TYPES):
        if agreement["by_type"][kind] is None:
            missing = kind in figures["missing_types"]
            axes.text(place, 0.02, "not in the reference" if missing else "0 cells", **_BESIDE)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of cells")
    overall = "–" if agreement["overall"] is None else f"{agreement['overall']:.0%}"
    axes.set_title(f"Correlation agrees with optimal transport: {overall}")
    _names(axes)


def _names(axes: Axes) -> None:
    axes.set_xticks(range(len(ST_TYPES)), list(ST_TYPES), rotation=45, ha="right")
