"""Markdown and HTML of a `celldetr.report.tables.Table`."""

import re
from typing import NamedTuple

import jinja2
import pandas as pd

from celldetr.evaluation.counting import SEGMENTATION
from celldetr.report.style import BANNER, DASH
from celldetr.report.tables import FROZEN, LETTERS, MEASURED, OTHER, OURS, PAPER, Table, value_columns
from celldetr.runtime.files import MISSING

SHOWN_DECIMALS = 3
_METRIC_WORDS = {
    "strict": "strict (only true and predicted nuclei count)",
    "hovernet_compat": "hovernet_compat (as published: an image without truth or predictions gets one background point "
    "at (0, 0), and predictions of a class without truth score 0)",
}
_RULE_WORDS = {
    "both_thresholds": "nucleus score ≥ {nucleus_threshold:g} and class score ≥ {class_threshold:g}",
    "class": "class score ≥ {class_threshold:g}",
    "product": "nucleus score × class score ≥ {class_threshold:g} (a baseline has one score, which counts once)",
}
_SECTIONS = {
    PAPER: "Published in the paper",
    OTHER: "Published elsewhere",
    MEASURED: "Measured here",
    OURS: "Measured here: ours, beyond the paper",
    FROZEN: "Measured here: true boxes, frozen embeddings",
}
_MARKS = "abcdefghijklmnopqrstuvwxyz"


class _Row(NamedTuple):
    """System, mark of its note, whether it was measured here, and its cells: text, and whether it is the best."""

    system: str
    mark: str
    measured: bool
    cells: list[tuple[str, bool]]


def caption(table: Table) -> str:
    """Describe the values: metric, protocol, splits, score rule."""
    settings = table.scored_with
    folds = table.splits.drop_duplicates("split").sort_values("split")
    tested = ", ".join(
        f"{store} (split {split})" for split, store in zip(folds["split"], folds["test_store"], strict=True)
    )
    rule = _RULE_WORDS[str(settings["score_rule"])].format(**settings)
    if (table.splits["mode"] == SEGMENTATION).any():
        rule += ", of a system that segments nuclei always"
    n_splits = len(folds)
    return (
        f"Precision (P), recall (R) and F1 (F) of detection and per class. Measured rows: "
        f"{f'mean over {n_splits} splits' if n_splits > 1 else 'one split'} of protocol {table.protocol}, tested on "
        f"{tested}; metric {_METRIC_WORDS[table.metric]}; a detection counts with {rule}; centres "
        f"({settings['centres']}) pair up to {settings['radius']:g} px apart. Best measured value in bold. "
        f"Published rows as printed in their source. {DASH}: no value, or no truth of the class. "
        f"Every split with 95 % bootstrap intervals and counts, for both metrics: {table.name}_splits.tsv."
    )


def _sections(table: Table) -> tuple[dict[str, list[_Row]], list[str]]:
    """Rows by the title of their section, and the notes with their marks."""
    best = _best(table)
    sections: dict[str, list[_Row]] = {}
    marks: dict[str, str] = {}
    for index, row in table.rows.iterrows():
        grouped = row["source"] in (PAPER, MEASURED) and row["group"]
        title = _SECTIONS[row["source"]] + (f": {row['group']}" if grouped else "")
        note = "; ".join(text for text in (row["citation"] and f"From {row['citation']}", row["note"]) if text)
        mark = marks.setdefault(note, _MARKS[len(marks) % len(_MARKS)]) if note else ""
        measured = row["source"] in (MEASURED, OURS, FROZEN)
        cells = [(_shown(row[name], measured), (index, name) in best) for name in value_columns(table.classes)]
        sections.setdefault(title, []).append(_Row(row["system"], mark, measured, cells))
    return sections, [f"{mark}: {note}" for note, mark in marks.items()]


def _shown(text: str, measured: bool) -> str:
    if text == MISSING:
        return DASH
    return f"{float(text):.{SHOWN_DECIMALS}f}" if measured else text


def _best(table: Table) -> set[tuple[object, str]]:
    """Cells (row, column) with the best measured value as shown, if there are two values or more."""
    rows = table.rows.loc[table.rows["source"].isin((MEASURED, OURS)), value_columns(table.classes)]
    numbers = rows.apply(pd.to_numeric, errors="coerce").round(SHOWN_DECIMALS)
    best = ((numbers == numbers.max()) & (numbers.count() > 1)).stack()
    return set(best[best].index)


def escaped(text: str) -> str:
    """Escape text for a cell or a line of Markdown, so that it is shown as it is; a line break becomes a space."""
    text = re.sub(r"([\\`*\[\]<>|~&$])|(?<![^\W_])_|_(?![^\W_])", lambda found: f"\\{found[0]}", text)
    return " ".join(text.split())


def markdown(table: Table) -> str:
    """Render a table as Markdown."""
    sections, notes = _sections(table)
    head = ["System", *(escaped(f"{name} {letter}") for name in table.classes for letter in LETTERS)]
    lines = [f"# {_title(table)}", ""]
    if table.synthetic:
        lines += [f"> **{BANNER}**", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" + "--:|" * (len(head) - 1)]
    for title, rows in sections.items():
        lines.append(f"| **{escaped(title)}** |" + " |" * (len(head) - 1))
        for row in rows:
            name = escaped(row.system) + (f" ({row.mark})" if row.mark else "")
            cells = [f"**{text}**" if best else text for text, best in row.cells]
            lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", escaped(caption(table)), ""]
    lines += [f"- {escaped(note)}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"


def html(table: Table) -> str:
    """Render a table as a self-contained HTML page."""
    sections, notes = _sections(table)
    return _PAGE.render(
        title=_title(table),
        banner=BANNER if table.synthetic else "",
        classes=table.classes,
        letters=list(LETTERS),
        sections=sections,
        caption=caption(table),
        notes=notes,
    )


def _title(table: Table) -> str:
    return table.name.replace("table", "Table ") if table.name[5:].isdigit() else table.name


_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font-family: "Liberation Sans", Arial, Helvetica, sans-serif; color: #1a1a1a; background: #fff; margin: 2em; }
main { width: max-content; max-width: 100%; }
h1 { font-size: 1.4em; }
.banner { background: #fff3cd; border: 2px solid #b8860b; color: #5c4400; font-weight: bold; font-size: 1.1em;
  padding: .7em 1em; margin-bottom: 1em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums; white-space: nowrap;
  border-top: 2px solid #1a1a1a; border-bottom: 2px solid #1a1a1a; }
th, td { padding: .28em .5em; text-align: right; }
tr > :first-child { text-align: left; padding-right: 1.2em; font-weight: normal; }
thead th { text-align: center; }
thead tr:last-child th { font-weight: normal; border-bottom: 1px solid #1a1a1a; text-align: right; }
thead tr:last-child th:first-child { text-align: left; }
.first { border-left: 1px solid #ccc; }
tbody th.section { text-align: left; font-weight: bold; border-top: 1px solid #999; padding-top: .6em; }
tr.measured { background: #e8f1fa; }
sup { line-height: 0; color: #555; padding-left: .15em; }
p, li { line-height: 1.45; }
.caption { font-size: .9em; max-width: 75em; }
ul { list-style: none; padding: 0; font-size: .82em; color: #444; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if banner %}
<div class="banner" role="note">{{ banner }}</div>
{% endif %}
<div class="scroll">
<table>
<thead>
<tr><th></th>
{%- for name in classes %}<th class="first" colspan="{{ letters|length }}">{{ name }}</th>{% endfor %}</tr>
<tr><th>System</th>
{%- for name in classes %}{% for letter in letters %}<th{% if loop.first %} class="first"{% endif %}>{{ letter }}</th>
{%- endfor %}{% endfor %}</tr>
</thead>
{% for title, rows in sections.items() %}
<tbody>
<tr><th class="section" colspan="{{ 1 + classes|length * letters|length }}">{{ title }}</th></tr>
{% for row in rows %}
<tr{% if row.measured %} class="measured"{% endif %}>
<th>{{ row.system }}{% if row.mark %}<sup>{{ row.mark }}</sup>{% endif %}</th>
{%- for text, best in row.cells %}<td{% if loop.index0 % letters|length == 0 %} class="first"{% endif %}>
{%- if best %}<strong>{{ text }}</strong>{% else %}{{ text }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
</div>
<p class="caption">{{ caption }}</p>
{% if notes %}
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
</main>
</body>
</html>
""")
