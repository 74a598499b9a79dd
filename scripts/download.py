"""Get one raw file: from URLs with mirrors or from local paths, resumed and verified.

Params: source with urls, bytes and sha256 (either may be null). Output: the file.
"""

from celldetr.fetch.download import fetch
from celldetr.runtime.rule import run_rule


def main(snakemake):
    source = snakemake.params.source
    fetch(source["urls"], snakemake.output[0], size=source["bytes"], sha256=source["sha256"])


if "snakemake" in globals():
    run_rule(main, snakemake)
