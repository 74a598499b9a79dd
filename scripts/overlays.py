"""Draw detections beside the true nuclei of some test patches.

Input: ``predictions`` (Parquet of the predict rule), ``store`` (patch store of the same fold).
Output: PNG, each patch twice: with the true and with the predicted boxes, coloured by class; outlines, if there are
masks.
"""

from pathlib import Path

from celldetr.evaluation.predictions import read_predictions
from celldetr.report.overlays import choose_patches, overlays
from celldetr.report.style import save
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store

DPI = 120  # a picture for each experiment and split: the report must stay small


def main(snakemake):
    store = open_store(snakemake.input.store)
    predictions = read_predictions(snakemake.input.predictions, patch_size=store.patch_size)
    predictions.check_store(store)
    patches = choose_patches(store.box_ptr, snakemake.params.patches, snakemake.params.seed)
    figure = overlays(
        store.images(patches),
        patches,
        [store.boxes_of(int(patch)) for patch in patches],
        predictions,
        title=f"{snakemake.wildcards.experiment}, split {snakemake.wildcards.split}: "
        f"test patches of {Path(snakemake.input.store).stem}",
        instances=None if predictions.masks is None else store.instances(patches),
    )
    save(figure, snakemake.output[0], dpi=DPI)


if "snakemake" in globals():
    run_rule(main, snakemake)
