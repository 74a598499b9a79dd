"""The overview of a slide: which patches are complete can be told."""

import numpy as np
from slide_files import write_image

from celldetr.report.patches import overview
from celldetr.slides.grid import PatchGrid
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster

SIZE, RED, BLUE = 64, (208, 0, 0), (0, 80, 200)


def test_a_patch_that_is_not_complete_is_framed_in_red_between_others(tmp_path):
    """Neighbours share their edges, so that each must be told by what lies inside of its own."""
    corners = SIZE * np.stack(np.meshgrid(*2 * [np.arange(3)]), axis=-1).reshape(-1, 2)
    grid = PatchGrid.bare(SIZE, 0.5, 0.5, corners)
    tissue = Raster(np.ones((3, 3), dtype=bool), SIZE, SIZE / 2)
    write_image(tmp_path / "slide.tif", np.full((3 * SIZE, 3 * SIZE, 3), 220, np.uint8))
    with open_pyramid(tmp_path / "slide.tif", 0.5) as image:
        pixels = np.asarray(overview(image, grid, tissue, np.arange(9) != 4))
    for index, (x, y) in enumerate(corners.tolist()):
        part = pixels[y : y + SIZE, x : x + SIZE]
        red, blue = ((part == colour).all(axis=-1) for colour in (RED, BLUE))
        assert red.any() == (index == 4)
        assert blue.any() == (index != 4)
        if index == 4:
            assert red[2].all()
            assert red[:, -3].all()
            assert not red[8:-8, 8:-8].any()
