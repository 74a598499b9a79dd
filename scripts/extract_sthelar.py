"""Make the patches of a section of STHELAR into a patch store.

Inputs: ``section`` (folder of download_sthelar) and ``types`` (cell type of each category, TSV). Outputs: ``store``
(boxes in px, half-open; labels: the ten cell types or -1), and its summary as TSV and as HTML with pictures. Params:
settings (thresholds), limits (of Dice, Jaccard and bPQ), patch_size (px), mpp (um per px), source_mpp (um per px of
STHELAR, or null: measured), tissue, group, seed.
"""

from pathlib import Path

from celldetr.config.slides import PatchSettings
from celldetr.report.patches import write_rows
from celldetr.report.sthelar import write_section_page
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store
from celldetr.xenium.sthelar.patches import extract_section
from celldetr.xenium.sthelar.types import read_types


def main(snakemake):
    params, output, name = snakemake.params, snakemake.output, snakemake.wildcards.sample
    found = extract_section(
        Path(snakemake.input.section),
        output.store,
        name=name,
        group=params.group,
        tissue=params.tissue,
        types=read_types(snakemake.input.types),
        limits=params.limits,
        size=params.patch_size,
        mpp=params.mpp,
        source_mpp=params.source_mpp,
        settings=PatchSettings.from_dict(params.settings, "xenium.patches"),
        seed=params.seed,
        workers=snakemake.threads,
    )
    write_rows(output.summary_tsv, found.rows)
    store = open_store(output.store)
    write_section_page(output.summary_html, store, found, f"Patches of {name} of STHELAR ({params.tissue})")


if "snakemake" in globals():
    run_rule(main, snakemake)
