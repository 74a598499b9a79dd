"""Write a synthetic scRNA-seq reference in CELLxGENE's layout, the raw input of the example.

Output: the .h5ad. Params: cells, seed.
"""

import logging

from celldetr.example.xenium.expression import write_reference
from celldetr.runtime.rule import run_rule

log = logging.getLogger("make_example_reference")


def main(snakemake):
    cells = write_reference(snakemake.output[0], seed=snakemake.params.seed, cells=snakemake.params.cells)
    log.info("cells per label: %s", cells.to_dict())


if "snakemake" in globals():
    run_rule(main, snakemake)
