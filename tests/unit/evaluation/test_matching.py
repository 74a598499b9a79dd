"""Matching of true and predicted nuclei."""

import itertools

import numpy as np
import pytest

from celldetr.evaluation.matching import Nuclei, pair_nuclei


def nuclei(*images):
    """Build `Nuclei` without classes from lists of (x, y), one list per image."""
    centres = [np.array(image, dtype=float).reshape(-1, 2) for image in images]
    ptr = np.cumsum([0, *map(len, centres)])
    return Nuclei(ptr, np.concatenate([np.empty((0, 2)), *centres]), np.zeros(ptr[-1], dtype=np.int8))


def test_pair_at_exactly_the_radius_is_kept_and_beyond_is_dropped():
    truth = nuclei([(20, 20)], [(20, 20)], [(20, 20)], [(20, 20)])
    predicted = nuclei([(32, 20)], [(np.nextafter(32, 33), 20)], [(12, 29)], [(20, 8)])
    pairs = pair_nuclei(truth, predicted, 12)
    assert pairs.truth.tolist() == [0, 3]
    assert pairs.predicted.tolist() == [0, 3]


def test_nuclei_of_different_images_never_pair():
    pairs = pair_nuclei(nuclei([(5, 5)], []), nuclei([], [(5, 5)]), 12)
    assert len(pairs.truth) == 0


def test_assignment_minimises_the_sum_before_the_radius_applies():
    # 0-0 and 1-1 would both be near enough (11 + 12 px), but 1-0 and 0-1 have the smaller sum (1 + 12.4 px)
    truth, predicted = nuclei([(0, 0), (11, 1)]), nuclei([(11, 0), (5, 11.375)])
    pairs = pair_nuclei(truth, predicted, 12)
    assert (pairs.truth.tolist(), pairs.predicted.tolist()) == ([1], [0])


@pytest.mark.parametrize("seed", range(20))
def test_matches_exhaustive_search_on_small_images(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 5, (6, 2))
    truth = nuclei(*(rng.uniform(0, 40, (n, 2)) for n, _ in sizes))
    predicted = nuclei(*(rng.uniform(0, 40, (n, 2)) for _, n in sizes))
    pairs = pair_nuclei(truth, predicted, 12)
    expected = set()
    for image in range(len(sizes)):
        true = range(truth.ptr[image], truth.ptr[image + 1])
        found = range(predicted.ptr[image], predicted.ptr[image + 1])
        swap = len(true) > len(found)
        short, long = (found, true) if swap else (true, found)
        options = [
            [(j, i) if swap else (i, j) for i, j in zip(short, chosen, strict=True)]
            for chosen in itertools.permutations(long, len(short))
        ]

        def distance(pair):
            return np.hypot(*(truth.centres[pair[0]] - predicted.centres[pair[1]]))

        best = min(options, key=lambda option: sum(map(distance, option)))
        expected |= {pair for pair in best if distance(pair) <= 12}
    assert set(zip(pairs.truth.tolist(), pairs.predicted.tolist(), strict=True)) == expected


def test_pairs_are_one_to_one_and_symmetric():
    rng = np.random.default_rng(1)
    truth = nuclei(*(rng.uniform(0, 256, (n, 2)) for n in (30, 0, 12)))
    predicted = nuclei(*(rng.uniform(0, 256, (n, 2)) for n in (90, 7, 3)))
    pairs, back = pair_nuclei(truth, predicted, 12), pair_nuclei(predicted, truth, 12)
    assert len(set(pairs.truth)) == len(pairs.truth) == len(set(pairs.predicted))
    assert set(zip(pairs.truth, pairs.predicted, strict=True)) == set(zip(back.predicted, back.truth, strict=True))


def test_no_images_and_no_nuclei_are_legal():
    assert len(pair_nuclei(nuclei(), nuclei(), 12).truth) == 0
    assert len(pair_nuclei(nuclei([], []), nuclei([], []), 12).truth) == 0


def test_refuses_inconsistent_nuclei():
    with pytest.raises(ValueError, match="ptr"):
        Nuclei(np.array([0, 1]), np.zeros((2, 2)), np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="not finite"):
        Nuclei(np.array([0, 1]), np.full((1, 2), np.nan), np.zeros(1, dtype=int))
    with pytest.raises(ValueError, match="images"):
        pair_nuclei(nuclei([]), nuclei([], []), 12)
