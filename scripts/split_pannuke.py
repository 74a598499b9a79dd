"""Assign the patches of PanNuke to train, val and test.

Inputs: the three patch stores. Output: a split table (TSV): store, patch (index), part; a row per patch.
"""

from pathlib import Path

from celldetr.pannuke.splits import pannuke_split
from celldetr.runtime.files import write_tsv
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store


def main(snakemake):
    params = snakemake.params
    sizes = {Path(path).stem: open_store(path).n_patches for path in snakemake.input.stores}
    table = pannuke_split(
        sizes, params.split, protocol=params.protocol, train_share=params.train_share, seed=params.seed
    )
    write_tsv(snakemake.output[0], table)


if "snakemake" in globals():
    run_rule(main, snakemake)
