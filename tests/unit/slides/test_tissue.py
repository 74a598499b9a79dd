"""Tissue on a slide: found by colour, with glass, dust and pen marks left out."""

import numpy as np
import pytest
from scipy import ndimage
from slide_files import write_image

from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster, imaged, tissue_maps, tissue_mask

TISSUE, GLASS = (205, 150, 190), (242, 243, 242)


def slide_image(side=640):
    """Draw glass with a disc of stained tissue, pen marks on both, a grey smear and dust; 2 um per px."""
    rng = np.random.default_rng(0)
    image = np.empty((side, side, 3))
    image[:] = GLASS
    y, x = np.mgrid[:side, :side]
    disc = np.hypot(x - 320, y - 320) < 200
    image[disc] = TISSUE
    nuclei = disc & (rng.random((side, side)) < 0.3)
    image[nuclei] = (110, 75, 150)
    pens = {"blue": (slice(40, 60), slice(0, 640)), "green": (slice(0, 640), slice(60, 80)),
            "black": (slice(300, 330), slice(300, 400))}  # fmt: skip
    for (rows, columns), ink in zip(pens.values(), [(40, 60, 160), (30, 140, 80), (25, 25, 30)], strict=True):
        image[rows, columns] = ink
    image[560:600, 400:600] = (190, 190, 190)
    image[600:606, 30:36] = TISSUE
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255), disc, pens


@pytest.mark.parametrize("levels", [1, 3])
def test_tissue_is_found_and_pen_is_not(tmp_path, levels):
    image, disc, pens = slide_image()
    with open_pyramid(write_image(tmp_path / "he.tif", image, levels)) as slide:
        found = tissue_mask(slide, 2.0)
    assert (found.cell, found.mpp) == (4, 8)
    truth = disc.reshape(160, 4, 160, 4).mean(axis=(1, 3)) > 0.5
    for rows, columns in pens.values():
        assert not found.inside[rows.start // 4 : rows.stop // 4, columns.start // 4 : columns.stop // 4].any()
        truth[rows.start // 4 - 4 : rows.stop // 4 + 4, columns.start // 4 - 4 : columns.stop // 4 + 4] = False
    assert (found.inside & truth).sum() / truth.sum() > 0.98
    grown = ndimage.binary_dilation(disc.reshape(160, 4, 160, 4).any(axis=(1, 3)))  # the map is smoothed by a cell
    assert (found.inside & ~grown).sum() < 0.01 * truth.sum()


def test_a_few_ringing_cells_do_not_turn_the_glass_to_tissue(tmp_path):
    image, disc, _ = slide_image()
    clean = tissue_mask(open_pyramid(write_image(tmp_path / "clean.tif", image)), 2.0).inside
    image[4:8, ::6] = (252, 230, 255)
    ringing = tissue_mask(open_pyramid(write_image(tmp_path / "ringing.tif", image)), 2.0).inside
    assert (clean != ringing).mean() < 0.01


@pytest.mark.parametrize(("colour", "share"), [(GLASS, 0), ((200, 200, 200), 0), (TISSUE, 1), ((228, 208, 224), 1)])
def test_a_slide_of_one_kind_is_all_or_nothing(tmp_path, colour, share):
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(colour, 5, (320, 320, 3)), 0, 255)
    with open_pyramid(write_image(tmp_path / "he.tif", image)) as slide:
        assert tissue_mask(slide, 1.0).inside.mean() == share


@pytest.mark.parametrize("side", [8, 20, 43, 256])  # px of 1 um; 2,000 um2 are the smallest piece on a slide
@pytest.mark.parametrize(("colour", "share"), [(GLASS, 0), (TISSUE, 1), ((110, 75, 150), 1)])
def test_images_of_a_few_cells_are_all_or_nothing(tmp_path, side, colour, share):
    image = np.clip(np.random.default_rng(0).normal(colour, 5, (side, side, 3)), 0, 255)
    with open_pyramid(write_image(tmp_path / "he.tif", image)) as slide:
        assert tissue_mask(slide, 1.0).inside.mean() == share


@pytest.mark.parametrize("levels", [1, 4])  # the last pixels of a level are no whole pixel of the next
def test_a_nucleus_in_the_last_um_of_a_slide_is_in_the_tissue(tmp_path, levels):
    width, height = 327, 319  # cells of 8 px
    with open_pyramid(write_image(tmp_path / "he.tif", np.full((height, width, 3), TISSUE), levels)) as slide:
        found = tissue_mask(slide, 1.0)
    nuclei = np.array([[width - 6, 100], [100, height - 6], [width - 6, height - 6]])
    assert found.share(nuclei, 6).tolist() == [1, 1, 1]


def test_shares_of_squares_are_exact_to_fractions_of_a_cell():
    raster = Raster(np.zeros((10, 10), bool), 16, 8)
    raster.inside[2:5, 3:7] = True  # level-0 px 48..112 x 32..80
    corners = np.array([[48, 32], [40, 32], [104, 72], [200, 32], [60.5, 40.25]])
    assert np.allclose(raster.share(corners, 16), [1, 0.5, 0.25, 0, 1])


def test_fields_that_were_not_imaged_are_found(tmp_path):
    dapi = np.full((600, 800), 20, np.uint8)  # 2 um per px
    dapi[:, 500:] = 0  # a missing field
    dapi[100:140, 100:140] = 0  # dark background inside of a field
    with open_pyramid(write_image(tmp_path / "dapi.tif", dapi, 2)) as image:
        matrix = np.array([[0, 0.5, 0], [-0.5, 0, 600], [0, 0, 1.0]])  # H&E px of 1 um, turned by 90 degrees
        raster = Raster(np.zeros((220, 160), bool), 8, 8)
        found = imaged(image, 2.0, raster, matrix).inside
    rows = (np.arange(220) + 0.5) * 8 * 0.5
    columns = 600 - (np.arange(160) + 0.5) * 8 * 0.5
    expected = (rows[:, None] < 500) & (columns >= 0) & (columns < 600)
    assert (found != expected).mean() < 0.01


def test_a_nucleus_can_lie_wherever_there_is_stain_but_not_on_glass(tmp_path):
    """Thin walls of fat and shreds are too small to be tissue, yet their nuclei are real."""
    rng = np.random.default_rng(0)
    image = np.full((1200, 1200, 3), GLASS, float)  # 0.5 um per px
    image[:, :300] = TISSUE
    image[600:603, 300:] = TISSUE  # a wall of 1.5 um
    places = np.array([[320, 594], [700, 594], [1100, 594], [900, 200], [294, 900]])  # walls, a shred, the rim
    for x, y in places:
        image[y : y + 12, x : x + 12] = (110, 75, 150)
    with open_pyramid(write_image(tmp_path / "he.tif", np.clip(image + rng.normal(0, 4, image.shape), 0, 255))) as he:
        tissue, stained = tissue_maps(he, 0.5)
    boxes = np.concatenate([places, places + 12], axis=1)
    assert stained.touches(boxes).all()
    assert tissue.touches(boxes).tolist() == [True, False, False, False, True]
    blank = rng.integers((400, 20), (1180, 540), (300, 2))
    blank = blank[(np.abs(blank - places[3]) > 60).any(axis=1)]
    assert not stained.touches(np.concatenate([blank, blank + 12], axis=1)).any()
    beyond = np.array([[-50.0, -50, -20, -20], [1300, 1300, 1320, 1320]])  # the nearest cell counts
    assert stained.touches(beyond).tolist() == [True, False]
