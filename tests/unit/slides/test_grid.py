"""The grid of patches: the right nuclei in each patch, and every patch that is not taken has a reason."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_files import ALL_PATCHES, boxes_on_slide, grid_over, whole_tissue

from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import InputError


def members(grid):
    return {
        tuple(corner): grid.boxes.nuclei[grid.boxes.of(i)].tolist() for i, corner in enumerate(grid.corners.tolist())
    }


@settings(max_examples=60, deadline=None)
@given(
    stride=st.sampled_from([1.0, 0.5, 0.3]),
    ratio=st.sampled_from([1.0, 0.9131, 1.25]),
    seed=st.integers(0, 1000),
    min_nuclei=st.integers(0, 3),
    min_labelled=st.integers(0, 2),
)
def test_patches_have_the_nuclei_that_they_show(stride, ratio, seed, min_nuclei, min_labelled):
    rng = np.random.default_rng(seed)
    width, height, size = 150, 110, 32
    low = rng.uniform(-10, 170, (40, 2))
    nuclei = boxes_on_slide(np.concatenate([low, low + rng.uniform(1, 9, (40, 2))], axis=1), rng.integers(-1, 3, 40))
    rules = PatchSettings(stride=stride, min_tissue=0, min_nuclei=min_nuclei, min_labelled=min_labelled)
    grid = grid_over((width, height), nuclei, ratio=ratio, size=size, settings=rules)
    step = round(stride * size)
    boxes, area = nuclei.boxes, shapely.area(nuclei.outlines)
    expected = {}
    for y in range(0, int(height / ratio) - size + 1, step):
        for x in range(0, int(width / ratio) - size + 1, step):
            sides = np.minimum(boxes[:, 2:], [x + size, y + size]) - np.maximum(boxes[:, :2], [x, y])
            inside = np.clip(sides, 0, None).prod(axis=1) >= 0.1 * area
            if inside.sum() >= min_nuclei and (nuclei.labels[inside] >= 0).sum() >= min_labelled:
                expected[x, y] = np.flatnonzero(inside).tolist()
    assert members(grid) == expected
    assert len(grid) == len(expected)


def test_patches_that_are_left_out_take_their_boxes_along():
    nuclei = boxes_on_slide([[30, 30, 34, 34], [31.8, 8, 34, 12], [-4, -4, 4, 4]])
    grid = grid_over((64, 64), nuclei)
    assert members(grid) == {(0, 0): [0, 2], (32, 0): [0, 1], (0, 32): [0], (32, 32): [0]}
    assert grid.dropped(4) == {
        "nuclei in no patch that was taken": 1,
        "parts of nuclei at the edge of a patch that show too little": 1,
    }
    some = grid.without([0, 2], "damaged")
    assert members(some) == {(32, 0): [0, 1], (32, 32): [0]}
    assert some.boxes.boxes.tolist() == [[0, 30, 2, 32], [0, 8, 2, 12], [0, 0, 2, 2]]
    assert sum(some.passed_over.values()) == some.passed_over["damaged"] == 2


def test_every_patch_of_the_grid_is_accounted_for():
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 600, (400, 2))
    nuclei = boxes_on_slide(np.concatenate([low, low + 8], axis=1), rng.integers(-1, 2, 400))
    half = whole_tissue(640, 640)
    half.inside[:, 20:] = False
    rules = PatchSettings(min_tissue=0.5, min_nuclei=1, min_labelled=1, max_patches=25)
    grid, again, other = (
        grid_over((640, 640), nuclei, settings=rules, tissue=half, imaged=whole_tissue(640, 400), seed=seed)
        for seed in (0, 0, 1)
    )
    assert len(grid) == 25
    assert sum(grid.passed_over.values()) + 25 == 20 * 20
    assert grid.passed_over["beyond the imaged area"] == 20 * 8  # 400 px: 12.5 patches, and the half one is beyond
    assert grid.passed_over["with too little tissue"] == 10 * 12
    assert grid.corners[:, 0].max() < 320
    assert np.array_equal(grid.corners, again.corners)
    assert not np.array_equal(grid.corners, other.corners)


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(InputError, match="at least one patch"):
        grid_over((30, 100), boxes_on_slide([]), settings=ALL_PATCHES)


def test_impossibly_many_nuclei_in_a_patch_are_refused():
    with pytest.raises(
        InputError, match="got 2001 nuclei in the patch at 32, 0 px .*expected at most 2000.*patch too large"
    ):
        grid_over((64, 64), boxes_on_slide([[40, 4, 44, 8]] * 2001))
