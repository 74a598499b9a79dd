"""Convert the archive of a PanNuke fold to a patch store.

Input: the published zip. Outputs: the store (boxes in px, half-open), and a summary of the fold as TSV and as HTML with
pictures. Params: fold, patch_size (px), mpp (um per px).
"""

from celldetr.pannuke.convert import convert_fold
from celldetr.report.pannuke import write_counts, write_html
from celldetr.runtime.provenance import sha256
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    archive = snakemake.input.archive
    summary = convert_fold(
        archive,
        output.store,
        fold=params.fold,
        patch_size=params.patch_size,
        mpp=params.mpp,
        sha256=sha256(archive),
    )
    write_counts(output.summary_tsv, summary)
    write_html(output.summary_html, summary, open_store(output.store), f"PanNuke fold {params.fold}")


if "snakemake" in globals():
    run_rule(main, snakemake)
