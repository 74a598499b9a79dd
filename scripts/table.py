"""Write a table of the paper: published rows beside measured ones.

Input: ``scores`` (TSV files of the score rule), ``readouts`` (those of the readout rule, may be none), ``published``
(TSV of published rows).
Output: ``tsv`` (a row per system), ``splits`` (every split, metric and class), ``md`` and ``html`` for people,
``provenance``.
"""

from pathlib import Path

from celldetr.report.rendering import html, markdown
from celldetr.report.tables import (
    System,
    build_table,
    read_published,
    read_readouts,
    read_scores,
    scored_with,
    write_tsv,
)
from celldetr.runtime.files import atomic
from celldetr.runtime.provenance import write_provenance
from celldetr.runtime.rule import run_rule


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    settings = {key: params[key] for key in ("systems", "splits", "metric", "protocol", "synthetic")}
    table = build_table(
        Path(output.tsv).stem,
        read_published(snakemake.input.published),
        read_scores(snakemake.input.scores),
        [System(**system) for system in params.systems],
        splits=params.splits,
        metric=params.metric,
        protocol=params.protocol,
        readouts=read_readouts(snakemake.input.readouts) if snakemake.input.readouts else None,
        synthetic=params.synthetic,
    )
    write_tsv(output.tsv, table.rows)
    write_tsv(output.splits, table.splits)
    for path, text in ((output.md, markdown(table)), (output.html, html(table))):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_provenance(
        output.provenance,
        settings={**settings, **scored_with(table.splits)},
        inputs=[*snakemake.input.scores, *snakemake.input.readouts, snakemake.input.published],
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
