"""A slide with planted nuclei, which the tests of finding share."""

import pytest
from planted_cells import draw
from slide_files import write_image


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    """Return the file of a slide, the boxes (n, 4) of its nuclei, and their classes (n,)."""
    image, boxes, labels = draw(331, 287)
    return write_image(tmp_path_factory.mktemp("slide") / "slide.tif", image), boxes, labels
