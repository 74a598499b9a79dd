"""Split tables, and splits that keep groups together."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import make_store

from celldetr.runtime.errors import InputError
from celldetr.store import open_store, select
from celldetr.store.seen import refuse_seen_store
from celldetr.store.splits import complete_split, read_split, split_digest, split_groups


def test_a_table_comes_back(tmp_path):
    table = pd.DataFrame({"store": ["fold1", "NA"], "patch": [0, 7], "part": ["train", "test"]})
    table.to_csv(tmp_path / "split.tsv", sep="\t", index=False)
    assert read_split(tmp_path / "split.tsv").equals(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store\tpatch\n", "expected"),
        ("store\tpatch\tpart\nfold1\t0\ttrial\n", "'trial'"),
        ("store\tpatch\tpart\nfold1\tx\ttrain\n", "cannot be read"),
        ("store\tpatch\tpart\nfold1\t0\ttrain\nfold1\t0\ttest\n", "occurs twice"),
        ("store\tpatch\tpart\nfold1\t0\ttrain\nfold2\t0\ttest\n", "got 1 rows of store fold1, expected .* 3 patches"),
        (
            "store\tpatch\tpart\n" + "".join(f"fold1\t{patch}\ttrain\n" for patch in range(4)),
            "got 4 rows of store fold1",
        ),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, message):
    (tmp_path / "split.tsv").write_text(text)
    fold1 = make_store(tmp_path / "fold1.zarr", 3)
    with pytest.raises(InputError, match=message):
        read_split(tmp_path / "split.tsv", [fold1])


def test_patches_of_no_part_are_unused_and_the_digest_is_that_of_all_rows(tmp_path):
    store = make_store(tmp_path / "fold1.zarr", 4)
    chosen = pd.DataFrame({"store": "fold1", "patch": [2, 0], "part": ["val", "train"]})
    table = complete_split(chosen, {"fold1": 4, "empty": 0})
    table.to_csv(tmp_path / "split.tsv", sep="\t", index=False)
    read = read_split(tmp_path / "split.tsv", [store])
    assert read["part"].tolist() == ["train", "unused", "val", "unused"]
    assert split_digest(read) == split_digest(table) != split_digest(table.assign(part="train"))


def test_a_model_is_not_tested_on_groups_that_it_has_seen(tmp_path):
    fold = make_store(tmp_path / "fold2.zarr", 3, group="donor1")
    select([(fold, [1])], tmp_path / "test.zarr", attrs={"split": {"digest": "ab"}})
    test = open_store(tmp_path / "test.zarr")
    refuse_seen_store(["donor2", "donor1@ab", "fold1"], test, "model.pt")
    for seen, store in ((["donor1"], test), (["donor1@cd"], test), (["fold1", "donor1@ab"], fold)):
        message = rf"model\.pt: it, or a model that it started from, was .*{seen[-1]}.*{store.path.name}"
        with pytest.raises(InputError, match=message):
            refuse_seen_store(seen, store, "model.pt")


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=60).filter(lambda g: len(set(g)) > 2),
    seed=st.integers(0, 5),
)
def test_groups_stay_together_and_every_part_gets_one(groups, seed):
    parts = split_groups(groups, {"train": 0.7, "val": 0.15, "test": 0.15}, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(groups)))
    of_part = [{groups[i] for i in indices} for indices in parts.values()]
    assert all(of_part)
    assert sum(map(len, of_part)) == len(set(groups))


def test_shares_are_met_when_groups_are_small():
    parts = split_groups([str(i) for i in range(1000)], {"train": 0.8, "val": 0.2}, 0)
    assert abs(len(parts["train"]) - 800) <= 1
    again = split_groups([str(i) for i in range(1000)], {"train": 0.8, "val": 0.2}, 1)
    assert not np.array_equal(parts["val"], again["val"])


def test_wrong_shares_and_too_few_groups_are_refused():
    with pytest.raises(InputError, match="sum to 1"):
        split_groups(["a", "b"], {"train": 0.8, "val": 0.1}, 0)
    with pytest.raises(InputError, match="got 1"):
        split_groups(["a", "a"], {"train": 0.8, "val": 0.2}, 0)
