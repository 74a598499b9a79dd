"""Write the cells of a slide as SpatialData: shapes and a table; if asked for, the slide's pixels, or where it lies.

Inputs: cells (Parquet), image (the slide, or nothing). Output: the Zarr. Params: embeddings (their type: float32 or
float16), image (none, link or write).
"""

from celldetr.cells.spatialdata_zarr import write_spatialdata
from celldetr.cells.table import CellFile
from celldetr.runtime.rule import run_rule


def main(snakemake):
    given, params = snakemake.input, snakemake.params
    write_spatialdata(
        CellFile(given.cells),
        snakemake.output[0],
        params.embeddings,
        image=given.get("image") or None,
        link=params.image == "link",
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
