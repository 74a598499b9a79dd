"""Tiles of a slide that do not agree on the place of a nucleus: each counts once, also where nuclei lie over others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_cells import draw, in_order

from celldetr.cells.rows import Rows
from celldetr.cells.stitching import left_to_others, near_seams
from celldetr.cells.table import CellsInfo
from celldetr.cells.tiling import Tiles, Tiling
from celldetr.inference.batch import FoundNuclei
from celldetr.runtime.errors import ConfigError


def tiles_over(size, margin, width, height):
    return Tiles.over(Tiling(size, 1.0, margin), (width, height), 1.0)


def unique(tiles, boxes_of_tile):
    """Boxes that remain of those (n, 4) that each tile found, px from its corner."""
    rows = Rows(tiles, CellsInfo("s", "s.tif", 1.0, tiles.image_size, (0, 0), (), 0, False), "float32", 0.0)
    counts = [len(boxes) for boxes in boxes_of_tile]
    image, boxes = np.repeat(np.arange(len(tiles)), counts), np.concatenate(boxes_of_tile).astype(np.float32)
    none = np.empty((len(image), 0), np.float32)
    found, _ = rows.found(np.arange(len(tiles)), FoundNuclei(image, image, boxes, np.ones(len(image)), none, none))
    frame, margin = (
        found.select(["x_um", "y_um", "width_um", "height_um", "tile", "edge_um"]).to_pandas(),
        tiles.tiling.margin,
    )
    centre, half = frame[["x_um", "y_um"]].to_numpy(), frame[["width_um", "height_um"]].to_numpy() / 2
    boxes, depth = np.concatenate([centre - half, centre + half], axis=1), frame["edge_um"].to_numpy() - margin
    near = np.flatnonzero(near_seams(depth, margin))
    return np.delete(boxes, near[left_to_others(boxes[near], depth[near], frame["tile"].to_numpy()[near])], axis=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(30, 90), st.integers(4, 14), st.integers(0, 10_000))
def test_tiles_that_do_not_agree_on_the_place_count_each_nucleus_once(size, margin, seed):
    rng = np.random.default_rng(seed)
    _, truth, _ = draw(200, 180, seed)
    truth = np.concatenate([truth, truth[:6] + rng.uniform(5, 6, (6, 1))])  # nuclei that lie over others
    tiles, found = tiles_over(size, margin, 200, 180), []
    for corner in tiles.corners:
        boxes = truth - np.tile(corner, 2)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
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


def test_a_margin_must_leave_a_core():
    assert Tiling.of(64, 2.0, 28.0) == Tiling(64, 2.0, 14)
    with pytest.raises(ConfigError, match="margin_um: got 64.0 um"):
        Tiling.of(64, 2.0, 64.0)
