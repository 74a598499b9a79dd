"""Summary of the conversion of a PanNuke fold: a TSV of counts, and an HTML page with pictures."""

import os

import numpy as np
import pandas as pd

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.colours import class_colours
from celldetr.pannuke.convert import ODDITIES, FoldSummary
from celldetr.report.pages import patch_pictures, write_page
from celldetr.runtime.files import write_tsv
from celldetr.store import PatchStore

_USUAL = 6  # patches shown besides the odd ones
_CAPTION = "image {index}, {tissue}, {nuclei} nuclei"

_BODY = """<p>{{ images }} images, {{ total }} nuclei, at most {{ most }} in one image. Nothing was dropped.</p>
{{ table(["class", "nuclei"], nuclei) }}
<h2>Oddities</h2>
{{ table(["what", "count", "images"], odd) }}
<h2>Tissues</h2><p>{% for name, count in tissues %}{{ name }} {{ count }}{{ ", " if not loop.last }}{% endfor %}</p>
<h2>Pictures</h2>
{{ key(colours) }}
{% for title, pictures in groups %}<h3>{{ title }}</h3>{{ gallery(pictures) }}{% endfor %}
"""


def write_counts(path: str | os.PathLike[str], summary: FoldSummary) -> None:
    """Write the counts: kind (total, class, odd, tissue), name, count, images."""
    rows: list[tuple[str, str, int, int | str]] = [
        ("total", "images", summary.images, summary.images),
        ("total", "nuclei", sum(summary.nuclei.values()), ""),
        ("total", "most nuclei in one image", summary.most, ""),
        *(("class", name, count, "") for name, count in summary.nuclei.items()),
        *(("odd", name, count, summary.odd_images[name]) for name, count in summary.odd.items()),
        *(("tissue", name, count, count) for name, count in sorted(summary.tissues.items())),
    ]
    write_tsv(path, pd.DataFrame(rows, columns=["kind", "name", "count", "images"]))


def write_html(path: str | os.PathLike[str], summary: FoldSummary, store: PatchStore, title: str) -> None:
    """Write the page: counts, and pictures of a few patches and of each kind of oddity, with their boxes."""
    full = np.flatnonzero(np.diff(store.box_ptr) > 0)
    usual = full[np.linspace(0, len(full) - 1, min(_USUAL, len(full))).astype(int)] if len(full) else full
    groups = [("A few patches", patch_pictures(store, usual, _CAPTION))]
    examples = {ODDITIES[name]: found for name, found in summary.examples.items() if found}
    groups += [(name, patch_pictures(store, found, _CAPTION)) for name, found in examples.items()]
    values = {
        "title": title,
        "images": summary.images,
        "total": f"{sum(summary.nuclei.values()):,}",
        "most": summary.most,
        "nuclei": list(summary.nuclei.items()),
        "odd": [(ODDITIES[name], count, summary.odd_images[name]) for name, count in summary.odd.items()],
        "tissues": sorted(summary.tissues.items()),
        "colours": list(zip(PANNUKE_CLASSES, class_colours(PANNUKE_CLASSES), strict=False)),
        "groups": groups,
    }
    write_page(path, _BODY, values)
