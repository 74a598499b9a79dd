"""Train a system that segments nuclei on one split, or go on where an earlier job of it stopped.

Inputs and outputs: those of train.py; the patch stores have instance maps.
"""

from celldetr.config.segmentation import SegmentationExperiment
from celldetr.runtime.rule import run_rule
from celldetr.training.loop import train
from celldetr.training.run import run_of_rule
from celldetr.training.segmentation import SegmentationStage


def main(snakemake):
    train(run_of_rule(snakemake, SegmentationExperiment.from_dict, {"segmentation": SegmentationStage}))


if "snakemake" in globals():
    run_rule(main, snakemake)
