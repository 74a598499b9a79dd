"""What was cut out of a slide or sample: a table of counts, a picture of the slide, and a page with some patches."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from scipy import ndimage

from celldetr.config.colours import class_colours
from celldetr.report.pages import SIDE, embed, patch_pictures, write_page
from celldetr.report.slide_pictures import thumbnail
from celldetr.report.style import INCOMPLETE_COLOUR, PATCH_COLOUR, TISSUE_COLOUR
from celldetr.runtime.files import atomic, write_tsv
from celldetr.runtime.rule import user_named
from celldetr.slides.boxes import SlideNuclei
from celldetr.slides.cutting import read_patch
from celldetr.slides.grid import PatchGrid
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.tissue import Raster
from celldetr.store import PatchStore

_SHOWN = 12  # patches on the page
_OUTLINED = 3  # patches with outlines
_OVERVIEW = 1400  # px; longest side of the picture of the slide

_BODY = """
{% for text in warnings %}<p class="warning">{{ text }}</p>{% endfor %}
<p>{{ patches }} patches of {{ size }} px at {{ mpp }} um per px, from {{ source }}.</p>
{{ table(["what", "", "count"], rows, 2) }}
<h2>The slide</h2>
<p>Green outline: tissue. Blue squares: patches that were taken.{% if incomplete %} Red squares: those of them in which
Xenium did not segment many of the visible nuclei. They train boxes and cell types, but not what is background, and are
in no validation or test.{% endif %}</p>
<img alt="the slide with its tissue and patches" src="data:image/jpeg;base64,{{ overview }}">
{% if outlines %}<h2>Outlines of nuclei</h2>{{ gallery(outlines) }}{% endif %}
<h2>Patches</h2>
{{ key(colours) }}
{{ gallery(pictures) }}
"""
_UNREADABLE = "<p class='warning'>{{ file }} cannot be opened; no patches are taken from it.</p>"


def write_rows(path: str | os.PathLike[str], rows: Iterable[tuple[str, str, int]]) -> None:
    """Write the table: kind, name, count."""
    write_tsv(path, pd.DataFrame(rows, columns=["kind", "name", "count"]))


def write_report(
    path: str | os.PathLike[str],
    store: PatchStore,
    *,
    title: str,
    source: str,
    picture: Image.Image,
    rows: Sequence[tuple[str, str, int]],
    outlines: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Write the page: counts, the `overview` of the slide in file `source`, and some patches with their boxes.

    `outlines` are captions and pictures of `outline_pictures`.
    """
    shown = np.unique(np.linspace(0, len(store) - 1, min(_SHOWN, len(store))).astype(int))
    values: dict[str, Any] = {
        "title": title,
        "patches": f"{len(store):,}",
        "size": store.patch_size,
        "mpp": store.mpp,
        "source": user_named(source),
        "rows": [(kind, name, f"{count:,}") for kind, name, count in rows],
        "overview": embed(picture),
        "outlines": outlines,
        "incomplete": not store.patches["complete"].all(),
        "warnings": warnings,
        "colours": list(zip((*store.classes, "no label"), class_colours(store.classes), strict=True)),
        "pictures": patch_pictures(store, shown, "patch {index} at {x}, {y} px: {nuclei} nuclei"),
    }
    write_page(path, _BODY, values)


def write_unreadable(path: str | os.PathLike[str], picture: str | os.PathLike[str], *, title: str, source: str) -> None:
    """Write the page and the picture (PNG) of a slide whose file `source` cannot be opened."""
    source = user_named(source)
    write_page(path, _UNREADABLE, {"title": title, "file": source})
    blank = Image.new("RGB", (640, 120), "white")
    ImageDraw.Draw(blank).text((20, 50), f"{source} cannot be opened", fill="black")
    save_picture(picture, blank)


def save_picture(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a picture as PNG."""
    with atomic(path) as temporary:
        picture.save(temporary, "PNG")


def overview(image: Pyramid, grid: PatchGrid, tissue: Raster, complete: NDArray[np.bool_] | None = None) -> Image.Image:
    """Draw the whole slide with the outline of its tissue and its patches (N); those not `complete` (N,) are red."""
    pixels = thumbnail(image, _OVERVIEW)
    scale = max(1.0, max(image.size) / _OVERVIEW)
    rows, columns = (
        np.clip((np.arange(count) + 0.5) * scale / tissue.cell, 0, limit - 1).astype(int)
        for count, limit in zip(pixels.shape[:2], tissue.inside.shape, strict=True)
    )
    inside = tissue.inside[np.ix_(rows, columns)]
    rim = ndimage.binary_dilation(inside) ^ ndimage.binary_erosion(inside, border_value=1)
    pixels[rim] = ImageColor.getrgb(TISSUE_COLOUR)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    ratio = grid.mpp / grid.image_mpp / scale
    # thick, as neighbours share their edges: a thin red line would not tell which of them it belongs to
    whole = np.ones(len(grid), dtype=bool) if complete is None else complete
    for patches, colour, width in ((whole, PATCH_COLOUR, 1), (~whole, INCOMPLETE_COLOUR, 4)):
        for x, y in grid.corners[patches] * ratio:
            box = (x, y, x + grid.size * ratio - 1, y + grid.size * ratio - 1)
            draw.rectangle(box, outline=colour, width=width)
    return picture


def outline_pictures(image: Pyramid, grid: PatchGrid, nuclei: SlideNuclei) -> list[tuple[str, str]]:
    """Captions and pictures of a few patches with the outlines of their nuclei, whole as they are in their file."""
    found = []
    for patch in np.unique(np.linspace(0, len(grid) - 1, _OUTLINED).astype(int)):
        x, y = grid.corners[patch].tolist()
        pixels = Image.fromarray(read_patch(image, grid, x, y))
        picture = pixels.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        for part in shapely.get_parts(nuclei.outlines[grid.boxes.nuclei[grid.boxes.of(patch)]]):
            corners = (shapely.get_coordinates(shapely.get_exterior_ring(part)) - (x, y)) * (2 * SIDE / grid.size)
            draw.line(corners.ravel().tolist(), fill=TISSUE_COLOUR, width=3)
        found.append(("patch at {}, {} px".format(*grid.level0[patch]), embed(picture)))
    return found
