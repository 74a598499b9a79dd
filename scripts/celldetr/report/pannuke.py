"""Summary of the conversion of a PanNuke fold: a TSV of counts, and an HTML page with pictures."""

import os
from collections.abc import Iterable

import numpy as np

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.pannuke.convert import ODDITIES, FoldSummary
from celldetr.report.pages import SIDE, patch_picture, write_page
from celldetr.report.style import class_colours
from celldetr.runtime.files import atomic
from celldetr.store import PatchStore

_COLOURS = class_colours(PANNUKE_CLASSES)
_USUAL = 6  # patches shown besides the odd ones

_BODY = """<p>{{ images }} images, {{ total }} nuclei, at most {{ most }} in one image. Nothing was dropped.</p>
<table><tr><th>class</th><th>nuclei</th></tr>
{% for name, count in nuclei %}<tr><td>{{ name }}</td><td class="n">{{ count }}</td></tr>{% endfor %}</table>
<h2>Oddities</h2>
<table><tr><th>what</th><th>count</th><th>images</th></tr>
{% for name, count, images in odd %}
<tr><td>{{ name }}</td><td class="n">{{ count }}</td><td class="n">{{ images }}</td></tr>
{% endfor %}</table>
<h2>Tissues</h2><p>{% for name, count in tissues %}{{ name }} {{ count }}{{ ", " if not loop.last }}{% endfor %}</p>
<h2>Pictures</h2>
<p class="key">Boxes:{% for name, colour in key %}
<span style="background:{{ colour }}; outline: 1px solid #999"></span>{{ name }}{% endfor %}</p>
{% for title, pictures in groups %}<h3>{{ title }}</h3>
{% for caption, data in pictures %}<figure><img width="{{ side }}" height="{{ side }}" alt="{{ caption }}"
src="data:image/jpeg;base64,{{ data }}"><figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% endfor %}
"""


def write_tsv(path: str | os.PathLike[str], summary: FoldSummary) -> None:
    """Write the counts: kind (total, class, odd, tissue), name, count, images."""
    rows: list[tuple[str, str, int, int | str]] = [
        ("total", "images", summary.images, summary.images),
        ("total", "nuclei", sum(summary.nuclei.values()), ""),
        ("total", "most nuclei in one image", summary.most, ""),
        *(("class", name, count, "") for name, count in summary.nuclei.items()),
        *(("odd", name, count, summary.odd_images[name]) for name, count in summary.odd.items()),
        *(("tissue", name, count, count) for name, count in sorted(summary.tissues.items())),
    ]
    lines = ["kind\tname\tcount\timages", *("\t".join(map(str, row)) for row in rows)]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_html(path: str | os.PathLike[str], summary: FoldSummary, store: PatchStore, title: str) -> None:
    """Write the page: counts, and pictures of a few patches and of each kind of oddity, with their boxes."""
    full = np.flatnonzero(np.diff(store.box_ptr) > 0)
    usual = full[np.linspace(0, len(full) - 1, min(_USUAL, len(full))).astype(int)] if len(full) else full
    groups = [("A few patches", _pictures(store, usual.tolist()))]
    groups += [(ODDITIES[name], _pictures(store, found)) for name, found in summary.examples.items() if found]
    values = {
        "title": title,
        "images": summary.images,
        "total": f"{sum(summary.nuclei.values()):,}",
        "most": summary.most,
        "nuclei": list(summary.nuclei.items()),
        "odd": [(ODDITIES[name], count, summary.odd_images[name]) for name, count in summary.odd.items()],
        "tissues": sorted(summary.tissues.items()),
        "key": list(zip(PANNUKE_CLASSES, _COLOURS, strict=False)),
        "groups": groups,
        "side": SIDE,
    }
    write_page(path, _BODY, values)


def _pictures(store: PatchStore, indices: Iterable[int]) -> list[tuple[str, str]]:
    found = []
    for index in indices:
        patch = store.read(index)
        caption = f"image {index}, {store.patches['tissue'].iloc[index]}, {len(patch.labels)} nuclei"
        found.append((caption, patch_picture(patch.image, patch.boxes, patch.labels, _COLOURS)))
    return found
