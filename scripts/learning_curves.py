"""Draw the learning curves of a training run.

Input: ``log`` (log.jsonl of the run), ``provenance`` (its provenance.json, which names the epoch of the model).
Output: PNG.
"""

import json
from pathlib import Path

from celldetr.report.curves import draw_curves, read_log
from celldetr.report.style import save
from celldetr.runtime.rule import run_rule


def main(snakemake):
    provenance = json.loads(Path(snakemake.input.provenance).read_text(encoding="utf-8"))
    figure = draw_curves(read_log(snakemake.input.log), provenance["chosen"]["epoch"])
    save(figure, snakemake.output[0], dpi=110)


if "snakemake" in globals():
    run_rule(main, snakemake)
