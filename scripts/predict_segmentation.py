"""Segment the test fold of a split with a trained system.

Input: ``model`` (weights of the experiment), ``store`` (patch store of the test fold).
Output: Parquet, a row per nucleus: patch, query (its number in the patch), box (xyxy px), nucleus score, class scores,
label, mask.
Params: batch_size, precision.
"""

import logging

import torch

from celldetr.inference.fold import origin_of
from celldetr.inference.segment import segment_fold
from celldetr.model.device import best_device
from celldetr.runtime.rule import run_rule
from celldetr.segmentation.model_file import load_system
from celldetr.store import open_store

log = logging.getLogger("predict")


def main(snakemake):
    torch.set_num_threads(snakemake.threads)
    device, store = best_device(), open_store(snakemake.input.store)
    metadata = origin_of(
        snakemake.input.model,
        store,
        experiment=snakemake.wildcards.experiment,
        split=int(snakemake.wildcards.split),
        declared=None,
        precision=snakemake.params.precision,
    )
    count = segment_fold(
        load_system(snakemake.input.model, device, mpp=store.mpp, patch_size=store.patch_size),
        store,
        snakemake.output[0],
        batch_size=snakemake.params.batch_size,
        device=device,
        precision=snakemake.params.precision,
        metadata=metadata,
        progress=True,
    )
    log.info("%d nuclei in %d patches on %s", count, store.n_patches, metadata["device"])


if "snakemake" in globals():
    run_rule(main, snakemake)
