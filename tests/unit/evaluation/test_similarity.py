"""Patches that figure 4c draws, and the files of the similarity rule."""

import numpy as np
import pytest

from celldetr.evaluation import similarity
from celldetr.runtime.errors import InputError


def test_patches_to_draw_are_readable_ones_if_there_are():
    sizes = np.array([0, 1, 100, 8, 2, 20, 90, 39])
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    assert set(similarity.choose_readable(ptr, 3, seed=1)) == {3, 5, 7}
    assert set(similarity.choose_readable(ptr, 20, seed=1)) == {2, 3, 4, 5, 6, 7}
    assert len(similarity.choose_readable(ptr, 0, seed=1)) == 0


def test_files_come_back_and_damaged_ones_are_refused(tmp_path):
    matrices = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4)).astype(np.float32)
    drawn = similarity.DrawnSimilarities(np.array([1, 4]), np.array([4, 3]), matrices)
    similarity.write_similarities(tmp_path / "a.npz", drawn)
    back = similarity.read_similarities(tmp_path / "a.npz")
    for name, value in vars(drawn).items():
        assert np.array_equal(getattr(back, name), value)
    similarity.write_retrieval(tmp_path / "a.json", {"retrieval": 0.5})
    assert similarity.read_retrieval(tmp_path / "a.json") == {"retrieval": 0.5}
    for name, read in (("a.npz", similarity.read_similarities), ("a.json", similarity.read_retrieval)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)
