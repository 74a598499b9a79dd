"""Bootstrap intervals."""

import numpy as np

from celldetr.evaluation.intervals import intervals
from celldetr.evaluation.metrics import COUNTS, scores


def counts_of(rng, n_images, recall=0.7, per_image=20, rows=1):
    """Make counts as of Detection, with a known recall and precision 1."""
    counts = np.zeros((n_images, rows, len(COUNTS)), dtype=np.int64)
    found = rng.binomial(per_image, recall, (n_images, rows))
    for name, value in (("n_truth", per_image), ("tp", found), ("fn_unpaired", per_image - found)):
        counts[..., COUNTS.index(name)] = value
    return counts


def test_intervals_hold_the_estimate_and_follow_the_seed():
    counts = counts_of(np.random.default_rng(0), 200, rows=3)
    ends = intervals(counts, seed=1)
    value = scores(counts.sum(axis=0))
    assert (ends[0] <= value).all()
    assert (value <= ends[1]).all()
    assert np.array_equal(ends, intervals(counts, seed=1))
    assert not np.array_equal(ends, intervals(counts, seed=2))


def test_intervals_cover_the_planted_recall_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        low, high = intervals(counts_of(rng, 60), resamples=300, seed=3)[:, 0, 1]
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 300 <= 0.985


def test_intervals_are_those_of_resampling_one_image_at_a_time_in_blocks_of_any_size(monkeypatch):
    counts = counts_of(np.random.default_rng(5), 30, rows=2)
    rng = np.random.default_rng(9)
    values = [scores(counts[rng.integers(30, size=30)].sum(axis=0)) for _ in range(400)]
    expected = np.percentile(values, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(intervals(counts, resamples=400, seed=9), expected)
    monkeypatch.setattr("celldetr.evaluation.intervals._DRAWS_AT_ONCE", 1000)
    np.testing.assert_allclose(intervals(counts, resamples=400, seed=9), expected)


def test_a_rare_class_uses_the_resamples_that_hold_it():
    counts = counts_of(np.random.default_rng(0), 5, recall=0.5)
    counts[1:] = 0
    ends = intervals(counts, resamples=200)
    assert ends[0, 0, 1] == ends[1, 0, 1] == scores(counts.sum(axis=0))[0, 1]


def test_undefined_stays_undefined():
    assert np.isnan(intervals(np.zeros((4, 2, len(COUNTS)), dtype=np.int64))).all()
    assert np.isnan(intervals(np.zeros((0, 2, len(COUNTS)), dtype=np.int64))).all()
    assert np.isnan(intervals(counts_of(np.random.default_rng(0), 5), resamples=0)).all()
    false = np.zeros((4, 1, len(COUNTS)), dtype=np.int64)
    false[..., COUNTS.index("fp_unpaired")] = 1
    assert np.isnan(intervals(false)).all()
    assert np.isnan(intervals(false, "hovernet_compat")[:, 0]).tolist() == [[False, True, False]] * 2
