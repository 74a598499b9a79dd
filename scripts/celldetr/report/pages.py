"""HTML pages that show data to people: their layout, and patches with their boxes as pictures."""

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from celldetr.config.colours import class_colours
from celldetr.report.style import CASING, PREVIEW_DPI, STYLE
from celldetr.runtime.files import atomic
from celldetr.store import PatchStore

SIDE = 256
"""Side of a picture on the page, px; it is drawn at twice that size."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr { border-bottom: 1px solid #ddd }
figure { display: inline-block; margin: 0 .6rem .8rem 0; font-size: 12px; color: #555; vertical-align: top }
figcaption { margin-top: .2rem } img { max-width: 100% }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
.warning { border-left: 4px solid #d55e00; padding-left: .8rem }
</style></head><body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""
_PARTS = """
{% macro table(head, rows, texts=1) %}
<table><tr>{% for name in head %}<th{% if loop.index > texts %} class="n"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>
{%- for cell in row %}<td{% if loop.index > texts %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
{% macro key(colours) %}
<p class="key">Boxes:{% for name, colour in colours %}
<span style="background:{{ colour }}; outline: 1px solid #1a1a1a"></span>{{ name }}{% endfor %}</p>
{% endmacro %}
{% macro gallery(pictures) %}
{% for caption, data in pictures %}<figure><img width="SIDE" height="SIDE" alt="{{ caption }}"
src="data:image/jpeg;base64,{{ data }}"><figcaption>{{ caption }}</figcaption></figure>{% endfor %}
{% endmacro %}
""".replace("SIDE", str(SIDE))


def write_page(path: str | os.PathLike[str], body: str, values: Mapping[str, Any]) -> None:
    """Write a page.

    Parameters
    ----------
    path
        HTML file.
    body
        Jinja template of everything below the title; it can use the macros ``table``, ``key`` and ``gallery``.
    values
        Values for the template: ``title``, and those used in the body.
    """
    imports = '{% extends "page" %}{% from "parts" import table, key, gallery %}'
    sources = {"page": _PAGE, "parts": _PARTS, "this": f"{imports}{{% block body %}}{body}{{% endblock %}}"}
    environment = jinja2.Environment(loader=jinja2.DictLoader(sources), autoescape=True)
    with atomic(path) as temporary:
        temporary.write_text(environment.get_template("this").render(values), encoding="utf-8")


def patch_pictures(store: PatchStore, indices: Iterable[int], caption: str) -> list[tuple[str, str]]:
    """Return captions and pictures of patches; `caption` is formatted with ``index``, ``nuclei`` and patch columns."""
    colours, found = class_colours(store.classes), []
    for index in indices:
        patch = store.read(int(index))
        text = caption.format(index=index, nuclei=len(patch.labels), **store.patches.iloc[index])
        found.append((text, patch_picture(patch.image, patch.boxes, patch.labels, colours)))
    return found


def patch_picture(
    image: NDArray[np.uint8], boxes: NDArray[np.float32], labels: NDArray[np.int8], colours: Sequence[str]
) -> str:
    """Draw a patch (S, S, 3) with its boxes (n, 4) xyxy px, each in the colour of its label (-1: the last colour)."""
    scale = 2 * SIDE / len(image)
    picture = Image.fromarray(image).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes * scale, labels, strict=True):
        low, high = box[:2], np.maximum(box[2:] - 1, box[:2])
        draw.rectangle([*(low - 1), *(high + 1)], outline=CASING, width=5)  # so that pale colours stand out on tissue
        draw.rectangle([*low, *high], outline=colours[label], width=3)
    return embed(picture)


def embed_figure(figure: Figure, dpi: float = PREVIEW_DPI) -> str:
    """Figure as text for a page, see `embed`."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with matplotlib.rc_context(STYLE):
        canvas.draw()
    return embed(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def embed(picture: Image.Image, *, lines: bool = True) -> str:
    """Picture as text for a page: base64 of a JPEG, as a PNG is larger and takes 0.1 s; smaller without thin lines."""
    buffer = io.BytesIO()
    if lines:
        picture.save(buffer, "JPEG", quality=90, subsampling=0)  # subsampling blurs thin coloured lines
    else:
        picture.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
