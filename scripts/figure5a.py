"""Draw figure 5a: nuclei per cell type in the patches of each Xenium sample.

Input: ``stores`` (patch stores of the samples). Output: ``png``, ``svg``, ``tsv`` (the counts).
Params: titles (sample -> title).
"""

from pathlib import Path

from celldetr.report.figure5 import composition, figure5a
from celldetr.report.style import save
from celldetr.runtime.files import write_tsv
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store


def main(snakemake):
    counts = {Path(path).stem: open_store(path).attrs["counts"] for path in snakemake.input.stores}
    table = composition(counts)
    figure = figure5a(table, snakemake.params.titles)
    save(figure, snakemake.output.png, snakemake.output.svg)
    write_tsv(snakemake.output.tsv, table.rename_axis("sample").reset_index())


if "snakemake" in globals():
    run_rule(main, snakemake)
