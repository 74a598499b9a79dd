"""Draw synthetic tissue and write it as PanNuke archives, the raw input of the example.

Output: one zip per fold, in the order of the folds, with the layout and the defects of PanNuke.
Params: ``images`` per fold (a number, or one per fold), ``patch_size`` (px), ``mpp`` (um/px), ``seed``; optional
``density`` (factor on the nuclei) and ``mixture`` (name of a mixture of tissue regions, or region -> share).
"""

import logging
from concurrent.futures import ProcessPoolExecutor

from celldetr.data.synthetic.looks import mixture_named
from celldetr.data.synthetic.pannuke import write_fold
from celldetr.errors import ConfigError
from celldetr.rule import run_rule

log = logging.getLogger("make_example")


def main(snakemake):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    params, archives = snakemake.params, list(snakemake.output)
    images = [params.images] * len(archives) if isinstance(params.images, int) else list(params.images)
    if len(images) != len(archives):
        raise ConfigError(
            f"example.images: got {len(images)} numbers for {len(archives)} folds; expected one number, or one per fold"
        )
    settings = {
        "mpp": params.mpp,
        "density": params.get("density", 1.0),
        "mixture": mixture_named(params.get("mixture", "example")),
    }
    with ProcessPoolExecutor(snakemake.threads) as pool:
        folds = [
            pool.submit(write_fold, archive, fold, number, params.patch_size, params.seed, **settings)
            for fold, (archive, number) in enumerate(zip(archives, images, strict=True), start=1)
        ]
        for archive, number, fold in zip(archives, images, folds, strict=True):
            truth = fold.result()
            log.info("%s: %d images, nuclei %s, defects %s", archive, number, truth.counts, truth.defects)


if "snakemake" in globals():
    run_rule(main, snakemake)
