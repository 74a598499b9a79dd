"""Write the cells of a slide as compressed GeoJSON, for QuPath.

Input: the file of cells (Parquet). Output: .geojson.gz.
"""

from celldetr.cells.qupath import write_geojson
from celldetr.cells.table import CellFile
from celldetr.runtime.rule import run_rule


def main(snakemake):
    write_geojson(CellFile(snakemake.input[0]), snakemake.output[0])


if "snakemake" in globals():
    run_rule(main, snakemake)
