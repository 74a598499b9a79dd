"""Cut a slide into patches with the boxes of its nuclei.

Inputs: the slide (file) and the outlines of its nuclei. Outputs: the store (boxes in px, half-open; no labels), a
picture of the slide with its tissue and patches, and counts of what is in the store and what was left out, as TSV and
HTML.
Params: settings (which patches), on_damage, patch_size (px), mpp (um per px), slide_mpp (um per px, or null), unit (of
the outlines), cell_outlines, check_outlines, tissue, group, seed. Wildcard: slide.
"""

from pathlib import Path

from celldetr.config.slides import SlidePatchSettings
from celldetr.report.patches import outline_pictures, overview, save_picture, write_report, write_rows, write_unreadable
from celldetr.runtime.rule import run_rule
from celldetr.slides.damage import open_slide
from celldetr.slides.patches import Slide, extract_slide, summary_rows
from celldetr.store import open_store


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    slide = Slide(
        name=snakemake.wildcards.slide,
        file=Path(snakemake.input.file),
        nuclei=Path(snakemake.input.nuclei),
        group=params.group,
        tissue=params.tissue,
        mpp=params.slide_mpp,
        unit=params.unit,
        cell_outlines=params.cell_outlines,
        check_outlines=params.check_outlines,
    )
    found = extract_slide(
        slide,
        output.store,
        size=params.patch_size,
        mpp=params.mpp,
        settings=SlidePatchSettings.from_dict(params.settings, "slides.patches"),
        on_damage=params.on_damage,
        seed=params.seed,
        workers=snakemake.threads,
    )
    store = open_store(output.store)
    rows = summary_rows(found, store)
    write_rows(output.summary_tsv, rows)
    names = {"title": f"Patches of {slide.name} ({slide.tissue})", "source": slide.file.name}
    if found is None:
        write_unreadable(output.summary_html, output.picture, **names)
        return
    with open_slide(slide.file, found.grid.image_mpp, slide.name, skip=params.on_damage == "skip") as image:
        picture = overview(image, found.grid, found.tissue)
        outlines = outline_pictures(image, found.grid, found.nuclei)
    save_picture(output.picture, picture)
    write_report(output.summary_html, store, picture=picture, rows=rows, outlines=outlines, **names)


if "snakemake" in globals():
    run_rule(main, snakemake)
