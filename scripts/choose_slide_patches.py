"""Choose patches from all slides for pretraining and its validation.

Inputs: stores of the slides, in the order of the params. Outputs: split (store, patch, part), and summary (counts of
all, of each tissue and of each slide, beside those of the paper), TSV.
Params: slides (tissue and group of each), total, val_share, seed.
"""

from celldetr.runtime.files import atomic
from celldetr.runtime.rule import run_rule
from celldetr.slides.choice import SlidePatches, choose_patches
from celldetr.store import open_store


def main(snakemake):
    params = snakemake.params
    slides = [
        SlidePatches.of(open_store(path), row["group"], row["tissue"])
        for path, row in zip(snakemake.input.stores, params.slides, strict=True)
    ]
    choice = choose_patches(slides, total=params.total, val_share=params.val_share, seed=params.seed)
    for table, path in ((choice.split, snakemake.output.split), (choice.summary, snakemake.output.summary)):
        with atomic(path) as temporary:
            table.to_csv(temporary, sep="\t", index=False)


if "snakemake" in globals():
    run_rule(main, snakemake)
