"""Splits of Xenium patches: no tissue in two parts, shares as asked, and every patch accounted for."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import split_xenium
from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import XeniumSplitSettings
from celldetr.runtime.errors import InputError
from celldetr.store import StoreWriter, open_store
from celldetr.store.seen import refuse_seen_store, seen_groups
from celldetr.store.splits import read_split
from celldetr.xenium.split import part_counts, xenium_split

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
SIZE, MPP, SLIDE_MPP = 8, 2.0, 0.7  # a patch is 16 um wide


def make_store(path, corners, group="g", seed=0, step=SIZE, incomplete=0):
    """Write a store of patches with corners (N, 2) on a grid of steps, in patch px; patch i has i % 4 nuclei."""
    rng = np.random.default_rng(seed)
    corners = np.asarray(corners).reshape(-1, 2)
    count = len(corners)
    labels = [rng.integers(-1, len(ST_TYPES), i % 4).astype(np.int8) for i in range(count)]
    groups = [group] * count if isinstance(group, str) else group
    x, y = np.rint(corners * MPP / SLIDE_MPP).astype(int).T
    attrs = {"image": {"mpp": SLIDE_MPP}, "settings": {"stride": step / SIZE}}
    with StoreWriter(path, patch_size=SIZE, classes=ST_TYPES, mpp=MPP, attrs=attrs) as writer:
        writer.append(
            rng.integers(0, 255, (count, SIZE, SIZE, 3), dtype=np.uint8),
            [[[1, 1, 4, 4]] * len(row) for row in labels],
            labels,
            patches={"source": [path.stem] * count, "group": groups, "tissue": ["Lung"] * count, "x": x, "y": y}
            | {"complete": rng.random(count) >= incomplete},
        )
    return open_store(path)


def grid(across, down, step=SIZE):
    x, y = np.meshgrid(np.arange(across) * step, np.arange(down) * step)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def split_of(stores, by="block", shares=SHARES, block_um=64.0, margin_um=0.0, seed=0):
    settings = XeniumSplitSettings(by=by, block_um=block_um, margin_um=margin_um, **shares)
    return xenium_split(stores, settings, seed)


@settings(max_examples=10, deadline=None)
@given(
    step=st.sampled_from([3, 5, SIZE]),
    holes=st.floats(0, 0.9),
    block_um=st.sampled_from([20.0, 41.0, 64.0]),
    margin_um=st.sampled_from([0.0, 12.0]),
    seed=st.integers(0, 99),
)
def test_blocks_of_different_parts_share_no_pixel(tmp_path_factory, step, holes, block_um, margin_um, seed):
    corners = grid(24, 18, step)
    corners = corners[np.random.default_rng(seed).random(len(corners)) >= holes]
    store = make_store(tmp_path_factory.mktemp("x") / "a.zarr", corners, step=step)
    try:
        split = split_of([store], block_um=block_um, margin_um=margin_um, seed=seed)
    except InputError:
        reject()  # tiny blocks: all of a part may lie on a border
    where = {part: corners[split.table.loc[split.table["part"] == part, "patch"]] for part in SHARES}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        apart = (np.abs(where[one][:, None] - where[other][None]) - SIZE) * MPP
        assert apart.max(axis=-1).min() >= margin_um
    assert len(split.table) + split.left_out["a"] == len(store)


def test_blocks_keep_what_is_not_on_a_border(tmp_path):
    store = make_store(tmp_path / "a.zarr", grid(48, 40))
    split = split_of([store], block_um=128.0)
    assert split.by == "block"
    shares = split.table["part"].value_counts(normalize=True)
    assert abs(shares["train"] - 0.6) < 0.1
    assert split.left_out == {"a": 0}  # patches side by side fill the blocks without crossing
    apart = split_of([store], block_um=128.0, margin_um=1.0)
    assert 0 < apart.left_out["a"] < 0.5 * len(store)


def test_slides_stay_whole_and_auto_prefers_them(tmp_path):
    stores = [make_store(tmp_path / f"s{i}.zarr", grid(12, 12 + i), group=f"donor{i // 2}") for i in range(8)]
    split = split_of(stores, by="auto")
    assert split.by == "slide"
    assert len(split.table) == sum(map(len, stores))
    donor = split.table["store"].str[1:].astype(int) // 2
    assert split.table.groupby(donor)["part"].nunique().max() == 1
    assert set(split.table["part"]) == set(SHARES)
    assert not split.warnings
    few = split_of(stores[:4], by="auto", block_um=64.0)  # two donors for three parts
    assert few.by == "block"
    assert any("known slides" in warning for warning in few.warnings)


def test_a_random_split_is_by_patch_and_warns(tmp_path):
    store = make_store(tmp_path / "a.zarr", grid(20, 20))
    split = split_of([store], by="random")
    assert split.table["part"].value_counts().to_dict() == {"train": 240, "val": 80, "test": 80}
    assert any("several parts" in warning for warning in split.warnings)
    assert split.table.equals(split_of([store], by="random").table)
    assert not split.table.equals(split_of([store], by="random", seed=1).table)


@pytest.mark.parametrize("by", ["random", "block", "slide"])
def test_incomplete_patches_are_for_training_alone(tmp_path, by):
    stores = [
        make_store(tmp_path / f"s{i}.zarr", grid(12, 12), group=f"d{i}", seed=i, incomplete=0.3) for i in range(3)
    ]
    split = split_of(stores, by=by)
    complete = {store.path.stem: store.patches["complete"].to_numpy() for store in stores}
    rows = [complete[store][patch] for store, patch in zip(split.table["store"], split.table["patch"], strict=True)]
    known = pd.Series(rows).groupby(split.table["part"]).mean()
    assert known["val"] == known["test"] == 1
    assert 0.5 < known["train"] < 0.9
    assert len(split.table) + sum(split.left_out.values()) == sum(map(len, stores))
    with pytest.raises(InputError, match="no patches for 'val'; 0 lie on .*, and 80 show nuclei without a box"):
        split_of([make_store(tmp_path / "none.zarr", grid(20, 10), incomplete=1)], by="random")


def test_impossible_splits_are_refused(tmp_path):
    store = make_store(tmp_path / "a.zarr", grid(4, 4))
    with pytest.raises(InputError, match="slide.*got 1.*use block"):
        split_of([store], by="slide")
    with pytest.raises(InputError, match=r"lower xenium\.split\.block_um"):
        split_of([store], block_um=1000.0)
    with pytest.raises(InputError, match="expected different names"):
        split_of([store, store])


def test_the_rule_writes_the_split_the_test_store_and_counts(tmp_path):
    corners = [grid(12, 9 + i) for i in range(4)]
    stores = [make_store(tmp_path / f"s{i}.zarr", corners[i], group=f"d{i}", seed=i) for i in range(4)]
    names = {"split": "split.tsv", "test": "test.zarr", "summary_tsv": "s.tsv", "summary_html": "s.html"}
    out = SimpleNamespace(**{key: tmp_path / "out" / name for key, name in names.items()})
    params = SimpleNamespace(settings={"by": "auto", "train": 0.5, "val": 0.25, "test": 0.25}, seed=3)
    split_xenium.main(
        SimpleNamespace(input=SimpleNamespace(stores=[store.path for store in stores]), output=out, params=params)
    )
    table = read_split(out.split)
    test = open_store(out.test)
    rows = table[table["part"] == "test"]
    assert len(test) == len(rows) > 0
    for index, origin in enumerate(test.attrs["origin"]):
        store = stores[int(origin["store"][1:])]
        patch, source = test.read(index), store.read(origin["patch"])
        assert np.array_equal(patch.image, source.image)
        assert np.array_equal(patch.labels, source.labels)
        assert ((rows["store"] == origin["store"]) & (rows["patch"] == origin["patch"])).sum() == 1
    counts = part_counts(stores, split_of(stores, by="slide", shares={"train": 0.5, "val": 0.25, "test": 0.25}, seed=3))
    written = out.summary_tsv.read_text()
    assert counts["nuclei"].sum() == sum(len(store.labels) for store in stores)
    assert counts[list(ST_TYPES)].sum().sum() == sum((store.labels >= 0).sum() for store in stores)
    assert "\t21000\t380000\t" in written.replace("paper", "")
    assert f"{counts['patches'].sum():,} patches" in out.summary_html.read_text()


def test_a_model_of_another_split_is_not_tested_on_the_test_part(tmp_path):
    """All parts share the slide: the split itself keeps them apart, and only the same split."""
    store = make_store(tmp_path / "a.zarr", grid(8, 8))
    names = {"split": "split.tsv", "test": "test.zarr", "summary_tsv": "s.tsv", "summary_html": "s.html"}
    out = SimpleNamespace(**{key: tmp_path / "out" / name for key, name in names.items()})
    params = SimpleNamespace(settings={"by": "random"}, seed=3)
    split_xenium.main(SimpleNamespace(input=SimpleNamespace(stores=[store.path]), output=out, params=params))
    table, test = read_split(out.split, [store]), open_store(out.test)
    refuse_seen_store(seen_groups(table, [store]), test, "model.pt")
    leaked = table.assign(part=table["part"].replace("test", "train"))
    swapped = table.assign(part=table["part"].sample(frac=1, random_state=1).to_numpy())
    for changed in (leaked, swapped):
        with pytest.raises(InputError, match=r"model\.pt: .* was trained or validated on .*test\.zarr"):
            refuse_seen_store(seen_groups(changed, [store]), test, "model.pt")
    table.iloc[:-3].to_csv(out.split, sep="\t", index=False)
    with pytest.raises(
        InputError, match=r"split\.tsv: got 61 rows of store a, expected one for each of its 64 patches"
    ):
        read_split(out.split, [store])
