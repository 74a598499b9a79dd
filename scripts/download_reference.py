"""Get an scRNA-seq reference: a file, or a dataset of CELLxGENE whose current link is looked up.

Params: row (source in the references sheet). Output: the .h5ad.
"""

import logging

from celldetr.fetch.cellxgene import dataset_url
from celldetr.fetch.download import fetch
from celldetr.runtime.provenance import sha256
from celldetr.runtime.rule import run_rule

log = logging.getLogger("download_reference")


def main(snakemake):
    row = snakemake.params.row
    urls = row["file"] or [dataset_url(row["cellxgene_collection"], row["cellxgene_dataset"])]
    file = fetch(urls, snakemake.output[0], size=row["bytes"], sha256=row["sha256"])
    if not row["sha256"]:
        log.warning("%s is not pinned: put its SHA-256 into the references sheet: %s", urls[0], sha256(file))


if "snakemake" in globals():
    run_rule(main, snakemake)
