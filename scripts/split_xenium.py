"""Split the Xenium patches into train, val and test, and copy the test patches into their own store.

Inputs: the patch stores of all samples. Outputs: a TSV with a row per patch: store (sample), patch (index), part
(train, val, test, unused); the store of the test patches; counts per part as TSV and HTML. Params: settings (by, shares
of the parts, block_um, margin_um), seed.
"""

from celldetr.config.xenium import XeniumSplitSettings
from celldetr.report.xenium_split import write_counts, write_split_page
from celldetr.runtime.files import write_tsv
from celldetr.runtime.rule import run_rule
from celldetr.store import open_store, select
from celldetr.store.splits import complete_split, split_digest
from celldetr.xenium.split import part_counts, xenium_split


def main(snakemake):
    params, output = snakemake.params, snakemake.output
    settings = XeniumSplitSettings.from_dict(params.settings, "xenium.split")
    stores = [open_store(path) for path in snakemake.input.stores]
    split = xenium_split(stores, settings, params.seed)
    test = split.table[split.table["part"] == "test"]
    chosen = [(store, test.loc[test["store"] == store.path.stem, "patch"].to_numpy()) for store in stores]
    origin = [{"store": store.path.stem, "patch": patch} for store, patches in chosen for patch in patches.tolist()]
    table = complete_split(split.table, {store.path.stem: len(store) for store in stores})
    how = {"by": split.by, "seed": params.seed, "digest": split_digest(table)}
    select(chosen, output.test, attrs={"origin": origin, "split": how})
    counts = part_counts(stores, split)
    write_counts(output.summary_tsv, counts, split)
    write_split_page(output.summary_html, counts, split)
    write_tsv(output.split, table)


if "snakemake" in globals():
    run_rule(main, snakemake)
