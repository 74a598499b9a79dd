"""Annotate the cells of a Xenium sample with cell types.

Input: ``outs`` (output folder of the run), ``reference`` (.h5ad of the prepare_reference rule). Output: ``cells``
(Parquet: label, reason and fractions of each cell), ``qc_png``, ``qc_json`` (figures of quality), ``provenance``.
Params: settings (cell types), seed.
"""

from pathlib import Path

from celldetr.config.xenium import CellTypeSettings
from celldetr.report.cell_types import cell_types_figure
from celldetr.report.style import PREVIEW_DPI, save
from celldetr.runtime.files import write_json
from celldetr.runtime.provenance import write_provenance
from celldetr.runtime.rule import run_rule
from celldetr.xenium.celltypes.annotate import annotate, versions
from celldetr.xenium.celltypes.labels import write_cells
from celldetr.xenium.celltypes.qc import quality
from celldetr.xenium.celltypes.reference import read_reference
from celldetr.xenium.output import COUNTS, SPECS, read_counts


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    settings = CellTypeSettings.from_dict(params.settings, "xenium.cell_types")
    outs, reference = Path(snakemake.input.outs), read_reference(snakemake.input.reference)
    counts = read_counts(outs)
    annotation = annotate(counts, reference, settings, params.seed)
    figures = quality(counts, reference, annotation, settings, params.seed)
    save(cell_types_figure(figures, f"Cell types of {snakemake.wildcards.sample}"), output.qc_png, dpi=PREVIEW_DPI)
    write_json(output.qc_json, figures)
    metadata = {
        "settings": settings.to_dict(),
        "seed": params.seed,
        "shared_genes": list(annotation.genes.names),
        "missing_types": list(annotation.missing),
        "precision": annotation.precision,
        "unused_types": list(annotation.unused),
        "versions": versions(),
    }
    write_cells(output.cells, annotation.table, metadata)
    write_provenance(
        output.provenance,
        settings=settings.to_dict(),
        inputs=[outs / SPECS, outs / COUNTS, snakemake.input.reference],
        seed=params.seed,
        annotators=versions(),
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
