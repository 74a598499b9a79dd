"""Matching of true and predicted nuclei."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.evaluation.matching import NucleusCentres, pair_nuclei

RADIUS = 12.0
POINTS = st.lists(st.tuples(st.floats(0, 40), st.floats(0, 40)), max_size=4)


def nuclei(*images):
    """Make nuclei without classes from lists of (x, y), one list per image."""
    centres = [np.array(image, dtype=float).reshape(-1, 2) for image in images]
    ptr = np.cumsum([0, *map(len, centres)])
    return NucleusCentres(ptr, np.concatenate([np.empty((0, 2)), *centres]), np.zeros(ptr[-1], dtype=np.int8))


def distance(a, b):
    return float(np.hypot(*np.subtract(a, b)))


def test_pair_at_exactly_the_radius_is_kept_and_beyond_is_dropped():
    truth = nuclei([(20, 20)], [(20, 20)], [(20, 20)], [(20, 20)])
    predicted = nuclei([(32, 20)], [(np.nextafter(32, 33), 20)], [(12, 29)], [(20, 8)])
    pairs = pair_nuclei(truth, predicted, RADIUS)
    assert pairs.truth.tolist() == [0, 3]
    assert pairs.predicted.tolist() == [0, 3]


def test_nuclei_of_different_images_never_pair():
    assert len(pair_nuclei(nuclei([(5, 5)], []), nuclei([], [(5, 5)]), RADIUS).truth) == 0
    assert len(pair_nuclei(nuclei(), nuclei(), RADIUS).truth) == 0


def test_assignment_minimises_the_sum_before_the_radius_applies():
    # 0-0 and 1-1 would both be near enough (11 + 12 px), but 1-0 and 0-1 have the smaller sum (1 + 12.4 px)
    truth, predicted = nuclei([(0, 0), (11, 1)]), nuclei([(11, 0), (5, 11.375)])
    pairs = pair_nuclei(truth, predicted, RADIUS)
    assert (pairs.truth.tolist(), pairs.predicted.tolist()) == ([1], [0])


def smallest_sum(true, found):
    """Smallest sum of distances of one-to-one pairs, by trying all assignments."""
    short, long = sorted((true, found), key=len)
    orders = itertools.permutations(long, len(short))
    return min(sum(distance(a, b) for a, b in zip(short, order, strict=True)) for order in orders)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(POINTS, POINTS), max_size=4))
def test_pairs_are_those_of_the_cheapest_assignment(fold):
    truth, predicted = nuclei(*(true for true, _ in fold)), nuclei(*(found for _, found in fold))
    everything = pair_nuclei(truth, predicted, np.inf)
    for image, (true, found) in enumerate(fold):
        here = truth.image[everything.truth] == image
        i, j = everything.truth[here] - truth.ptr[image], everything.predicted[here] - predicted.ptr[image]
        assert len(set(i)) == len(set(j)) == len(i) == min(len(true), len(found))
        total = sum(distance(true[a], found[b]) for a, b in zip(i, j, strict=True))
        assert total == pytest.approx(smallest_sum(true, found), abs=1e-9)
    near = pair_nuclei(truth, predicted, RADIUS)
    apart = np.linalg.norm(truth.centres[everything.truth] - predicted.centres[everything.predicted], axis=1)
    assert np.array_equal(near.truth, everything.truth[apart <= RADIUS])
    assert np.array_equal(near.predicted, everything.predicted[apart <= RADIUS])
