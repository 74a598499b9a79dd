"""Find the nuclei of a slide with a trained model.

Inputs: the slide (file) and the model. Output: GeoParquet, a rectangle (px of level 0) and a score for each nucleus.
Params: settings (slides.detection), on_damage, patch_size (px) and mpp (um per px) of the model, slide_mpp (um per px,
or null), nucleus_threshold, precision. Wildcard: slide.
"""

import torch

from celldetr.config.slides import DetectionSettings
from celldetr.inference.detection import Tiling, detect_slide, model_detector, write_nuclei
from celldetr.model.device import best_device
from celldetr.model.weights import load_model
from celldetr.runtime.rule import run_rule


def main(snakemake):
    params = snakemake.params
    torch.set_num_threads(snakemake.threads)
    device = best_device()
    model = load_model(snakemake.input.model, device, mpp=params.mpp)
    settings = DetectionSettings.from_dict(params.settings, "slides.detection")
    boxes, scores = detect_slide(
        snakemake.input.file,
        model_detector(model, params.nucleus_threshold, device, params.precision),
        Tiling.of(params.patch_size, params.mpp, settings.margin_um),
        slide=snakemake.wildcards.slide,
        slide_mpp=params.slide_mpp,
        batch_size=settings.batch_size,
        on_damage=params.on_damage,
        workers=snakemake.threads,
    )
    write_nuclei(snakemake.output[0], boxes, scores)


if "snakemake" in globals():
    run_rule(main, snakemake)
