"""Boxes of nuclei: outlines follow any affine; a patch has a box around what it shows of each nucleus."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.slides.boxes import place_outlines, visible_boxes


def test_outlines_follow_any_affine_and_bad_ones_are_named():
    turn = np.array([[0.6, -0.8, 5], [0.8, 0.6, 7], [0, 0, 1.0]])
    square = shapely.box(0, 0, 10, 5)
    line = shapely.Polygon([(0, 0), (1, 1), (2, 2)])
    bow = shapely.Polygon([(0, 0), (10, 5), (10, 0), (0, 5)])
    spike = shapely.Polygon([(0, 0), (10, 0), (10, 5), (5, 5), (5, 20), (5, 5), (0, 5)])
    polygons = [square, line, shapely.Polygon(), None, shapely.Polygon([(0, 0), (3, np.inf), (3, 0)]), bow, spike]
    outlines, good = place_outlines(polygons, turn, 0.5, 0.25)
    assert good.tolist() == [True, False, False, False, False, True, True]
    corners = np.array([[0, 0], [10, 0], [10, 5], [0, 5]]) @ turn[:2, :2].T + turn[:2, 2]
    expected = np.concatenate([corners.min(axis=0), corners.max(axis=0)]) * 2
    np.testing.assert_allclose(shapely.bounds(outlines[good]), [expected] * 3)
    assert shapely.is_valid(outlines[good]).all()
    assert place_outlines([], turn, 0.5, 0.25)[0].shape == (0,)


def test_the_visible_part_of_a_cut_nucleus_is_boxed():
    disc = shapely.Point(32, 16).buffer(8, quad_segs=64)  # half of it in each of two patches
    hook = shapely.Polygon([(10, 20), (22, 20), (22, 40), (18, 40), (18, 24), (10, 24)])  # its leg leaves the first
    whole = shapely.box(2, 2, 6, 7)
    ninth, eleventh = shapely.box(23, 40, 33, 44), shapely.box(40, 28, 44, 37)  # a tenth; 4 of 9 px and 5 of 9
    corners = np.array([[0, 0], [32, 0], [0, 32], [32, 32]])
    found = visible_boxes(np.array([disc, hook, whole, ninth, eleventh]), corners, 32, 0.1)
    assert [found.nuclei[found.of(patch)].tolist() for patch in range(4)] == [[0, 1, 2], [0, 4], [1, 3], [3, 4]]
    np.testing.assert_allclose(
        found.boxes,
        [[24, 8, 32, 24], [10, 20, 22, 32], [2, 2, 6, 7], [0, 8, 8, 24], [8, 28, 12, 32], [18, 0, 22, 8]]
        + [[23, 8, 32, 12], [0, 8, 1, 12], [8, 0, 12, 5]],
        atol=1e-9,
    )
    assert found.cut.tolist() == [True, True, False, True, True, True, True, True, True]
    assert found.hidden.tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(found.centroids[0], [32 - 8 * 4 / (3 * np.pi), 16], atol=1e-3)  # of half a disc
    fewer = visible_boxes(np.array([disc, ninth]), corners, 32, 0.11)
    assert fewer.nuclei.tolist() == [0, 0, 1]
    assert fewer.hidden.tolist() == [0, 0, 0, 1]
    again = found.select([3, 0])
    assert again.nuclei.tolist() == [3, 4, 0, 1, 2]
    assert again.ptr.tolist() == [0, 2, 5]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), step=st.sampled_from([16, 24, 32]), share=st.sampled_from([0.01, 0.1, 0.5, 1]))
def test_boxes_are_those_of_the_painted_nuclei(seed, step, share):
    rng = np.random.default_rng(seed)
    low = rng.integers(-6, 70, (25, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 12, (25, 2))], axis=1)
    corners = np.stack(np.meshgrid([0, step, 2 * step], [0, step]), axis=-1).reshape(-1, 2)
    found = visible_boxes(shapely.box(*boxes.T), corners, 32, share)
    for patch, (x, y) in enumerate(corners):
        expected = {}
        for nucleus, (x0, y0, x1, y1) in enumerate(boxes):
            painted = np.zeros((120, 140), bool)  # the corner of the slide is at (20, 20)
            painted[y0 + 20 : y1 + 20, x0 + 20 : x1 + 20] = True
            rows, columns = np.nonzero(painted[y + 20 : y + 52, x + 20 : x + 52])
            if len(rows) and len(rows) >= share * painted.sum():
                expected[nucleus] = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        here = found.of(patch)
        assert dict(zip(found.nuclei[here].tolist(), found.boxes[here].tolist(), strict=True)) == expected
        assert (found.cut[here] == [expected[n] != (boxes[n] - [x, y, x, y]).tolist() for n in expected]).all()


@pytest.mark.parametrize("corners", [np.empty((0, 2), int), np.array([[0, 0]])])
def test_nothing_gives_no_boxes(corners):
    found = visible_boxes(np.empty(0, dtype=object), corners, 32, 0.1)
    assert len(found) == len(corners)
    assert found.boxes.shape == (0, 4)
    assert found.select(np.arange(len(corners))).centroids.shape == (0, 2)
