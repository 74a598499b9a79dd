"""Nuclei that Xenium or the H&E lacks: their patches are found, and a complete section keeps all of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from xenium_scene import PIXEL, make_scene

from celldetr.config.slides import PatchSettings
from celldetr.slides.boxes import SlideNuclei, place_outlines, visible_boxes
from celldetr.slides.grid import PatchGrid, patch_grid
from celldetr.slides.tissue import tissue_mask
from celldetr.xenium.registration.affine import inverse, scaling
from celldetr.xenium.unsegmented import visible_nuclei

SIZE, MPP = 192, 0.25
LIMIT = PatchSettings().max_unsegmented
MISPLACED = 0.2


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


def moved(section, which, by):
    """Share (N,) of the nuclei of each patch that count as misplaced, and that are, if some are moved by px."""
    path, nuclei, grid, _ = section
    outlines = nuclei.outlines.copy()
    outlines[which] = shapely.transform(outlines[which], lambda points: points + by)
    boxes = visible_boxes(outlines, grid.corners, SIZE, 0.1)
    found = visible_nuclei(path, replace(grid, boxes=boxes), SlideNuclei(outlines, nuclei.labels), 1)
    patch = np.repeat(np.arange(len(grid)), np.diff(boxes.ptr))
    return found.misplaced, np.bincount(patch, which[boxes.nuclei], len(grid)) / np.bincount(patch, minlength=len(grid))


@pytest.mark.parametrize("share", [0, 0.1])
def test_no_patch_is_left_out_for_few_nuclei_that_are_elsewhere(section, share):
    found, _ = moved(section, np.random.default_rng(0).random(len(section[1])) < share, (40, 40))
    assert found.max() <= MISPLACED


def test_patches_beyond_a_fold_are_left_out_and_no_others(section):
    """All that lies beyond a line is 14 um off."""
    x = shapely.bounds(section[1].outlines)[:, 0]
    found, off = moved(section, x > np.percentile(x, 67), (40, 40))
    assert (off == 1).sum() > 4
    assert (off == 0).sum() > 8
    assert (found[off > 0.9] > MISPLACED).all()
    assert (found[off < 0.05] <= MISPLACED).all()


def test_few_nuclei_are_neighbours_of_each_other(section):
    """As many as there are, down to one or none."""
    for count in (5, 1, 0):
        path, nuclei, grid, _ = section
        few = nuclei.select(np.arange(len(nuclei)) < count)
        boxes = visible_boxes(few.outlines, grid.corners, SIZE, 0.1)
        assert visible_nuclei(path, replace(grid, boxes=boxes), few, 1).misplaced.max() <= 1


def test_a_nucleus_in_overlapping_patches_is_one_neighbour(section):
    """Else a nucleus would be judged by itself and two others."""
    path, nuclei, grid, _ = section
    twice = replace(
        grid,
        corners=np.repeat(grid.corners, 4, axis=0),
        boxes=grid.boxes.select(np.repeat(np.arange(len(grid)), 4)),
    )
    away = np.random.default_rng(0).random(len(nuclei)) < 0.2
    once, _ = moved(section, away, (40, 40))
    again, _ = moved((path, nuclei, twice, None), away, (40, 40))
    assert np.array_equal(np.repeat(once, 4), again)


def test_nuclei_that_are_all_elsewhere_are_no_measure(section):
    """Nothing says how dark a nucleus is, and no patch is blamed."""
    path, nuclei, grid, _ = section
    away = SlideNuclei(shapely.transform(nuclei.outlines, lambda points: points + 1e5), nuclei.labels)
    found = visible_nuclei(path, grid, away, 1)
    assert found.seen.sum() == found.share.sum() == 0
    assert 0 <= found.misplaced.min() <= found.misplaced.max() <= 1
    nothing = PatchGrid.bare(SIZE, MPP, grid.image_mpp, np.empty((0, 2), np.int64))
    assert len(visible_nuclei(path, nothing, nuclei, 1).share) == 0
