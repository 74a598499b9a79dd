"""Get an scRNA-seq reference: a file, or a dataset of CELLxGENE whose current link is looked up.

Params: row of the references sheet. Output: the .h5ad.
"""

from celldetr.fetch.cellxgene import dataset_url
from celldetr.fetch.download import fetch
from celldetr.runtime.rule import run_rule


def main(snakemake):
    row = snakemake.params.row
    urls = row["file"] or [dataset_url(row["cellxgene_collection"], row["cellxgene_dataset"])]
    fetch(urls, snakemake.output[0], size=row["bytes"], sha256=row["sha256"])


if "snakemake" in globals():
    run_rule(main, snakemake)
