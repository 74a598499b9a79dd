"""Cells of a slide: every planted nucleus once, whatever the tiles and jobs; and what a killed job leaves."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_cells import CLASSES, boxes_of, cells_of, draw
from slide_files import write_image


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    image, boxes, labels = draw(331, 287)
    return write_image(tmp_path_factory.mktemp("slide") / "slide.tif", image), boxes, labels


@settings(max_examples=10, deadline=None)
@given(st.integers(40, 200), st.integers(12, 19), st.integers(1, 5), st.integers(1, 2), st.integers(1, 4))
def test_each_nucleus_is_found_once_whatever_the_tiles(slide, tmp_path_factory, size, margin, batch, workers, jobs):
    path, truth, labels = slide
    folder = tmp_path_factory.mktemp("cells")
    cells = cells_of(path, folder, size=size, margin_um=margin, batch_size=batch, workers=workers, jobs=jobs)
    bounds = shapely.bounds(np.concatenate(list(cells.outlines())))
    order, expected = np.lexsort(bounds.T[:2]), np.lexsort(truth.T[:2])
    np.testing.assert_array_equal(bounds[order], truth[expected])
    np.testing.assert_allclose(boxes_of(cells), truth[expected], atol=1e-9)
    frame = cells.frame()
    assert frame["type"].iloc[order].tolist() == [CLASSES[label] for label in labels[expected]]
    embeddings = np.concatenate(list(cells.embeddings()))[order]
    np.testing.assert_allclose(embeddings[:, 0] * 255, 20 + 40 * labels[expected], atol=1e-4)
    assert frame.index.tolist() == [str(number + 1) for number in range(len(truth))]
    assert not (frame["border"] & (frame["edge_um"] > 10)).any()
