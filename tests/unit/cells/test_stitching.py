"""Findings of four tiles that place a nucleus differently, or do not all find it: each nucleus counts once."""

from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.cells.stitching import RIM_UM, SAME, left_to_others, near_seams, repeated, rim_um

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
    left = near[left_to_others(boxes[near], depth[near], tiles[near])]
    return np.bincount(np.delete(numbers, left), minlength=len(nuclei))


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
        counted = count(nuclei, jitter=1.0, missed=0.3, seed=seed)
        border = np.abs(nuclei).min(axis=1) < 1.5
        near += counted[border].tolist()
        inside += counted[np.abs(nuclei).min(axis=1) > 5].tolist()
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
    gone, paired = set(), set()
    for _, a, b in sorted(pairs):
        if not (gone & {a, b} or paired & {(a, tile[b]), (b, tile[a])}):
            paired |= {(a, tile[b]), (b, tile[a])}
            gone.add(b if depth[a] >= depth[b] else a)
    alone = {k for k in range(len(boxes)) if depth[k] < 0 and k not in {k for k, _ in paired}}
    return sorted(gone | alone)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 5), st.integers(1, 80))
def test_rounds_decide_like_one_pair_after_the_other(seed, count, tiles, chunk):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 12, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(6, 9, (count, 2))], axis=1)
    depth, tile = rng.uniform(-1, 2, count), rng.integers(0, tiles, count)
    with mock.patch("celldetr.cells.stitching._CHUNK", chunk):
        assert left_to_others(boxes, depth, tile).tolist() == one_by_one(boxes, depth, tile)


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
