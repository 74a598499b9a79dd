"""Summary of a Xenium split: a table of counts and a page."""

import os
from typing import Any

import pandas as pd

from celldetr.report.pages import write_page
from celldetr.runtime.files import atomic
from celldetr.xenium.split import XeniumSplit

PAPER_PATCHES, PAPER_CELLS = 21_000, 380_000
"""Patches and cells of the Xenium data in the paper (4.4)."""

_BODY = """
{% for warning in warnings %}<p class="warning">{{ warning }}.</p>{% endfor %}
<p>Split by {{ by }}: {{ patches }} patches and {{ nuclei }} nuclei ({{ labelled }} with a label) in
{{ samples }} samples; {{ left_out }} patches are left out: on borders between blocks, or in validation or test with
visible nuclei that have no box. The paper has
{{ paper_patches }} patches and over {{ paper_cells }} labelled cells.</p>
{{ table(["what"] + parts + ["all"], rows) }}
<h2>Samples</h2>
{{ table(["sample"] + parts + ["left out"], samples_rows) }}
"""


def write_counts(path: str | os.PathLike[str], counts: pd.DataFrame, split: XeniumSplit) -> None:
    """Write the counts of `part_counts`, and rows for the patches left out and for the paper."""
    classes = _classes(counts)
    left_out = {"part": "left out", "patches": sum(split.left_out.values())}
    paper = {"part": "paper", "patches": PAPER_PATCHES, "nuclei": PAPER_CELLS}
    table = pd.concat([counts, pd.DataFrame([left_out, paper])], ignore_index=True)
    whole = ["patches", "nuclei", *classes, "samples", "groups"]
    table[whole] = table[whole].astype("Int64")
    with atomic(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, na_rep="-")


def write_split_page(path: str | os.PathLike[str], counts: pd.DataFrame, split: XeniumSplit) -> None:
    """Write the counts per part and sample as a page."""
    parts, classes = counts["part"].tolist(), _classes(counts)
    table = counts.set_index("part")[["patches", "nuclei", *classes]].T
    table["all"] = table.sum(axis=1)
    labelled, nuclei = table.loc[classes].sum(), table.loc["nuclei"]
    rows = [_row(*line) for line in table.itertuples()]
    shares = [f"{some / whole:.1%}" if whole else "-" for some, whole in zip(labelled, nuclei, strict=True)]
    rows.insert(2, ("share with a label", *shares))
    by_sample = pd.crosstab(split.table["store"], split.table["part"]).reindex(
        index=list(split.left_out), columns=parts, fill_value=0
    )
    by_sample["left out"] = pd.Series(split.left_out)
    values = {
        "title": "Split of the Xenium patches",
        "warnings": split.warnings,
        "by": split.by,
        "patches": f"{counts['patches'].sum():,}",
        "nuclei": f"{nuclei['all']:,}",
        "labelled": f"{labelled['all']:,}",
        "samples": len(split.left_out),
        "left_out": f"{sum(split.left_out.values()):,}",
        "paper_patches": f"{PAPER_PATCHES:,}",
        "paper_cells": f"{PAPER_CELLS:,}",
        "parts": parts,
        "rows": rows,
        "samples_rows": [_row(*line) for line in by_sample.itertuples()],
    }
    write_page(path, _BODY, values)


def _row(name: Any, *values: Any) -> tuple[str, ...]:
    return (str(name), *(f"{value:,}" for value in values))


def _classes(counts: pd.DataFrame) -> list[str]:
    return [str(name) for name in counts if name not in ("part", "patches", "nuclei", "labelled", "samples", "groups")]
