"""The page of a section of STHELAR: counts, where its patches lie, and some of them with their boxes."""

import os

import numpy as np
from PIL import Image, ImageDraw

from celldetr.config.colours import class_colours
from celldetr.report.pages import embed, patch_pictures, write_page
from celldetr.report.style import MUTED_COLOUR
from celldetr.store import PatchStore
from celldetr.xenium.sthelar.nuclei import SIDE
from celldetr.xenium.sthelar.patches import SectionExtraction, SectionMap

_SHOWN = 12  # patches on the page
_LONGEST = 1400  # px; longest side of the picture of the section

_BODY = """
<p>{{ patches }} patches of {{ size }} px at {{ mpp }} um per px, from patches of STHELAR at {{ source_mpp }} um per px.
Neighbours overlap, so a nucleus may be in several patches.</p>
{{ table(["what", "", "count"], rows, 2) }}
<h2>The section</h2>
<p>Patches that were taken, in their places. Grey outlines: patches of STHELAR that were not taken.</p>
<img alt="the section, made of its patches" src="data:image/jpeg;base64,{{ overview }}">
<h2>Patches</h2>
{{ key(colours) }}
{{ gallery(pictures) }}
"""


def write_section_page(path: str | os.PathLike[str], store: PatchStore, found: SectionExtraction, title: str) -> None:
    """Write the page of a section whose patches are in `store`."""
    shown = np.unique(np.linspace(0, len(store) - 1, min(_SHOWN, len(store))).astype(int))
    values = {
        "title": title,
        "patches": f"{len(store):,}",
        "size": store.patch_size,
        "mpp": store.mpp,
        "source_mpp": f"{found.mpp:.4g}",
        "rows": [(kind, name, f"{count:,}") for kind, name, count in found.rows],
        "overview": embed(draw_section(found.map)),
        "colours": list(zip((*store.classes, "no label"), class_colours(store.classes), strict=True)),
        "pictures": patch_pictures(store, shown, "patch {index} at {x}, {y} px: {nuclei} nuclei"),
    }
    write_page(path, _BODY, values)


def draw_section(section: SectionMap) -> Image.Image:
    """Draw a section: thumbnails of the patches that were taken, outlines of the others."""
    scale = min(1.0, _LONGEST / max(section.size))
    width, height = (max(1, round(side * scale)) for side in section.size)
    picture = Image.new("RGB", (width, height), "white")
    side = max(1, round(section.side * scale))
    for corner, pixels in zip(section.taken * scale, section.thumbnails, strict=True):
        picture.paste(Image.fromarray(pixels).resize((side, side)), tuple(np.rint(corner).astype(int).tolist()))
    draw = ImageDraw.Draw(picture)
    for x, y in section.passed_over * scale:
        draw.rectangle([x, y, x + SIDE * scale - 1, y + SIDE * scale - 1], outline=MUTED_COLOUR)
    return picture
