"""Splits of PanNuke."""

import pytest

from celldetr.pannuke.splits import pannuke_split
from celldetr.runtime.errors import InputError

SIZES = {"fold1": 40, "fold2": 30, "fold3": 50}


def make(split, protocol="celldetr", seed=42, sizes=SIZES, share=0.8):
    return pannuke_split(sizes, split, protocol=protocol, train_share=share, seed=seed)


@pytest.mark.parametrize(("split", "test"), [(1, "fold2"), (2, "fold1"), (3, "fold3")])
def test_each_fold_tests_once(split, test):
    table = make(split)
    assert set(table.loc[table["part"] == "test", "store"]) == {test}
    assert len(table) == 120
    assert not table.duplicated(["store", "patch"]).any()
    rest = 120 - SIZES[test]
    assert (table["part"] == "train").sum() == round(0.8 * rest)
    assert test not in set(table.loc[table["part"] != "test", "store"])
    assert len(set(table.loc[table["part"] == "val", "store"])) == 2


@pytest.mark.parametrize(("split", "folds"), [(1, "123"), (2, "213"), (3, "321")])
def test_official_protocol(split, folds):
    table = make(split, "official")
    parts = table.groupby("store")["part"].agg(set)
    assert [parts[f"fold{fold}"] for fold in folds] == [{"train"}, {"val"}, {"test"}]


def test_the_draw_depends_on_seed_and_split_alone():
    assert make(1).equals(make(1))
    assert not make(1).equals(make(1, seed=1))


def test_an_empty_part_is_refused():
    with pytest.raises(InputError, match="no patches for 'test'"):
        make(1, sizes={**SIZES, "fold2": 0})
    with pytest.raises(InputError, match="no patches for 'val'"):
        make(1, share=0.999)
