"""Train one experiment on one split, or go on where an earlier job of it stopped.

Inputs: patch stores of the training and validation patches, the split, and optional initial weights (backbone, model).
Outputs: model.pt, log.jsonl (a line per epoch; in stage ssl also epoch 0, before training),
provenance.json (with the epoch whose weights became the model); checkpoints/ lies beside them.
"""

from pathlib import Path

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import Experiment
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store
from celldetr.store.splits import read_split
from celldetr.training.loop import Run, train


def main(snakemake):
    given, params = snakemake.input, snakemake.params
    initial, backbone = ([*map(Path, files), None][0] for files in (given.initial, given.backbone))
    recipe = {**params.experiment["training"], "workers": snakemake.resources.workers}
    run = Run(
        Experiment.from_dict({**params.experiment, "training": recipe}),
        tuple(map(Path, given.stores)),
        read_split(given.split, [open_store(path) for path in given.stores]),
        Path(snakemake.output.model).parent,
        initial=initial,
        backbone=backbone,
        trained_on=params.trained_on,
        scoring=ScoringSettings.from_dict(params.scoring),
        threads=snakemake.threads,
        code=params.code,
    )
    train(run)


if "snakemake" in globals():
    run_rule(main, snakemake)
