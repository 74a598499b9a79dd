"""Draw figure 5b: which cell types are confused on the Xenium test patches.

Input: ``predictions`` (Parquet of the predict rule), ``store`` (the test patches). Output: ``png``, ``svg``, ``tsv``
(true nuclei per type and predicted type). Params: nucleus_threshold, radius_um, title.
"""

from celldetr.evaluation.predictions import read_predictions
from celldetr.report.figure5 import confusion, figure5b
from celldetr.report.style import save
from celldetr.runtime.files import write_tsv
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    table = confusion(
        read_predictions(snakemake.input.predictions),
        open_store(snakemake.input.store),
        params.nucleus_threshold,
        params.radius_um,
    )
    figure = figure5b(table, params.title)
    save(figure, output.png, output.svg)
    write_tsv(output.tsv, table.rename_axis("type").reset_index())


if "snakemake" in globals():
    run_rule(main, snakemake)
