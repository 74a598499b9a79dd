"""Draw figure 4c: similarity of anchors to the nuclei of their patch, and how many find their own.

Input: ``matrices`` and ``retrieval`` (of the similarity rule), ``log`` (log.jsonl of the experiment).
Output: ``png``, ``svg``. Params: title.
"""

import json
from pathlib import Path

from celldetr.evaluation.similarity import read_similarities
from celldetr.report.curves import read_log
from celldetr.report.figure4 import figure4c
from celldetr.report.style import save
from celldetr.runtime.rule import run_rule


def main(snakemake):
    given = snakemake.input
    measured = json.loads(Path(given.retrieval).read_text(encoding="utf-8"))
    figure = figure4c(read_similarities(given.matrices), measured, read_log(given.log), snakemake.params.title)
    save(figure, snakemake.output.png, snakemake.output.svg)


if "snakemake" in globals():
    run_rule(main, snakemake)
