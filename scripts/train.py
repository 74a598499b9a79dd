"""Train one experiment on one split, or go on where an earlier job of it stopped.

Inputs: patch stores of the training and validation patches, the split, and optional initial weights (backbone, model).
Outputs: model.pt, log.jsonl (a line per epoch), curves.png, provenance.json; checkpoints/ lies beside them.
"""

from pathlib import Path

import torch

from celldetr.config import Experiment
from celldetr.data.splits import read_split
from celldetr.rule import run_rule
from celldetr.training.loop import Run, train


def main(snakemake):
    torch.set_num_threads(snakemake.threads)
    given, params = snakemake.input, snakemake.params
    run = Run(
        experiment=Experiment.from_dict(params.experiment),
        stores=tuple(map(Path, given.stores)),
        split=read_split(given.split),
        folder=Path(snakemake.output.model).parent,
        initial=_optional(given.initial),
        backbone=_optional(given.backbone),
        nucleus_threshold=params.nucleus_threshold,
        code=params.code,
    )
    train(run)


def _optional(files):
    """Path of an input that may be left out (an empty list)."""
    return Path(files) if isinstance(files, str) else None


if "snakemake" in globals():
    run_rule(main, snakemake)
