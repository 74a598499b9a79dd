"""Measure where a model looks on its test fold.

Input: ``model``, ``store`` (patch store of the test fold).
Output: ``points`` (NPZ: sampling points in px, weights and patches of the nuclei to draw), ``share`` (JSON: mean share
of the attention inside the true and the predicted box over all detected nuclei of the fold).
"""

import logging
from pathlib import Path

import torch

from celldetr.inference.attention import choose_nuclei, measure_attention
from celldetr.inference.predict import attend_patches
from celldetr.model.device import best_device
from celldetr.model.weights import load_model
from celldetr.runtime.files import write_json, write_npz
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store

log = logging.getLogger("attention")


def main(snakemake):
    torch.set_num_threads(snakemake.threads)
    params, device = snakemake.params, best_device()
    store = open_store(snakemake.input.store)
    patches = attend_patches(
        load_model(snakemake.input.model, device, mpp=store.mpp, patch_size=store.patch_size),
        store,
        nucleus_threshold=params.nucleus_threshold,
        batch_size=params.batch_size,
        device=device,
        precision=params.precision,
        progress=True,
    )
    radius = params.radius_um / store.mpp
    nuclei = choose_nuclei(store, params.nuclei, params.seed)
    drawn, share = measure_attention(patches, store, nuclei=nuclei, radius=radius)
    write_npz(snakemake.output.points, drawn)
    origin = {
        "experiment": snakemake.wildcards.experiment,
        "split": int(snakemake.wildcards.split),
        "test_store": Path(snakemake.input.store).stem,
        "nucleus_threshold": params.nucleus_threshold,
        "radius": radius,
    }
    write_json(snakemake.output.share, {**share, **origin})
    log.info("share of attention inside the true box: %s over %d nuclei", share["share_true_box"], share["nuclei"])


if "snakemake" in globals():
    run_rule(main, snakemake)
