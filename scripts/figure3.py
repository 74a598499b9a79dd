"""Draw figure 3: where models look at the same nuclei.

Input: ``points`` (NPZ files of the attention rule, one per model), ``shares`` (their JSON files, same order).
Output: ``png``, ``svg``.
"""

from celldetr.inference.attention import read_drawn, read_share
from celldetr.report.figure3 import SystemShare, figure3
from celldetr.report.style import save
from celldetr.runtime.rule import run_rule


def main(snakemake):
    titles = snakemake.params.titles
    shares = [SystemShare(title, *read_share(path)) for path, title in zip(snakemake.input.shares, titles, strict=True)]
    figure = figure3([read_drawn(path) for path in snakemake.input.points], shares)
    save(figure, snakemake.output.png, snakemake.output.svg)


if "snakemake" in globals():
    run_rule(main, snakemake)
