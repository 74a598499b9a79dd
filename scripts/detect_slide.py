"""Find the nuclei of a slide with a trained model.

Inputs: the slide (file) and the model. Output: a file of cells (GeoParquet) without types and embeddings.
Params: settings (slides.detection), on_damage, patch_size (px) and mpp (um per px) of the model, slide_mpp (um per px,
or null), nucleus_threshold, precision, compile, code. Wildcard: slide.
"""

from pathlib import Path

import torch

from celldetr.cells.find import FindSettings, Slide
from celldetr.cells.model import CellModel
from celldetr.cells.nuclei import find_nuclei
from celldetr.config.slides import DetectionSettings
from celldetr.model.device import best_device
from celldetr.runtime.rule import run_rule


def main(snakemake):
    params = snakemake.params
    torch.set_num_threads(snakemake.threads)
    detection = DetectionSettings.from_dict(params.settings, "slides.detection")
    settings = FindSettings(
        margin_um=detection.margin_um,
        nucleus_threshold=params.nucleus_threshold,
        batch_size=detection.batch_size,
        on_damage=params.on_damage,
        embeddings=None,
    )
    find_nuclei(
        Slide(snakemake.wildcards.slide, Path(snakemake.input.file), params.slide_mpp),
        CellModel.load(
            snakemake.input.model,
            mpp=params.mpp,
            size=params.patch_size,
            device=best_device(),
            precision=params.precision,
            compiling=params.compile,
        ),
        snakemake.output[0],
        settings,
        workers=snakemake.threads,
        identity={"code": params.code},
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
