"""What the conversion of a fold found, for people: a TSV of counts and an HTML page with pictures."""

import base64
import io
import os
from collections.abc import Iterable

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from celldetr.classes import PANNUKE_CLASSES
from celldetr.data.pannuke import ODDITIES, FoldSummary
from celldetr.files import atomic
from celldetr.store import PatchStore

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#000000", "#cc79a7")  # told apart with every kind of colour vision
_USUAL = 6  # patches shown besides the odd ones
_SHOWN = 256  # side of a picture in px

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } tr { border-bottom: 1px solid #ddd }
figure { display: inline-block; margin: 0 .6rem .8rem 0; font-size: 12px; color: #555 } figcaption { margin-top: .2rem }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ images }} images, {{ total }} nuclei, at most {{ most }} in one image. Nothing was dropped.</p>
<table><tr><th>class</th><th>nuclei</th></tr>
{% for name, count in nuclei %}<tr><td>{{ name }}</td><td class="n">{{ count }}</td></tr>{% endfor %}</table>
<h2>What is odd</h2>
<table><tr><th>what</th><th>count</th><th>images</th></tr>
{% for name, count, images in odd %}
<tr><td>{{ name }}</td><td class="n">{{ count }}</td><td class="n">{{ images }}</td></tr>
{% endfor %}</table>
<h2>Tissues</h2><p>{% for name, count in tissues %}{{ name }} {{ count }}{{ ", " if not loop.last }}{% endfor %}</p>
<h2>Pictures</h2>
<p class="key">Boxes:{% for name, colour in key %}
<span style="background:{{ colour }}"></span>{{ name }}{% endfor %}</p>
{% for title, pictures in groups %}<h3>{{ title }}</h3>
{% for caption, data in pictures %}<figure><img width="{{ side }}" height="{{ side }}" alt="{{ caption }}"
src="data:image/png;base64,{{ data }}"><figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% endfor %}
</body></html>
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
    """Write the page: counts, and patches with their boxes, the odd ones by kind."""
    full = np.flatnonzero(np.diff(store.box_ptr) > 0)
    usual = full[np.linspace(0, len(full) - 1, min(_USUAL, len(full))).astype(int)] if len(full) else full
    groups = [("A few patches", _pictures(store, usual.tolist()))]
    groups += [(ODDITIES[name], _pictures(store, found)) for name, found in summary.examples.items() if found]
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        title=title,
        images=summary.images,
        total=f"{sum(summary.nuclei.values()):,}",
        most=summary.most,
        nuclei=list(summary.nuclei.items()),
        odd=[(ODDITIES[name], count, summary.odd_images[name]) for name, count in summary.odd.items()],
        tissues=sorted(summary.tissues.items()),
        key=list(zip(PANNUKE_CLASSES, COLOURS, strict=True)),
        groups=groups,
        side=_SHOWN,
    )
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _pictures(store: PatchStore, indices: Iterable[int]) -> list[tuple[str, str]]:
    found = []
    for index in indices:
        patch = store.read(index)
        caption = f"image {index}, {store.patches['tissue'].iloc[index]}, {len(patch.labels)} nuclei"
        found.append((caption, base64.b64encode(_png(patch.image, patch.boxes, patch.labels)).decode("ascii")))
    return found


def _png(image: NDArray[np.uint8], boxes: NDArray[np.float32], labels: NDArray[np.int8]) -> bytes:
    scale = 2 * _SHOWN / len(image)
    picture = Image.fromarray(image).resize((2 * _SHOWN, 2 * _SHOWN), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes * scale, labels, strict=True):
        draw.rectangle([*box[:2], *(box[2:] - 1)], outline=COLOURS[label], width=2)
    buffer = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(buffer, "PNG")
    return buffer.getvalue()
