"""Cut patches: pixels and boxes at exactly their place, the same bytes for any number of threads."""

import numpy as np
import pytest
import shapely
from slide_files import ALL_PATCHES, boxes_on_slide, damage_tiles, grid_over, whole_tissue, write_image

from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei, place_outlines
from celldetr.slides.cutting import _groups, cut_patches, read_blocks, read_patch
from celldetr.slides.grid import patch_grid
from celldetr.slides.pyramid import open_pyramid
from celldetr.store import open_store

LIGHT = 230.0  # room for the filter to overshoot
NAMES = {"classes": ("a", "b"), "source": "s", "group": "g", "tissue": "t", "attrs": {}}


def discs(width, height, count, seed, radius, gap):
    """Return dark discs on light grey, anti-aliased at 4 x 4 points a pixel; centres and radii (n, 3)."""
    rng = np.random.default_rng(seed)
    truth = []
    while len(truth) < count:
        r = rng.uniform(*radius)
        x, y = rng.uniform(r + 3, width - r - 3), rng.uniform(r + 3, height - r - 3)
        if all(np.hypot(x - a, y - b) > r + c + gap for a, b, c in truth):
            truth.append((x, y, r))
    image = np.full((height, width, 3), LIGHT)
    offsets = (np.arange(4) + 0.5) / 4
    for x, y, r in truth:
        rows, columns = (slice(int(c - r) - 1, int(c + r) + 3) for c in (y, x))
        ys = np.arange(rows.start, rows.stop)[:, None, None, None] + offsets[:, None]
        xs = np.arange(columns.start, columns.stop)[:, None, None] + offsets
        image[rows, columns] -= 200 * (np.hypot(xs - x, ys - y) <= r).mean(axis=(2, 3))[..., None]
    return image, np.array(truth)


@pytest.mark.parametrize(
    ("image_mpp", "mpp", "levels"),
    [(0.2738, 0.25, 1), (0.25, 0.25, 2), (0.13, 0.25, 3), (0.125, 0.5, 3), (0.3, 1.0, 2)],
)
def test_boxes_lie_over_the_pixels_of_their_nuclei(tmp_path, image_mpp, mpp, levels):
    scale = mpp / image_mpp  # level-0 px per patch px
    width, height, size = 803, 701, 64  # odd, so that the levels are rounded
    wide = max(1, scale / 2)
    image, truth = discs(width, height, 60, seed=1, radius=(6 * wide, 10 * wide), gap=12 * wide)
    path = write_image(tmp_path / "he.tif", image, levels)
    polygons = shapely.buffer(shapely.points(truth[:, :2] * image_mpp), truth[:, 2] * image_mpp, quad_segs=32)
    outlines, _ = place_outlines(polygons, np.diag([1 / image_mpp, 1 / image_mpp, 1]), image_mpp, mpp)
    nuclei = SlideNuclei(outlines, np.zeros(len(outlines), np.int8))
    rules = {"settings": ALL_PATCHES.model_copy(update={"stride": 0.5}), "tissue": whole_tissue(width, height)}
    grid = patch_grid((width, height), image_mpp, nuclei, size=size, mpp=mpp, seed=0, **rules)
    found = []
    with open_pyramid(path) as slide:
        for patch in range(len(grid)):
            pixels = read_patch(slide, grid, *grid.corners[patch].tolist())
            for box in grid.boxes.boxes[grid.boxes.of(patch)][~grid.boxes.cut[grid.boxes.of(patch)]]:
                low, high = np.floor(box[:2]).astype(int) - 3, np.ceil(box[2:]).astype(int) + 3
                if low.min() < 0 or high.max() > size:
                    continue
                dark = LIGHT - pixels[low[1] : high[1], low[0] : high[0], 0]
                y, x = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5
                measured = np.array([(dark * x).sum(), (dark * y).sum()]) / dark.sum()
                area = dark.sum() / 200
                found.append([*(measured - (box[:2] + box[2:]) / 2), np.sqrt(area / np.pi) * 2 - (box[2] - box[0])])
    found = np.array(found)
    assert len(found) > 10
    assert np.abs(found[:, :2]).max() < 0.1  # place
    assert np.abs(found[:, 2]).max() < 0.1  # size
    assert np.abs(found.mean(axis=0)).max() < 0.02  # no drift in one direction


def test_neighbouring_patches_have_no_seam(tmp_path):
    path = write_image(tmp_path / "he.tif", np.random.default_rng(0).integers(0, 256, (200, 200, 3)))
    small, large = (grid_over((200, 200), boxes_on_slide([]), ratio=1.37, size=size) for size in (32, 64))
    with open_pyramid(path) as slide:
        whole = read_patch(slide, large, 0, 0)
        for x, y in [(0, 0), (32, 0), (0, 32), (32, 32)]:
            part = read_patch(slide, small, x, y)
            difference = np.abs(whole[y : y + 32, x : x + 32].astype(int) - part)
            assert difference.max() <= 1  # rounding of the filter


def test_shrinking_does_not_alias(tmp_path):
    # stripes of one pixel must turn grey and not become stripes of another width
    stripes = np.zeros((256, 256, 3))
    stripes[:, ::2] = 255
    path = write_image(tmp_path / "he.tif", stripes)
    grid = grid_over((256, 256), boxes_on_slide([]), ratio=3.3, size=64)
    with open_pyramid(path) as slide:
        inner = read_patch(slide, grid, 0, 0)[4:-4, 4:-4]
    assert inner.min() > 110
    assert inner.max() < 145


def test_the_cut_is_the_same_for_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    path = write_image(tmp_path / "he.tif", rng.integers(0, 256, (300, 450, 3)), levels=2)
    low = rng.uniform(0, 275, (150, 2))
    boxes = np.concatenate([low, low + rng.uniform(2, 20, (150, 2))], axis=1)
    nuclei = boxes_on_slide(boxes, rng.integers(-1, 2, 150))
    grid = grid_over((450, 300), nuclei, ratio=1.1, settings=ALL_PATCHES.model_copy(update={"stride": 0.5}))
    for workers in (1, 3):
        cut_patches(path, grid, nuclei.labels, tmp_path / f"{workers}.zarr", workers=workers, **NAMES)
    one, three = (open_store(tmp_path / f"{workers}.zarr") for workers in (1, 3))
    assert len(one) == len(grid) > 300
    assert np.array_equal(one.images(range(len(one))), three.images(range(len(three))))
    assert np.array_equal(one.boxes, three.boxes)
    assert one.patches.equals(three.patches)
    with open_pyramid(path) as slide:
        for patch in (0, 70, len(grid) - 1):
            alone = read_patch(slide, grid, *grid.corners[patch].tolist()).astype(int)
            assert np.abs(one.read(patch).image - alone).max() <= 1  # rounding of the filter
    assert np.array_equal(one.patches[["x", "y"]], np.rint(grid.corners * 1.1).astype(int))


@pytest.mark.parametrize(("ratio", "most"), [(1, 0), (1.37, 1)])
def test_tiles_that_overlap_are_read_together_and_damage_apart(tmp_path, ratio, most):
    image = np.random.default_rng(0).integers(0, 256, (400, 500, 3))
    path = write_image(tmp_path / "he.tif", image, compression="deflate")
    grid = grid_over(
        (500, 400), boxes_on_slide([]), ratio=ratio, settings=ALL_PATCHES.model_copy(update={"stride": 0.7})
    )
    for damaged in ((), (10, 30)):
        damage_tiles(path, [(0, tile) for tile in damaged])
        blocks = list(read_blocks(path, grid, size=50, workers=2, skip=True))
        lost, count = {number for block in blocks for number in block.damaged}, 0
        with open_pyramid(path) as slide:
            for block in blocks:
                for number, pixels in zip(block.numbers, block.pixels, strict=True):
                    alone = read_patch(slide, grid, *grid.corners[number].tolist())
                    assert np.abs(alone.astype(int) - pixels).max() <= most
                    count += 1
            for number in lost:
                with pytest.raises(InputError):
                    read_patch(slide, grid, *grid.corners[number].tolist())
        assert count + len(lost) == len(grid) > 100
        assert bool(lost) == bool(damaged)
        assert sorted([*lost, *np.concatenate([block.numbers for block in blocks])]) == list(range(len(grid)))


def test_tiles_that_overlap_are_few_reads(tmp_path):
    corners = np.stack(np.meshgrid(np.arange(16), np.arange(4)), axis=-1).reshape(-1, 2) * 192
    assert [last - first for first, last in _groups(corners, 256)] == [32, 32]
    assert len(_groups(corners * 256 // 192, 256)) == 64  # nothing is read twice
    assert _groups(corners[:1], 256) == [(0, 1)]
