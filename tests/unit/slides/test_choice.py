"""The choice of patches: as many of each tissue, validation on other slides or at least on other pixels."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.runtime.errors import InputError
from celldetr.slides.choice import SlidePatches, choose_patches


def make_patches(name, tissue, count, group=None, columns=10, side=64.0):
    index = np.arange(count)
    x, y = (index % columns) * 64, (index // columns) * 64
    return SlidePatches(name, group or name, tissue, x, y, np.full(count, 3), side)


SLIDES = st.lists(
    st.tuples(st.sampled_from(["kidney", "lung", "prostate"]), st.integers(0, 120), st.integers(0, 4)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(SLIDES, st.integers(2, 300), st.floats(0.01, 0.6), st.integers(0, 5))
def test_the_choice_keeps_its_promises(sizes, total, val_share, seed):
    slides = [make_patches(f"s{i}", t, n, f"{t}{g}") for i, (t, n, g) in enumerate(sizes)]
    available = sum(len(slide) for slide in slides)
    try:
        choice = choose_patches(slides, total=total, val_share=val_share, seed=seed)
    except InputError:
        assert available < 50
        return
    split = choice.split
    assert not split.duplicated(["store", "patch"]).any()
    assert len(split) <= min(total, available)
    assert set(split["part"]) == {"train", "val"}
    assert (split["part"] == "val").sum() <= max(1, round(val_share * min(total, available)))
    by_name = {slide.store: slide for slide in slides}
    parts = {part: rows for part, rows in split.groupby("part")}
    for store in set(parts["train"]["store"]) & set(parts["val"]["store"]):  # a strip: no pixel in both
        train, val = (parts[part][parts[part]["store"] == store]["patch"].to_numpy() for part in ("train", "val"))
        slide = by_name[store]
        for axis in (slide.x, slide.y):
            gap = axis[val].min() - axis[train].max()
            if gap >= slide.side:
                break
        else:
            pytest.fail(f"{store}: patches of both parts overlap")
    again = choose_patches(slides, total=total, val_share=val_share, seed=seed)
    pd.testing.assert_frame_equal(again.split, split)
    summary = choice.summary.set_index("name")
    assert summary.loc["all", "chosen"] == len(split)
    assert summary.loc["all", "paper"] == 64_000
    assert (summary["train"] + summary["val"] == summary["chosen"]).all()


def test_tissues_get_equal_shares_and_validation_is_on_other_slides():
    slides = [make_patches(f"k{i}", "kidney", 400) for i in range(3)]
    slides += [make_patches(f"l{i}", "lung", 900 + i) for i in range(3)]
    slides += [make_patches("p0", "prostate", 60), make_patches("p1", "prostate", 30)]
    choice = choose_patches(slides, total=900, val_share=0.1, seed=0)
    split = choice.split.assign(tissue=choice.split["store"].str[0])
    counts = split.groupby("tissue").size()
    assert counts.sum() == 900
    assert abs(counts["k"] - counts["l"]) <= 2
    assert (split["part"] == "val").sum() == 90
    val = split[split["part"] == "val"]
    assert set(val["tissue"]) == {"k", "l", "p"}
    large = split[split["tissue"] != "p"]
    parts = large.groupby("store")["part"].nunique()
    assert (parts == 1).all()
    notes = choice.summary.set_index("name")["note"]
    assert notes[val["store"].iloc[0]] == "held out for validation"
    other = choose_patches(slides, total=900, val_share=0.1, seed=1).split
    assert not other.equals(choice.split)


def test_no_slide_is_held_out_that_training_needs():
    slides = [make_patches("a", "lung", 100), make_patches("b", "lung", 60)]
    choice = choose_patches(slides, total=150, val_share=0.1, seed=0)
    assert len(choice.split) == 150
    assert (choice.split["part"] == "val").sum() == 15
    assert set(choice.split[choice.split["part"] == "train"]["store"]) == {"a", "b"}


def test_slides_of_a_donor_validate_together():
    slides = [make_patches(f"s{i}", "lung", 100, group=f"donor{i // 2}") for i in range(6)]
    split = choose_patches(slides, total=200, val_share=0.2, seed=0).split
    donors = split.assign(donor=split["store"].str[1].astype(int) // 2).groupby("donor")["part"].nunique()
    assert (donors == 1).all()


def test_a_single_slide_gives_a_strip_and_overlapping_patches_are_left_out():
    index = np.arange(400)
    half = SlidePatches("s", "s", "lung", (index % 20) * 32, (index // 20) * 32, np.ones(400, int), 64.0)
    choice = choose_patches([half], total=400, val_share=0.1, seed=0)
    x = half.x[choice.split["patch"]]
    val = (choice.split["part"] == "val").to_numpy()
    assert x[val].min() - x[~val].max() == 64
    assert val.sum() == 40
    assert "validates" in choice.summary.set_index("name").loc["s", "note"]


def test_too_few_patches_are_told(caplog):
    with pytest.raises(InputError, match="expected at least 2"):
        choose_patches([make_patches("a", "lung", 1), make_patches("b", "lung", 0)], total=10, val_share=0.1, seed=0)
    choice = choose_patches(
        [make_patches("a", "lung", 30), make_patches("b", "lung", 0)], total=64, val_share=0.1, seed=0
    )
    assert "fewer than the 64 wanted" in caplog.text
    assert choice.summary.set_index("name").loc["b", "note"] == "no patches: damaged"
