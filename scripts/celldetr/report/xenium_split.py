"""Summary of a Xenium split: a table of counts and a page."""

import os

import pandas as pd

from celldetr.report.pages import write_page
from celldetr.runtime.files import atomic
from celldetr.xenium.split import XeniumSplit

PAPER_PATCHES, PAPER_CELLS = 21_000, 380_000
"""Patches and cells of the Xenium data in the paper (4.4)."""

_BODY = """
{% for warning in warnings %}<p class="warning">{{ warning }}.</p>{% endfor %}
<p>Split by {{ by }}: {{ patches }} patches and {{ nuclei }} nuclei ({{ labelled }} with a label) in
{{ samples }} samples; {{ left_out }} patches on borders between blocks are left out. The paper has
{{ paper_patches }} patches and over {{ paper_cells }} labelled cells.</p>
<table><tr><th>what</th>{% for part in parts %}<th class="n">{{ part }}</th>{% endfor %}<th class="n">all</th></tr>
{% for name, cells in rows %}<tr><td>{{ name }}</td>
{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<h2>Samples</h2>
<table><tr><th>sample</th>{% for part in parts %}<th class="n">{{ part }}</th>{% endfor %}
<th class="n">left out</th></tr>
{% for name, cells in samples_rows %}<tr><td>{{ name }}</td>
{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
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
    classes = _classes(counts)
    parts = counts["part"].tolist()
    rows = [
        (name, [f"{value:,}" for value in (*counts[name], counts[name].sum())])
        for name in ("patches", "nuclei", *classes)
    ]
    labelled = counts[classes].to_numpy().sum(axis=1)
    nuclei = counts["nuclei"].to_numpy()
    shares = [*zip(labelled, nuclei, strict=True), (labelled.sum(), nuclei.sum())]
    rows.insert(2, ("share with a label", [f"{some / whole:.1%}" if whole else "-" for some, whole in shares]))
    by_sample = pd.crosstab(split.table["store"], split.table["part"]).reindex(columns=parts, fill_value=0)
    samples = [
        (name, [f"{value:,}" for value in (*by_sample.reindex([name], fill_value=0).iloc[0], left)])
        for name, left in split.left_out.items()
    ]
    values = {
        "title": "Split of the Xenium patches",
        "warnings": split.warnings,
        "by": split.by,
        "patches": f"{counts['patches'].sum():,}",
        "nuclei": f"{nuclei.sum():,}",
        "labelled": f"{labelled.sum():,}",
        "samples": len(split.left_out),
        "left_out": f"{sum(split.left_out.values()):,}",
        "paper_patches": f"{PAPER_PATCHES:,}",
        "paper_cells": f"{PAPER_CELLS:,}",
        "parts": parts,
        "rows": rows,
        "samples_rows": samples,
    }
    write_page(path, _BODY, values)


def _classes(counts: pd.DataFrame) -> list[str]:
    return [str(name) for name in counts if name not in ("part", "patches", "nuclei", "labelled", "samples", "groups")]
