"""Cut a registered Xenium sample with labelled cells into patches.

Inputs: ``outs`` (output folder), ``he`` (image), ``registration`` and ``cells`` (labels). Outputs: ``store`` (boxes in
px, half-open; labels: the ten cell types or -1), and its summary: counts of what it holds and what was dropped, as TSV
and as HTML with pictures. Params: settings (thresholds), patch_size (px), mpp (um per px), tissue, group, seed.
"""

from pathlib import Path

from celldetr.config.slides import PatchSettings
from celldetr.report.patches import overview, write_report, write_rows
from celldetr.runtime.rule import run_rule
from celldetr.slides.pyramid import open_pyramid
from celldetr.store import open_store
from celldetr.xenium.patches import Sample, extract_sample


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    files = {name: Path(snakemake.input[name]) for name in ("outs", "he", "registration", "cells")}
    sample = Sample(snakemake.wildcards.sample, params.group, params.tissue, **files)
    found = extract_sample(
        sample,
        output.store,
        size=params.patch_size,
        mpp=params.mpp,
        settings=PatchSettings.from_dict(params.settings, "xenium.patches"),
        seed=params.seed,
        workers=snakemake.threads,
    )
    write_rows(output.summary_tsv, found.rows)
    store = open_store(output.store)
    with open_pyramid(sample.he, found.grid.image_mpp) as image:
        picture = overview(image, found.grid, found.tissue, store.patches["complete"].to_numpy())
    title = f"Patches of {sample.name} ({sample.tissue})"
    write_report(
        output.summary_html,
        store,
        title=title,
        source=params.given["he"]["path"] or sample.he.name,
        picture=picture,
        rows=found.rows,
        warnings=found.warnings,
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
