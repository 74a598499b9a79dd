"""The page about the cells of a slide: the slide with its cells, counts, galleries, UMAP, and how it was read."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from celldetr.cells.table import CellFile, CellsInfo
from celldetr.config.colours import class_colours
from celldetr.report.cell_embeddings import embedding_map
from celldetr.report.cell_maps import (
    POINTS,
    DrawnCells,
    choose_fields,
    density_figure,
    density_squares,
    slide_figure,
    view_of,
)
from celldetr.report.cell_pictures import CellPictures, crop_side, rank
from celldetr.report.pages import embed_figure, write_page
from celldetr.report.slide_pictures import length_text
from celldetr.report.style import BANNER, DASH
from celldetr.runtime.errors import InputError
from celldetr.runtime.rule import user_named
from celldetr.slides.damage import TolerantPyramid, log_damage, open_slide
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.tiff import DamagedSlide

_SEED = 0
_DPI = 180  # of figures with text; they are as wide as the page
_NO_TYPE = "no type"
_AREAS = {"slide_mm2": "slide", "region_mm2": "region", "tissue_mm2": "tissue", "read_mm2": "read by the model"}
_MODEL = {"trained_on": "trained on", "seen": "trained on the group of this slide"}
_BODY = """
<style>
.pic { position: relative; line-height: 0 } .pic > .over { position: absolute; inset: 0; width: 100%; height: 100% }
.pic path { fill: none; pointer-events: all; vector-effect: non-scaling-stroke; stroke-width: 1.5px }
.pic .case { stroke: #1a1a1a; stroke-width: 2.5px }
.crops path { stroke-width: 2px } .crops .case { stroke-width: 3.4px }
.key { position: sticky; top: 0; background: #fff; padding: .4rem 0; z-index: 1; border-bottom: 1px solid #ddd }
.key label { margin-right: 1em; white-space: nowrap } .key input { margin-right: .1em }
.key span.swatch { margin: 0 .35em 0 .15em }
.swatch { display: inline-block; width: .85em; height: .85em; margin: 0 .35em 0 .15em; border: 1px solid #555 }
.crops figure { margin: 0 .3rem .4rem 0; text-align: center } .row { margin: .2rem 0; color: #555 }
.bar { font: 600 22px system-ui, sans-serif; fill: #1a1a1a; stroke: #fff; stroke-width: 5px; paint-order: stroke }
body:has(#cells:not(:checked)) .over { display: none }
{% for name, colour in groups %}.t{{ loop.index0 }} path + path { stroke: {{ colour }} }
body:has(#t{{ loop.index0 }}:not(:checked)) .t{{ loop.index0 }} { display: none }
{% endfor %}
</style>
{% macro swatch(group) %}<span class="swatch" style="background:{{ groups[group][1] }}"></span>{% endmacro %}
{% macro picture(one, width) %}<figure style="width:{{ width }}px"><div class="pic">
<img width="{{ width }}" height="{{ width }}" alt="{{ one.caption }}" src="data:image/jpeg;base64,{{ one.data }}">
<svg class="over" viewBox="0 0 {{ one.size }} {{ one.size }}">
{%- for shape in one.shapes %}<g class="t{{ shape.group }}"><title>{{ shape.text }}</title>
<path class="case" d="{{ shape.path }}"/><path d="{{ shape.path }}"/></g>{% endfor %}</svg>
{% if one.bar[0] %}<svg style="position:absolute; inset:0" viewBox="0 0 {{ one.size }} {{ one.size }}">
<rect x="20" y="{{ one.size - 28 }}" width="{{ one.bar[0] }}" height="8" fill="#1a1a1a" stroke="#fff" stroke-width="3"/>
<text class="bar" x="20" y="{{ one.size - 38 }}">{{ one.bar[1] }}</text></svg>{% endif %}
</div><figcaption>{{ one.caption }}</figcaption></figure>
{% endmacro %}
{% if banner %}<p class="warning"><b>{{ banner }}</b></p>{% endif %}
<p>{{ read }} cells {{ "of your file were read" if given else "found" }}{{ area }} on {{ file }} ({{ size }}).</p>
{% if warning %}<p class="warning">{{ warning }}</p>{% endif %}
<table><tr><th>type</th>{% for name in heads %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for group, row in types %}<tr><td>{{ swatch(group) }}{{ groups[group][0] }}</td>
{%- for text in row %}<td class="n">{{ text }}</td>{% endfor %}</tr>{% endfor %}</table>
{% if unreadable %}<p class="warning">The slide cannot be opened, so there are no pictures: {{ unreadable }}</p>
{% else %}
<p class="key"><label><input type="checkbox" id="cells" checked> cells</label>
{% for name, colour in groups %}<label><input type="checkbox" id="t{{ loop.index0 }}" checked>
{{- swatch(loop.index0) }}{{ name }}</label>{% endfor %}</p>
<h2>The slide</h2>
<p>{% if part %}The part with cells, {{ part }}. {% endif %}
{{ points or "Each cell is a point" }} in the colour of its type, on the slide in grey; without the tick at “cells” the
slide has its own colours. Blue squares: the fields below.</p>
<div class="pic" style="display:inline-block"><img alt="the slide" src="data:image/jpeg;base64,{{ tissue }}">
<img class="over" alt="the slide with its cells" src="data:image/jpeg;base64,{{ overview }}"></div>
<h2>Fields of {{ field_size }}</h2>
<p>{{ "Outlines" if given else "Boxes" }} have the colour of the type; the ticks above hide them, and the mouse shows
number and scores.</p>
{% for one in fields %}{{ picture(one, 460) }}{% else %}<p>There are no cells.</p>{% endfor %}
<h2>Density</h2>
<p>Cells per mm² of slide, in squares of {{ squares[0] }}, smoothed by a Gaussian window of {{ squares[1] }}.
All maps have the same colours and scale bar.</p>
<img alt="density of cells" src="data:image/jpeg;base64,{{ density }}">
<h2>Most and least certain cells</h2>
<p>Crops of {{ crop }}, with the score of the type below; of cells without a type, the nucleus score.</p>
{% for ranked, pictures in extremes %}{% if loop.changed(ranked.group) %}
<h3>{{ swatch(ranked.group) }}{{ groups[ranked.group][0] }}</h3>{% endif %}
<p class="row">{{ ranked.words }}</p>
<div class="crops">{% for one in pictures %}{{ picture(one, 108) }}{% endfor %}</div>
{% else %}<p>There are no cells with a score.</p>{% endfor %}
{% endif %}
<h2>Embeddings</h2>
<p>{{ umap_words }}</p>
{% if umap %}<img alt="UMAP of the embeddings by type and by scores" src="data:image/jpeg;base64,{{ umap }}">{% endif %}
<h2>Quality</h2>
{{ table(["what", "count"], quality) }}
{% if given %}<p>Cells outside of the slide or in a damaged tile have no scores and no embedding.</p>{% endif %}
{% if seconds %}{{ table(["stage", "seconds"], seconds) }}{% endif %}
{{ table(["made with", ""], origin, 2) }}
"""


def write_cells_page(
    path: str | os.PathLike[str],
    cells: CellFile,
    slide_file: str | os.PathLike[str],
    *,
    title: str,
    synthetic: bool = False,
) -> None:
    """Write the page (HTML, self-contained) about the cells of a slide.

    Memory holds positions and scores of all cells, and the embeddings of a sample. Parts of the slide that cannot be
    decoded are white. `synthetic`: the slide is drawn, and the page says so.

    Raises
    ------
    InputError
        The slide cannot be opened although cells were found on it; or its size is not that of the cells' slide.
    """
    info = cells.info
    frame = _load(cells)
    drawn = _drawn(frame, info)
    extent = (info.size[0] * info.mpp, info.size[1] * info.mpp)
    values: dict[str, Any] = {
        "title": title,
        "banner": BANNER if synthetic else "",
        "file": user_named(info.file),
        "given": info.given,
        "read": f"{len(drawn):,}" + (f" of {len(cells):,}" if info.given else ""),
        "size": _size(extent),
        "groups": list(zip(drawn.names, drawn.colours, strict=True)),
        **_counts(drawn, info),
        **_quality(frame, info),
    }
    try:
        image = open_slide(slide_file, info.mpp, info.slide)
    except DamagedSlide as error:
        if len(drawn):
            raise
        values["unreadable"] = user_named(str(error))
    else:
        with image:
            values |= _pictures(image, cells, drawn, extent)
    figure, words = embedding_map(cells, drawn, _SEED)
    values["umap"] = embed_figure(figure, _DPI) if figure else ""
    write_page(path, _BODY, values | {"umap_words": words})


def _load(cells: CellFile) -> pd.DataFrame:
    """Positions, sizes and scores of all cells (N)."""
    names = ["x_um", "y_um", "width_um", "height_um", "nucleus_score", "border", "status", "type"]
    return cells.frame([*names, *(f"score_{name}" for name in cells.info.classes)])


def _drawn(frame: pd.DataFrame, info: CellsInfo) -> DrawnCells:
    """Cells that the model has seen."""
    numbers = np.flatnonzero(frame["status"] == "read")
    read = frame.iloc[numbers]
    groups = np.full(len(read), len(info.classes), dtype=np.int64)
    if info.classes:
        codes = read["type"].cat.codes.to_numpy()
        groups[codes >= 0] = codes[codes >= 0]
    nucleus = read["nucleus_score"].to_numpy(np.float64)
    certainty = nucleus.copy()
    for group, name in enumerate(info.classes):
        certainty[groups == group] = read[f"score_{name}"].to_numpy()[groups == group]
    return DrawnCells(
        numbers=numbers,
        centres=read[["x_um", "y_um"]].to_numpy(np.float64),
        sizes=read[["width_um", "height_um"]].max(axis=1).to_numpy(np.float64),
        groups=groups,
        certainty=certainty,
        nucleus_score=nucleus,
        names=(*info.classes, _NO_TYPE if info.classes else "cell"),
        colours=class_colours(info.classes),
    )


def _counts(cells: DrawnCells, info: CellsInfo) -> dict[str, Any]:
    """Count the cells of each type: index of the group and texts."""
    mm2 = float(info.areas.get("read_mm2") or 0)
    tissue = bool(info.areas.get("tissue_mm2"))
    rows = []
    for group in range(len(cells.names)):
        members = cells.groups == group
        count, sizes = int(members.sum()), cells.sizes[members]
        scores = cells.certainty[members & np.isfinite(cells.certainty)]
        rows.append(
            (
                group,
                (
                    f"{count:,}",
                    f"{count / len(cells):.1%}" if len(cells) else DASH,
                    f"{count / mm2:,.0f}" if mm2 else DASH,
                    f"{np.median(scores):.2f}" if len(scores) else DASH,
                    f"{np.median(sizes):.1f}" if len(sizes) else DASH,
                ),
            )
        )
    return {
        "types": rows,
        "heads": (
            "cells",
            "share",
            "per mm² of tissue" if tissue else "per mm² read",
            "median score",
            "median longer side, µm",
        ),
        "area": f" in {mm2:,.3g} mm² of tissue" if mm2 and tissue else "",
    }


def _quality(frame: pd.DataFrame, info: CellsInfo) -> dict[str, Any]:
    """Tabulate how the slide was read, and with what."""
    areas, counts = info.areas, info.counts
    rows = [(f"{_AREAS.get(name, name)}, mm²", f"{value:,.2f}") for name, value in areas.items()]
    if areas.get("tissue_mm2"):
        rows.append(("share of the tissue that was read", f"{areas.get('read_mm2', 0) / areas['tissue_mm2']:.1%}"))
    rows += [(name, f"{value:,}") for name, value in counts.items()]
    border = int(frame["border"].sum())
    rows.append(("cells that the edge of their tile cuts", f"{border:,} ({border / max(1, len(frame)):.2%})"))
    if info.given and counts.get("detections"):
        agree = counts.get("cells with a detection", 0)
        read = int((frame["status"] == "read").sum())
        rows.append(("share of the cells read that have a detection", f"{agree / max(1, read):.1%}"))
        alone = counts.get("detections without a cell", 0)
        rows.append(("share of the detections without a cell", f"{alone / counts['detections']:.1%}"))
    seen = info.model.get("seen")
    warning = "The model was trained on this slide or its group: scores are better than on a new slide." if seen else ""
    origin = {f"model: {_MODEL.get(name, name)}": value for name, value in info.model.items()}
    origin |= {**info.settings, **info.provenance}
    return {
        "quality": rows,
        "seconds": [(name, f"{value:,.1f}") for name, value in info.seconds.items()],
        "origin": [(name, _words(value)) for name, value in origin.items()],
        "warning": warning,
    }


def _words(value: object) -> str:
    """Value of the metadata for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return {"True": "yes", "False": "no", "None": "unknown"}.get(str(value), str(value))


def _pictures(image: Pyramid, file: CellFile, cells: DrawnCells, extent: tuple[float, float]) -> dict[str, Any]:
    """Everything on the page that shows the slide.

    Raises
    ------
    InputError
        It is another slide.
    """
    info = file.info
    if image.size != info.size:
        raise InputError(
            f"{info.slide}: {image.path}: got a slide of {image.size[0]} x {image.size[1]} px, expected "
            f"{info.size[0]} x {info.size[1]} px as in {file.path}; was the slide replaced? Then find its cells again"
        )
    tolerant = TolerantPyramid(image)
    view = view_of(tolerant, cells, info.mpp)
    log_damage(info.slide, tolerant.damage())
    fields, ranked, side = choose_fields(cells, extent), rank(cells), crop_side(cells)
    pictures = CellPictures(image, file, cells, fields, ranked)
    return {
        "tissue": embed_figure(slide_figure(view, fields, None, _SEED)),
        "overview": embed_figure(slide_figure(view, fields, cells, _SEED)),
        "part": _size(view.size.tolist()) if (view.size < extent).all() else "",
        "points": f"{POINTS:,} cells, drawn from {len(cells):,}, are points" if len(cells) > POINTS else "",
        "fields": [pictures.field(field) for field in fields],
        "field_size": length_text(round(fields[0].side, 1)) if fields else "",
        "density": embed_figure(density_figure(view, cells), _DPI),
        "squares": [length_text(um) for um in density_squares(view)],
        "extremes": [(one, pictures.crops(one, side)) for one in ranked],
        "crop": length_text(side),
    }


def _size(um: Sequence[float]) -> str:
    """Write a width and a height for people."""
    return " × ".join(length_text(float(f"{side:.3g}")) for side in um)
