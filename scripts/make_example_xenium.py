"""Draw synthetic tissue and write it as a Xenium sample with its H&E image, the raw input of the example.

Output: ``outs`` (zip of the output folder), ``he`` (OME-TIFF), ``alignment`` (CSV, wrong by as much as the params say).
Params: sample (see `celldetr.config.workflow.ExampleSampleSettings`), number (of the sample), he_mpp (um per px), seed.
"""

import logging
import os
import tempfile
from pathlib import Path

from celldetr.example.xenium.sample import AffinePlan, write_xenium
from celldetr.runtime.rule import run_rule

log = logging.getLogger("make_example_xenium")


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    plan = params.sample
    folder = Path(output.outs).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".example") as scratch:
        truth = write_xenium(
            scratch,
            seed=params.seed + params.number,
            name=snakemake.wildcards.sample,
            size_um=tuple(plan["size_um"]),
            version=plan["version"],
            he_mpp=params.he_mpp,
            affine=AffinePlan(rotation_deg=plan["rotation"], shift_um=(40.0, -25.0), shear=0.005),
            alignment=plan["alignment"],
            file_error=AffinePlan(plan["wrong_rotation"], (plan["wrong_shift"], plan["wrong_shift"])),
            archive=True,
        )
        os.replace(truth.archive, output.outs)
        os.replace(truth.he_image, output.he)
        os.replace(truth.alignment, output.alignment)
    log.info("%d cells, %d nuclei, H&E %d x %d px", len(truth.cell_ids), len(truth.nuclei_um), *truth.he_size)


if "snakemake" in globals():
    run_rule(main, snakemake)
