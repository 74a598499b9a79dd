"""What the summaries of data for people share: the look of a page, and patches with their boxes as pictures."""

import base64
import io
import os
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from celldetr.runtime.files import atomic

SIDE = 256
"""Side of a picture on the page, px; it is drawn twice as large."""
_CASING = "#1a1a1a"

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


def write_page(path: str | os.PathLike[str], body: str, values: Mapping[str, Any]) -> None:
    """Write a page.

    Parameters
    ----------
    path
        HTML file.
    body
        Jinja template of what stands below the title.
    values
        Values of the template: ``title``, and what the body names.
    """
    sources = {"page": _PAGE, "this": f'{{% extends "page" %}}{{% block body %}}{body}{{% endblock %}}'}
    environment = jinja2.Environment(loader=jinja2.DictLoader(sources), autoescape=True)
    with atomic(path) as temporary:
        temporary.write_text(environment.get_template("this").render(values), encoding="utf-8")


def patch_picture(
    image: NDArray[np.uint8], boxes: NDArray[np.float32], labels: NDArray[np.int8], colours: tuple[str, ...]
) -> str:
    """Draw a patch (S, S, 3) with its boxes (n, 4) in the colours of their labels; -1 takes the last one."""
    scale = 2 * SIDE / len(image)
    picture = Image.fromarray(image).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes * scale, labels, strict=True):
        low, high = box[:2], np.maximum(box[2:] - 1, box[:2])
        draw.rectangle([*(low - 1), *(high + 1)], outline=_CASING, width=4)  # pale colours are lost on tissue
        draw.rectangle([*low, *high], outline=colours[label], width=2)
    return embed(picture)


def embed(picture: Image.Image) -> str:
    """Picture as text (JPEG, base64) for a page; a PNG with a palette of its own is larger and takes 0.1 s."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling=0)  # colours in full, for the thin lines of the boxes
    return base64.b64encode(buffer.getvalue()).decode("ascii")
