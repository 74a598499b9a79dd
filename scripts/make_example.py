"""Draw synthetic tissue and write it as PanNuke archives, the raw input of the example.

Output: one zip per fold, in the order of the folds, with the layout and the defects of PanNuke.
Params: images of each fold, patch_size (px), mpp (um per px), seed. All classes are common enough to be learned.
"""

from concurrent.futures import ProcessPoolExecutor

from celldetr.example.pannuke import write_fold
from celldetr.runtime.rule import run_rule


def main(snakemake):
    params = snakemake.params
    settings = {"mpp": params.mpp, "mixture": "example"}
    with ProcessPoolExecutor(snakemake.threads) as pool:
        folds = [
            pool.submit(write_fold, archive, fold, number, params.patch_size, params.seed, **settings)
            for fold, (archive, number) in enumerate(zip(snakemake.output, params.images, strict=True), start=1)
        ]
        for fold in folds:
            fold.result()


if "snakemake" in globals():
    run_rule(main, snakemake)
