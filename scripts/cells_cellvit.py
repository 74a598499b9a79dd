"""Write the cells of a slide for the viewer of CellViT.

Input: the file of cells (Parquet). Output: .cellvit.geojson.
"""

from celldetr.cells.cellvit import write_cellvit
from celldetr.cells.table import CellFile
from celldetr.runtime.rule import run_rule


def main(snakemake):
    write_cellvit(CellFile(snakemake.input[0]), snakemake.output[0])


if "snakemake" in globals():
    run_rule(main, snakemake)
