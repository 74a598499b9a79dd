"""Cells that a user already has."""

import numpy as np
import pytest

from celldetr.cells.given import agreement


def _boxes(centres, size=8.0):
    centres = np.asarray(centres, float).reshape(-1, 2)
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def test_a_detection_agrees_with_one_cell_only_and_the_nearest_first():
    given = _boxes([[0, 0], [6, 0], [100, 0], [200, 0]])
    found = _boxes([[104, 0], [2, 0], [206, 0]])
    assert agreement(given, found, 5).tolist() == [1, -1, 0, -1]
    assert agreement(given, found, 6).tolist() == [1, -1, 0, 2], "a pair at the radius counts"


@pytest.mark.parametrize(("given", "found"), [(0, 0), (3, 0), (0, 3)])
def test_nothing_agrees_with_nothing(given, found):
    assert agreement(np.zeros((given, 4)), np.zeros((found, 4)), 5).tolist() == [-1] * given


def test_scattered_detections_agree_with_their_own_cells():
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(np.arange(60), np.arange(60)), axis=-1).reshape(-1, 2) * 30.0
    order = rng.permutation(len(centres))
    found = centres[order] + rng.uniform(-6, 6, centres.shape)
    assert (order[agreement(_boxes(centres), _boxes(found), 12)] == np.arange(len(centres))).all()
