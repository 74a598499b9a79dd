"""Train one experiment on one split, or go on where an earlier job of it stopped.

Inputs: patch stores of the training and validation patches, the split, and optional initial weights (backbone, model).
Outputs: model.pt, log.jsonl (a line per epoch; in stage ssl also epoch 0, before training),
provenance.json (with the epoch whose weights became the model); checkpoints/ lies beside them.
"""

from pathlib import Path

from celldetr.config.experiment import Experiment
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store
from celldetr.store.splits import read_split
from celldetr.training.loop import train

RADIUS_UM = 3.0  # 12 px at 0.25 um/px, the default of evaluation.radius; it does not follow that setting


def main(snakemake):
    given, params = snakemake.input, snakemake.params
    stores = [open_store(path) for path in given.stores]
    train(
        Experiment.from_dict(params.experiment),
        stores,
        read_split(given.split),
        Path(snakemake.output.model).parent,
        initial=_optional(given.initial),
        backbone=_optional(given.backbone),
        nucleus_threshold=params.nucleus_threshold,
        radius=RADIUS_UM / stores[0].mpp,
        threads=snakemake.threads,
        code=params.code,
    )


def _optional(files):
    """Path of an input that may be left out: Snakemake gives a list of one or of none."""
    return Path(files[0]) if files else None


if "snakemake" in globals():
    run_rule(main, snakemake)
