"""Predict the test fold of a split.

Input: ``model`` (weights of the experiment), ``store`` (patch store of the test fold).
Output: Parquet, a row per detection: patch, query, box (xyxy px), nucleus score, class scores, label, embedding.
Params: nucleus_threshold, batch_size, precision, compile, embeddings (whether they are kept), class_map (class of the
model -> class of the store; for zero-shot transfer, else None), trained_on (groups that a given model file has seen;
else None).
"""

import logging

import torch

from celldetr.inference.fold import origin_of
from celldetr.inference.predict import predict_fold
from celldetr.model.device import best_device
from celldetr.model.weights import load_model
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store

log = logging.getLogger("predict")


def main(snakemake):
    torch.set_num_threads(snakemake.threads)
    device = best_device()
    store = open_store(snakemake.input.store)
    metadata = origin_of(
        snakemake.input.model,
        store,
        experiment=snakemake.wildcards.experiment,
        split=int(snakemake.wildcards.split),
        declared=snakemake.params.trained_on,
        precision=snakemake.params.precision,
    )
    count = predict_fold(
        load_model(snakemake.input.model, device, mpp=store.mpp, patch_size=store.patch_size),
        store,
        snakemake.output[0],
        nucleus_threshold=snakemake.params.nucleus_threshold,
        batch_size=snakemake.params.batch_size,
        class_map=snakemake.params.class_map,
        device=device,
        precision=snakemake.params.precision,
        compiling=snakemake.params.compile,
        embeddings=snakemake.params.embeddings,
        metadata=metadata,
        progress=True,
    )
    log.info("%d detections in %d patches on %s", count, store.n_patches, metadata["device"])


if "snakemake" in globals():
    run_rule(main, snakemake)
