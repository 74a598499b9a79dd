"""Draw a balanced reference of the ten cell types from an annotated single-cell data set.

Input: ``h5ad`` (raw counts, labels), ``mapping`` (TSV: label, type). Output: ``reference`` (.h5ad: raw counts, obs
type, label, held_out), ``summary`` (JSON). Params: label_column, cells (of the file, or None), cells_per_type, seed.
"""

from celldetr.runtime.files import write_json
from celldetr.runtime.rule import run_rule
from celldetr.xenium.celltypes.mapping import read_mapping
from celldetr.xenium.celltypes.reference import prepare_reference, write_reference


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    reference, summary = prepare_reference(
        snakemake.input.h5ad,
        read_mapping(snakemake.input.mapping),
        label_column=params.label_column,
        cells=params.cells,
        cells_per_type=params.cells_per_type,
        seed=params.seed,
        mapping_file=snakemake.input.mapping,
    )
    write_reference(output.reference, reference)
    write_json(output.summary, summary)


if "snakemake" in globals():
    run_rule(main, snakemake)
