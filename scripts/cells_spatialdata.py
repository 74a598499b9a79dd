"""Write the cells of a slide as SpatialData: shapes and a table, and the slide's pixels if they are asked for.

Inputs: cells (Parquet), image (the slide, or nothing). Output: the Zarr. Params: embeddings (their type: float32 or
float16).
"""

from celldetr.cells.spatialdata_zarr import write_spatialdata
from celldetr.cells.table import CellFile
from celldetr.runtime.rule import run_rule


def main(snakemake):
    given = snakemake.input
    write_spatialdata(
        CellFile(given.cells), snakemake.output[0], snakemake.params.embeddings, image=given.get("image") or None
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
