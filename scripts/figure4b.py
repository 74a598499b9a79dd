"""Draw figure 4b: losses of contrastive pretraining.

Input: ``log`` (log.jsonl of an experiment of stage ssl). Output: ``png``, ``svg``. Params: title.
"""

from celldetr.report.curves import read_log
from celldetr.report.figure4 import figure4b
from celldetr.report.style import save
from celldetr.runtime.rule import run_rule


def main(snakemake):
    figure = figure4b(read_log(snakemake.input.log), snakemake.params.title)
    save(figure, snakemake.output.png, snakemake.output.svg)


if "snakemake" in globals():
    run_rule(main, snakemake)
