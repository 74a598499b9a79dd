"""Write the cells of a slide as AnnData, for scanpy and squidpy.

Input: the file of cells (Parquet). Output: .h5ad. Params: embeddings (their type: float32 or float16).
"""

from celldetr.cells.h5ad import write_h5ad
from celldetr.cells.table import CellFile
from celldetr.runtime.rule import run_rule


def main(snakemake):
    write_h5ad(CellFile(snakemake.input[0]), snakemake.output[0], snakemake.params.embeddings)


if "snakemake" in globals():
    run_rule(main, snakemake)
