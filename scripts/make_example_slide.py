"""Draw synthetic tissue and write it as a whole slide with the outlines of its nuclei, raw input of the example.

Output: ``slide`` (pyramidal TIFF), ``nuclei`` (GeoParquet, level-0 px), ``cells`` (the same with ids, all valid).
Params: size_um (width and height of the tissue), mpp (um per px of level 0), number (of the slide), seed.
"""

import logging

from celldetr.example.slide import write_slide
from celldetr.runtime.rule import run_rule

log = logging.getLogger("make_example_slide")


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    truth = write_slide(
        output.slide,
        output.nuclei,
        output.cells,
        seed=params.seed + params.number,
        size_um=tuple(params.size_um),
        mpp=params.mpp,
    )
    log.info("%d x %d px, %d nuclei", *truth.size, len(truth.nuclei))


if "snakemake" in globals():
    run_rule(main, snakemake)
