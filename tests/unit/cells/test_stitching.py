"""Tiles that place a nucleus differently or do not all find it: each counts once, also where nuclei lie over others."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_cells import draw, in_order

from celldetr.cells.rows import Rows
from celldetr.cells.stitching import RIM_UM, SAME, counted, mean_scores, near_seams, repeated, rim_um
from celldetr.cells.table import CellsInfo
from celldetr.cells.tiling import Tiles, Tiling
from celldetr.inference.batch import FoundNuclei
from celldetr.runtime.errors import ConfigError
from celldetr.slides.boxes import centres_of

CORE, MARGIN = 40.0, 8.0


def findings(nuclei, jitter, missed, rng):
    """Find nuclei (N, 2) around the corner of four cores: boxes, depths, tiles and nuclei."""
    boxes, depth, tiles, numbers = [], [], [], []
    for tile, low in enumerate(np.array([(-1, -1), (0, -1), (-1, 0), (0, 0)]) * CORE):
        seen = nuclei + rng.uniform(-jitter, jitter, nuclei.shape)
        deep = np.minimum(seen - low, low + CORE - seen).min(axis=1)
        found = (deep > -rim_um(MARGIN)) & (rng.random(len(nuclei)) >= missed)
        half = rng.uniform(3.5, 4.5, (len(nuclei), 2))
        boxes.append(np.hstack([seen - half, seen + half])[found])
        depth.append(deep[found])
        tiles.append(np.full(found.sum(), tile))
        numbers.append(np.flatnonzero(found))
    return (np.concatenate(part) for part in (boxes, depth, tiles, numbers))


def count(nuclei, jitter, missed=0.0, seed=0):
    """Count how often each of the nuclei counts."""
    boxes, depth, tiles, numbers = findings(nuclei, jitter, missed, np.random.default_rng(seed))
    near = np.flatnonzero(near_seams(depth, MARGIN))
    left = near[left_out(boxes[near], depth[near], tiles[near])]
    return np.bincount(np.delete(numbers, left), minlength=len(nuclei))


def left_out(boxes, depth, tile):
    """List the findings that do not count."""
    return np.flatnonzero(counted(boxes, depth, tile) != np.arange(len(boxes)))


def test_a_nucleus_counts_once_wherever_the_tiles_place_it():
    places = np.stack(np.meshgrid(np.arange(-22, 23, 11.0), np.arange(-22, 23, 11.0)), -1).reshape(-1, 2)
    for seed, (x, y) in enumerate(np.random.default_rng(1).uniform(-6, 6, (100, 2))):
        np.testing.assert_array_equal(count(places + (x, y), jitter=RIM_UM / 2, seed=seed), 1)


def test_borders_do_not_change_how_many_nuclei_are_found():
    rng = np.random.default_rng(2)
    near, inside = [], []
    for seed in range(300):
        nuclei = np.stack(np.meshgrid(np.arange(-28, 29, 14.0), np.arange(-28, 29, 14.0)), -1).reshape(-1, 2)
        nuclei += rng.uniform(-7, 7, 2)
        times = count(nuclei, jitter=1.0, missed=0.3, seed=seed)
        border = np.abs(nuclei).min(axis=1) < 1.5
        near += times[border].tolist()
        inside += times[np.abs(nuclei).min(axis=1) > 5].tolist()
    assert abs(np.mean(inside) - 0.7) < 0.03
    assert abs(np.mean(near) - 0.7) < 0.04


def one_by_one(boxes, depth, tile):
    """Decide pair after pair, as the rounds must: of two boxes, in order of their overlap."""
    pairs = []
    for a in range(len(boxes)):
        for b in range(a + 1, len(boxes)):
            inner = np.clip(
                np.minimum(boxes[a, 2:], boxes[b, 2:]) - np.maximum(boxes[a, :2], boxes[b, :2]), 0, None
            ).prod()
            both = (boxes[a, 2:] - boxes[a, :2]).prod() + (boxes[b, 2:] - boxes[b, :2]).prod() - inner
            if tile[a] != tile[b] and inner / both >= SAME:
                pairs.append((-inner / both, a, b))
    counts, paired = list(range(len(boxes))), set()
    for _, a, b in sorted(pairs):
        if counts[a] == a and counts[b] == b and not paired & {(a, tile[b]), (b, tile[a])}:
            paired |= {(a, tile[b]), (b, tile[a])}
            better, other = (a, b) if depth[a] >= depth[b] else (b, a)
            counts = [better if one == other else one for one in counts]
    alone = {k for k in range(len(boxes)) if depth[k] < 0} - {k for k, _ in paired}
    return [-1 if k in alone else one for k, one in enumerate(counts)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 5), st.integers(1, 80))
def test_rounds_decide_like_one_pair_after_the_other(seed, count, tiles, chunk):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 12, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(6, 9, (count, 2))], axis=1)
    depth, tile = rng.uniform(-1, 2, count), rng.integers(0, tiles, count)
    with mock.patch("celldetr.cells.stitching._CHUNK", chunk):
        counts = counted(boxes, depth, tile)
    assert counts.tolist() == one_by_one(boxes, depth, tile)
    scores, edge = rng.random((count, 2)), rng.uniform(1, 5, count)
    several, means = mean_scores(counts, scores, edge)
    members = {k: np.flatnonzero(counts == k) for k in range(count)}
    assert several.tolist() == [k for k, own in members.items() if len(own) > 1]
    expected = [np.average(scores[members[k]], axis=0, weights=edge[members[k]]) for k in several]
    np.testing.assert_allclose(means, np.reshape(expected, (-1, 2)), rtol=1e-6)


def test_a_nucleus_counts_once_in_its_tile():
    rng = np.random.default_rng(3)
    places = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), -1).reshape(-1, 2) * 9
    boxes = np.hstack([places, places + 8])
    again = np.concatenate([boxes, boxes[:40] + rng.uniform(-1, 1, (40, 1)), boxes[:20], boxes])
    image, score = np.repeat([0, 0, 0, 1], [100, 40, 20, 100]), rng.random(260)
    gone = repeated(again, score, image)
    nucleus = np.concatenate([np.arange(100), np.arange(40), np.arange(20)])
    best = [max(np.flatnonzero(nucleus == number), key=lambda row: score[row]) for number in range(100)]
    assert np.flatnonzero(~gone).tolist() == sorted(best) + list(range(160, 260))
    chain = np.array([[0, 0, 8, 8], [2, 0, 10, 8], [4, 0, 12, 8]], float)  # the middle one goes: the ends remain
    assert repeated(chain, np.array([0.9, 0.8, 0.7]), np.zeros(3, int)).tolist() == [False, True, False]


def tiles_over(size, margin, width, height):
    return Tiles.over(Tiling(size, 1.0, margin), (width, height), 1.0)


def unique(tiles, boxes_of_tile):
    """Boxes that remain of those (n, 4) that each tile found, px from its corner."""
    rows = Rows(tiles, CellsInfo("s", "s.tif", 1.0, tiles.image_size, (0, 0), (), 0, False), "float32")
    counts = [len(boxes) for boxes in boxes_of_tile]
    image, boxes = np.repeat(np.arange(len(tiles)), counts), np.concatenate(boxes_of_tile).astype(np.float32)
    none = np.empty((len(image), 0), np.float32)
    found, _ = rows.found(np.arange(len(tiles)), FoundNuclei(image, image, boxes, np.ones(len(image)), none, none))
    names = ("x_um", "y_um", "width_um", "height_um", "tile", "edge_um")
    x, y, width, height, tile, edge = (found[name].to_numpy() for name in names)
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    depth = edge - tiles.tiling.margin
    near = np.flatnonzero(near_seams(depth, tiles.tiling.margin))
    return np.delete(boxes, near[left_out(boxes[near], depth[near], tile[near])], axis=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(30, 90), st.integers(4, 14), st.integers(0, 10_000))
def test_tiles_that_do_not_agree_on_the_place_count_each_nucleus_once(size, margin, seed):
    rng = np.random.default_rng(seed)
    _, truth, _ = draw(200, 180, seed)
    truth = np.concatenate([truth, truth[:6] + rng.uniform(5, 6, (6, 1))])  # nuclei that lie over others
    tiles, found = tiles_over(size, margin, 200, 180), []
    for corner in tiles.corners:
        boxes = truth - np.tile(corner, 2)
        centres = centres_of(boxes)
        seen = ((centres > 0) & (centres < size)).all(axis=1)
        found.append(boxes[seen] + rng.uniform(-0.12, 0.12, (int(seen.sum()), 4)) * margin / 4)
    boxes = unique(tiles, found)
    assert len(boxes) == len(truth)
    assert (np.abs(boxes[:, None] - truth).max(axis=2).min(axis=0) <= 0.5).all()


FOUR = tiles_over(48, 8, 64, 64)  # cores meet at 32, 32
TWO = tiles_over(96, 24, 96, 48)  # cores meet at x = 48


@pytest.mark.parametrize(
    ("tiles", "truth"),
    [
        (FOUR, [[28, 28, 36, 36]]),  # the centre is on the corner of four cores
        (TWO, [[36, 10, 56, 30], [44, 10, 64, 30]]),  # over each other, on either side of the border
        (TWO, [[27, 10, 47, 30], [35, 10, 55, 30]]),  # and on one side of it
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_nuclei_at_the_border_of_cores_count_once_each(tiles, truth, shift):
    found = [np.array(truth) - np.tile(corner, 2) + shift * tile for tile, corner in enumerate(tiles.corners)]
    np.testing.assert_allclose(in_order(unique(tiles, found)), truth, atol=0.4)


@pytest.mark.parametrize(("mpp", "image_mpp", "size"), [(0.5, 0.07, 1600), (0.3, 0.22, 9090), (0.25, 0.07, 14400)])
def test_rounding_leaves_no_tile_without_an_area(mpp, image_mpp, size):
    tiling = Tiling.of(256, mpp, 8.0)
    tiles = Tiles.over(tiling, (size, size), image_mpp)
    assert tiles.across_down == (round(size * image_mpp / mpp / tiling.core),) * 2
    assert tiles.mm2().min() > 1e-4
    assert tiles.mm2().sum() == pytest.approx((size * image_mpp / 1000) ** 2)


def test_a_margin_must_leave_a_core():
    assert Tiling.of(64, 2.0, 28.0) == Tiling(64, 2.0, 14)
    with pytest.raises(ConfigError, match="margin_um: got 64.0 um"):
        Tiling.of(64, 2.0, 64.0)
