"""Nuclei of a map of instances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from celldetr.segmentation.nuclei import nuclei_of_map


def random_case(seed, classes=3, size=24):
    """Instances in pieces, some of one pixel, with ids far apart; probabilities of their pixels."""
    random = default_rng(seed)
    instances = random.choice([0, 0, 0, 2, 5, 900], (size, size))
    instances[random.integers(size), random.integers(size)] = 7
    return instances, random.random((size, size)), random.random((classes, size, size))


@given(st.integers(0, 1000), st.integers(0, 120))
def test_nuclei_agree_with_a_count_pixel_by_pixel(seed, min_area):
    instances, nucleus, classes = random_case(seed)
    found = nuclei_of_map(instances, nucleus, classes, min_area)
    expected = [i for i in (2, 5, 7, 900) if min_area <= (instances == i).sum() > 0]
    assert len(found.boxes) == len(found.masks) == len(found.nucleus_score) == len(found.class_scores) == len(expected)
    for i, box, mask, score, shares in zip(expected, *found, strict=True):
        x0, y0, x1, y1 = box.astype(int)
        painted = np.zeros(instances.shape, bool)
        painted[y0:y1, x0:x1] = mask
        np.testing.assert_array_equal(painted, instances == i)
        assert mask.any(0)[[0, -1]].all()
        assert mask.any(1)[[0, -1]].all()
        assert score == pytest.approx(np.mean([nucleus[y, x] for y, x in np.argwhere(painted)]), rel=1e-5)
        votes = [max(range(3), key=lambda k: classes[k, y, x]) for y, x in np.argwhere(painted)]
        assert shares.tolist() == pytest.approx([votes.count(k) / len(votes) for k in range(3)], rel=1e-5)


def test_an_empty_map_has_no_nuclei():
    found = nuclei_of_map(np.zeros((8, 8), int), np.ones((8, 8)), np.ones((4, 8, 8)), 10)
    assert [part.shape for part in (found.boxes, found.nucleus_score, found.class_scores)] == [(0, 4), (0,), (0, 4)]
    assert len(found.masks) == 0


def test_a_map_of_one_nucleus_has_the_box_of_the_image():
    found = nuclei_of_map(np.full((8, 8), 3, np.uint16), np.full((8, 8), 0.5), np.ones((1, 8, 8)), 10)
    assert found.boxes.tolist() == [[0, 0, 8, 8]]
    assert found.class_scores.tolist() == [[1]]


def test_negative_ids_are_refused():
    with pytest.raises(ValueError, match="negative"):
        nuclei_of_map(np.full((8, 8), -1), np.ones((8, 8)), np.ones((1, 8, 8)), 10)
