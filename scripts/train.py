"""Train one experiment on one split, or go on where an earlier job of it stopped.

Inputs: patch stores of the training and validation patches, the split, and optional initial weights (backbone, model).
Outputs: model.pt, log.jsonl (a line per epoch; in stage ssl also epoch 0, before training),
provenance.json (with the epoch whose weights became the model); checkpoints/ lies beside them.
"""

from celldetr.config.experiment import Experiment
from celldetr.runtime.rule import run_rule
from celldetr.training.loop import train
from celldetr.training.run import run_of_rule
from celldetr.training.stages import STAGES


def main(snakemake):
    train(run_of_rule(snakemake, Experiment.from_dict, STAGES))


if "snakemake" in globals():
    run_rule(main, snakemake)
