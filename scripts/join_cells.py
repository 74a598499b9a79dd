"""Join the parts of all jobs that share a slide into the one file of its cells.

Inputs: the folders of `find_cells`, in the order of the jobs. Outputs: cells (Parquet), provenance (its metadata as
JSON). Param: class_threshold (a cell whose class scores are all below has no type).
"""

import json

from celldetr.cells.join import join_cells
from celldetr.runtime.files import write_json
from celldetr.runtime.rule import run_rule


def main(snakemake):
    info = join_cells(list(snakemake.input), snakemake.output.cells, class_threshold=snakemake.params.class_threshold)
    write_json(snakemake.output.provenance, json.loads(info.to_json()))


if "snakemake" in globals():
    run_rule(main, snakemake)
