"""Patches that figure 4c draws, and their file."""

import numpy as np

from celldetr.evaluation.similarity import DrawnSimilarities, choose_readable, read_similarities
from celldetr.runtime.files import write_npz


def test_patches_to_draw_are_readable_ones_if_there_are():
    sizes = np.array([0, 1, 100, 8, 2, 20, 90, 39])
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    assert set(choose_readable(ptr, 3, seed=1)) == {3, 5, 7}
    assert set(choose_readable(ptr, 20, seed=1)) == {2, 3, 4, 5, 6, 7}
    assert len(choose_readable(ptr, 0, seed=1)) == 0


def test_similarities_come_back_as_written(tmp_path):
    matrices = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4)).astype(np.float32)
    drawn = DrawnSimilarities(np.array([1, 4]), np.array([4, 3]), matrices)
    write_npz(tmp_path / "a.npz", drawn)
    back = read_similarities(tmp_path / "a.npz")
    for name, value in vars(drawn).items():
        assert np.array_equal(getattr(back, name), value)
