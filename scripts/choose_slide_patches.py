"""Choose patches from all slides for pretraining and its validation.

Inputs: stores of the slides, in the order of the params. Outputs: split (store, patch, part: train, val, unused), and
summary (counts of all, of each tissue and of each slide, beside those of the paper), TSV.
Params: slides (tissue and group of each), total, val_share, seed.
"""

from celldetr.runtime.files import atomic
from celldetr.runtime.rule import run_rule
from celldetr.slides.choice import SlidePatches, choose_patches
from celldetr.store import open_store
from celldetr.store.splits import complete_split


def main(snakemake):
    params = snakemake.params
    stores = [open_store(path) for path in snakemake.input.stores]
    slides = [
        SlidePatches.of(store, row["group"], row["tissue"]) for store, row in zip(stores, params.slides, strict=True)
    ]
    choice = choose_patches(slides, total=params.total, val_share=params.val_share, seed=params.seed)
    split = complete_split(choice.split, {store.path.stem: len(store) for store in stores})
    for table, path in ((split, snakemake.output.split), (choice.summary, snakemake.output.summary)):
        with atomic(path) as temporary:
            table.to_csv(temporary, sep="\t", index=False)


if "snakemake" in globals():
    run_rule(main, snakemake)
