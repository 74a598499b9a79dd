"""Evaluate the frozen embeddings of true boxes with simple classifiers; this is not a detection score.

A model with random weights is evaluated in the same way: what training brought is the difference.

Inputs: ``model`` (weights of the experiment), ``stores`` (patch stores of the training patches), ``split`` (TSV: part
of each patch), ``test`` (patch store of the test fold).
Outputs: ``tsv`` (experiment, split, weights, classifier, class, precision, recall, f1, n) and ``provenance`` (JSON).
Params: k (neighbours that vote), max_nuclei (most training nuclei), batch_size (patches), compile, seed (also
of the random weights).
Wildcards: experiment, split.
"""

import logging
from functools import partial

import torch

from celldetr.config.evaluation import FrozenFeatureSettings
from celldetr.evaluation.frozen_features import WHAT, evaluate_frozen_features, write_frozen_features
from celldetr.evaluation.metrics import TRAINED
from celldetr.inference.embedding import embed_patches
from celldetr.model.device import best_device
from celldetr.model.weights import load_model, random_model, trained_on
from celldetr.runtime.provenance import write_provenance
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store
from celldetr.store.seen import refuse_seen_store
from celldetr.store.splits import read_split

log = logging.getLogger("frozen_features")


def main(snakemake):
    torch.set_num_threads(snakemake.threads)
    params, inputs, device = snakemake.params, snakemake.input, best_device()
    stores, test = [open_store(path) for path in inputs.stores], open_store(inputs.test)
    model = load_model(inputs.model, device, mpp=test.mpp, patch_size=test.patch_size)
    models = {TRAINED: model, f"random (seed {params.seed})": random_model(model.settings, params.seed, device)}
    settings = FrozenFeatureSettings(k=params.k, max_nuclei=params.max_nuclei)
    split = read_split(inputs.split, stores)
    refuse_seen_store(trained_on(inputs.model, None, "trained_on"), test, inputs.model)
    options = {"batch_size": params.batch_size, "device": device, "compiling": params.compile, "progress": True}
    tables, summaries = {}, {}
    for name, of in models.items():
        embed = partial(embed_patches, of, **options)
        tables[name], summaries[name] = evaluate_frozen_features(
            embed, stores, test, split, settings=settings, seed=params.seed
        )
        log.info("%s, weights: %s\n%s", WHAT, name, tables[name].to_string(index=False))
    origin = {"experiment": snakemake.wildcards.experiment, "split": int(snakemake.wildcards.split)}
    write_frozen_features(snakemake.output.tsv, tables, **origin)
    write_provenance(
        snakemake.output.provenance,
        settings={**settings.to_dict(), "batch_size": params.batch_size},
        inputs=[inputs.model, inputs.split, *inputs.stores, inputs.test],
        seed=params.seed,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        frozen_features={**origin, "what": WHAT, **summaries},
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
