"""Get the patches of one section of STHELAR; over HTTP only its rows are transferred.

Params: source with repository, revision and folder (a copy on this machine, or null). Output: a folder with the rows of
its patches, their places and its cells.
"""

from celldetr.fetch.sthelar import fetch_section
from celldetr.runtime.rule import run_rule


def main(snakemake):
    fetch_section(snakemake.wildcards.sample, snakemake.output[0], **snakemake.params.source)


if "snakemake" in globals():
    run_rule(main, snakemake)
