"""Write a table of the paper: published rows beside measured ones.

Input: ``scores`` (TSV files of the score rule), ``frozen_features`` (TSV files of that rule, or none), ``published``
(TSV of published rows).
Output: ``tsv`` (a row per system), ``splits`` (every split, metric and class), ``md`` and ``html`` for people,
``provenance``.
"""

from pathlib import Path

from celldetr.report.rendering import html, markdown
from celldetr.report.tables import (
    System,
    build_table,
    published_classes,
    read_frozen_features,
    read_published,
    read_scores,
)
from celldetr.runtime.files import atomic, write_tsv
from celldetr.runtime.provenance import write_provenance
from celldetr.runtime.rule import run_rule


def main(snakemake):
    params, output, given = snakemake.params, snakemake.output, snakemake.input
    settings = {key: params[key] for key in ("systems", "splits", "metric", "protocol", "synthetic")}
    published = read_published(given.published)
    classes = published_classes(published.columns)
    table = build_table(
        Path(output.tsv).stem,
        published,
        read_scores(given.scores, classes),
        [System(**system) for system in params.systems],
        metric=params.metric,
        protocol=params.protocol,
        frozen_features=read_frozen_features(given.frozen_features, classes) if given.frozen_features else None,
        synthetic=params.synthetic,
    )
    write_tsv(output.tsv, table.rows)
    write_tsv(output.splits, table.splits)
    for path, text in ((output.md, markdown(table)), (output.html, html(table))):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_provenance(
        output.provenance,
        settings={**settings, **table.scored_with},
        inputs=[*given.scores, *given.frozen_features, given.published],
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
