"""Draw sections in the layout of STHELAR, the raw input of the example.

Output: a copy of the data set: patches, places and cells of all sections. Params: sections (name -> patches across and
down), seed.
"""

from pathlib import Path

from celldetr.example.sthelar import draw_section, write_sthelar
from celldetr.runtime.rule import run_rule


def main(snakemake):
    sections = enumerate(snakemake.params.sections.items())
    drawn = [draw_section(name, size, (snakemake.params.seed, number)) for number, (name, size) in sections]
    write_sthelar(Path(snakemake.output[0]), drawn)


if "snakemake" in globals():
    run_rule(main, snakemake)
