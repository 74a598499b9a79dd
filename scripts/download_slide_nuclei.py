"""Get the outlines of a slide's nuclei: from URLs or local paths, or those of HEST-1k; resumed and verified.

Params: source with urls, hest (id in HEST-1k, instead of urls) and sha256 (may be null). Output: the file.
"""

from celldetr.fetch.download import fetch
from celldetr.fetch.huggingface import fetch_hest, nuclei_path
from celldetr.runtime.rule import run_rule


def main(snakemake):
    source, out = snakemake.params.source, snakemake.output[0]
    if source["hest"]:
        fetch_hest(nuclei_path(source["hest"]), out, sha256=source["sha256"])
    else:
        fetch(source["urls"], out, sha256=source["sha256"])


if "snakemake" in globals():
    run_rule(main, snakemake)
