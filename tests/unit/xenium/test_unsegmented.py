"""Visible nuclei that Xenium did not segment: their patches are found, and a complete section keeps all of its own."""

from pathlib import Path

import numpy as np
import pytest
import shapely
from xenium_scene import PIXEL, make_scene

from celldetr.config.slides import PatchSettings
from celldetr.slides.boxes import SlideNuclei, place_outlines
from celldetr.slides.grid import PatchGrid, patch_grid
from celldetr.slides.tissue import tissue_mask
from celldetr.xenium.registration.affine import inverse, scaling
from celldetr.xenium.unsegmented import visible_nuclei

SIZE, MPP = 192, 0.25
LIMIT = PatchSettings().max_unsegmented


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """Path of an H&E, all of its nuclei, its patches, and the centres of the nuclei, um."""
    scene = make_scene(tmp_path_factory.mktemp("scene"), seed=2, angle=20)
    mpp = scene.he.mpp
    outlines, _ = place_outlines(scene.nuclei, inverse(scaling(PIXEL) @ scene.matrix), mpp, MPP)
    nuclei = SlideNuclei(outlines, np.zeros(len(outlines), np.int8))
    tissue = tissue_mask(scene.he, mpp)
    rules = PatchSettings(min_tissue=0.5, min_nuclei=4, min_labelled=0)
    grid = patch_grid(scene.he.size, mpp, nuclei, size=SIZE, mpp=MPP, tissue=tissue, settings=rules, seed=0)
    assert len(grid) > 20
    return Path(scene.he.path), nuclei, grid, shapely.get_coordinates(shapely.centroid(scene.nuclei))


def left_out(section, segmented):
    """Whether each patch is left out, and the share (N,) of its nuclei that are not segmented."""
    path, nuclei, grid, _ = section
    found = visible_nuclei(path, grid, nuclei.select(segmented), 2)
    lost = [1 - segmented[grid.boxes.nuclei[grid.boxes.of(patch)]].mean() for patch in range(len(grid))]
    return found.share > LIMIT, np.array(lost)


@pytest.mark.parametrize("share", [0, 0.15])
def test_a_section_of_which_few_nuclei_are_lost_keeps_its_patches(section, share):
    out, _ = left_out(section, np.random.default_rng(0).random(len(section[1])) >= share)
    assert out.mean() <= share / 5


def test_patches_are_left_out_where_half_of_the_nuclei_are_lost(section):
    out, _ = left_out(section, np.random.default_rng(0).random(len(section[1])) < 0.5)
    assert out.mean() > 0.75


def test_patches_are_left_out_in_the_third_that_was_not_segmented_and_nowhere_else(section):
    x = section[3][:, 0]
    out, lost = left_out(section, x < np.percentile(x, 67))
    assert (lost > 0.8).sum() > 4
    assert (lost == 0).sum() > 8
    assert out[lost > 0.8].all()
    assert not out[lost == 0].any()


def test_nuclei_that_are_all_elsewhere_are_no_measure(section):
    """Nothing says how dark a nucleus is, and no patch is blamed."""
    path, nuclei, grid, _ = section
    away = SlideNuclei(shapely.transform(nuclei.outlines, lambda points: points + 1e5), nuclei.labels)
    found = visible_nuclei(path, grid, away, 1)
    assert found.seen.sum() == found.share.sum() == 0
    nothing = PatchGrid.bare(SIZE, MPP, grid.image_mpp, np.empty((0, 2), np.int64))
    assert len(visible_nuclei(path, nothing, nuclei, 1).share) == 0
