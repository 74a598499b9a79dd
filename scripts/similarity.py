"""Measure how well a contrastively pretrained model finds nuclei again from noised boxes.

Input: ``model`` (of stage ssl), ``store`` (patch store; its classes have no influence).
Output: ``matrices`` (NPZ: similarity of anchors to originals in a few patches), ``retrieval`` (JSON: share of all
anchors that find their own nucleus, and mean similarities).
Params: patches (number drawn), seed, noise (its range: low, high, enlarge), batch_size.
"""

import logging
from pathlib import Path

import torch

from celldetr.config.experiment import NoiseSettings
from celldetr.evaluation.similarity import choose_readable
from celldetr.inference.similarity import measure_similarity
from celldetr.model.device import best_device
from celldetr.model.weights import load_model
from celldetr.runtime.files import write_json, write_npz
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store

log = logging.getLogger("similarity")


def main(snakemake):
    torch.set_num_threads(snakemake.threads)
    params, device = snakemake.params, best_device()
    store = open_store(snakemake.input.store)
    drawn, measured = measure_similarity(
        load_model(snakemake.input.model, device, mpp=store.mpp, patch_size=store.patch_size),
        store,
        patches=choose_readable(store.box_ptr, params.patches, params.seed),
        seed=params.seed,
        noise=NoiseSettings.from_dict(params.noise),
        batch_size=params.batch_size,
        device=device,
        progress=True,
    )
    write_npz(snakemake.output.matrices, drawn)
    origin = {"store": Path(snakemake.input.store).stem, "seed": params.seed, "noise": params.noise}
    write_json(snakemake.output.retrieval, {**measured, **origin})
    log.info("%s of %d anchors find their own nucleus", measured["retrieval"], measured["anchors"])


if "snakemake" in globals():
    run_rule(main, snakemake)
