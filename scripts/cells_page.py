"""Draw the page of a slide's cells: where they are, by type; counts; examples; embeddings.

Inputs: cells (Parquet), file (the slide). Output: HTML. Param: synthetic (whether the slide is drawn). Wildcard: slide.
"""

from celldetr.cells.table import CellFile
from celldetr.report.cells import write_cells_page
from celldetr.runtime.rule import run_rule


def main(snakemake):
    given = snakemake.input
    write_cells_page(
        snakemake.output[0],
        CellFile(given.cells),
        given.file,
        title=f"Cells of {snakemake.wildcards.slide}",
        synthetic=snakemake.params.synthetic,
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
