"""Train one experiment on one split, or go on where an earlier job of it stopped.

Inputs: patch stores of the training and validation patches, the split, and optional initial weights (backbone, model).
Outputs: model.pt, log.jsonl (a line per epoch), curves.png, provenance.json; checkpoints/ lies beside them.
"""

import logging
from pathlib import Path

from celldetr.config import Experiment
from celldetr.data.splits import read_split
from celldetr.rule import run_rule
from celldetr.store import open_store
from celldetr.training.loop import train


def main(snakemake):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, params = snakemake.input, snakemake.params
    train(
        Experiment.from_dict(params.experiment),
        [open_store(path) for path in given.stores],
        read_split(given.split),
        Path(snakemake.output.model).parent,
        initial=_optional(given.initial),
        backbone=_optional(given.backbone),
        nucleus_threshold=params.nucleus_threshold,
        radius=params.get("radius", 12.0),
        threads=snakemake.threads,
    )


def _optional(files):
    """Path of an input that may be left out (an empty list)."""
    return Path(files) if isinstance(files, str) else None


if "snakemake" in globals():
    run_rule(main, snakemake)
