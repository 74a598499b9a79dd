"""Patches of a slide: pixels and boxes at exactly their place, the right nuclei in each, and nothing lost uncounted."""

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.slides.boxes import SlideBoxes, boxes_from_polygons
from celldetr.slides.cutting import cut_patches, read_patch
from celldetr.slides.grid import patch_grid
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster, imaged, tissue_mask
from celldetr.store import open_store

LIGHT = 230.0  # room for the filter to overshoot
ALL = PatchSettings(min_tissue=0, min_nuclei=0, min_labelled=0)


def write_image(path, image, levels=1, tile=64):
    """Write a TIFF pyramid, each level the mean of 2 x 2 px of the one before (an odd last row or column is left)."""
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            kind = {"subifds": levels - 1} if level == 0 else {"subfiletype": 1}
            photometric = "rgb" if image.ndim == 3 else "minisblack"
            writer.write(np.rint(image).astype(np.uint8), tile=(tile, tile), photometric=photometric, **kind)
            height, width = (side // 2 * 2 for side in image.shape[:2])
            image = image[:height, :width].astype(float)
            image = image.reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3)).squeeze()
    return path


def everywhere(width, height, cell=16):
    return Raster(np.ones((-(-height // cell), -(-width // cell)), bool), cell, cell / 4)


def make_nuclei(boxes, labels=None):
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    labels = np.zeros(len(boxes)) if labels is None else labels
    return SlideBoxes(boxes, (boxes[:, :2] + boxes[:, 2:]) / 2, np.asarray(labels, np.int8))


def grid_of(image_size, nuclei, *, ratio=1.0, size=32, chosen=ALL, seed=0, **more):
    """Lay a grid of patches of 1 um per px on an image of 1 / ratio um per px."""
    more = {"tissue": everywhere(*image_size), **more}
    return patch_grid(image_size, 1 / ratio, nuclei, size=size, mpp=1.0, settings=chosen, seed=seed, **more)


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
    [
        (0.2738, 0.25, 1),
        (0.4, 0.5, 1),
        (0.25, 0.25, 2),
        (0.13, 0.25, 3),
        (0.11, 0.25, 2),
        (0.125, 0.5, 3),
        (0.3, 1.0, 2),
    ],
)
def test_boxes_lie_over_the_pixels_of_their_nuclei(tmp_path, image_mpp, mpp, levels):
    scale = mpp / image_mpp  # level-0 px per patch px
    width, height = 803, 701  # odd, so that the levels are rounded
    wide = max(1, scale / 2)
    image, truth = discs(width, height, 60, seed=1, radius=(6 * wide, 10 * wide), gap=12 * wide)
    path = write_image(tmp_path / "he.tif", image, levels)
    polygons = shapely.buffer(shapely.points(truth[:, :2] * image_mpp), truth[:, 2] * image_mpp, quad_segs=32)
    boxes, centroids = boxes_from_polygons(polygons, np.diag([1 / image_mpp, 1 / image_mpp, 1]), image_mpp, mpp)
    nuclei = SlideBoxes(boxes, centroids, np.zeros(len(boxes), np.int8))
    size = 64
    half = ALL.model_copy(update={"stride": 0.5})
    grid = patch_grid(
        (width, height), image_mpp, nuclei, size=size, mpp=mpp, tissue=everywhere(width, height), settings=half, seed=0
    )
    found = []
    with open_pyramid(path) as slide:
        for patch in range(len(grid)):
            pixels = read_patch(slide, grid, *grid.corners[patch].tolist())
            for nucleus in grid.nuclei_of(patch):
                box = boxes[nucleus] - np.tile(grid.corners[patch], 2)
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
    rng = np.random.default_rng(0)
    path = write_image(tmp_path / "he.tif", rng.integers(0, 256, (200, 200, 3)))
    grid = grid_of((200, 200), make_nuclei([]), ratio=1.37, size=32)
    whole = grid_of((200, 200), make_nuclei([]), ratio=1.37, size=64)
    with open_pyramid(path) as slide:
        large = read_patch(slide, whole, 0, 0)
        for x, y in [(0, 0), (32, 0), (0, 32), (32, 32)]:
            small = read_patch(slide, grid, x, y)
            difference = np.abs(large[y : y + 32, x : x + 32].astype(int) - small)
            assert difference.max() <= 1  # rounding of the filter


def test_shrinking_does_not_alias(tmp_path):
    # stripes of one pixel must turn grey and not become stripes of another width
    stripes = np.zeros((256, 256, 3))
    stripes[:, ::2] = 255
    path = write_image(tmp_path / "he.tif", stripes)
    grid = grid_of((256, 256), make_nuclei([]), ratio=3.3, size=64)
    with open_pyramid(path) as slide:
        inner = read_patch(slide, grid, 0, 0)[4:-4, 4:-4]
    assert inner.min() > 110
    assert inner.max() < 145


def test_the_cut_is_the_same_for_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    path = write_image(tmp_path / "he.tif", rng.integers(0, 256, (600, 900, 3)), levels=2)
    low = rng.uniform(0, 550, (300, 2))
    nuclei = make_nuclei(np.concatenate([low, low + rng.uniform(2, 20, (300, 2))], axis=1), rng.integers(-1, 2, 300))
    grid = grid_of((900, 600), nuclei, ratio=1.1, size=32, chosen=ALL.model_copy(update={"stride": 0.5}))
    stores = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.zarr"
        cut_patches(
            path, grid, nuclei, out, classes=("a", "b"), source="s", group="g", tissue="t", attrs={}, workers=workers
        )
        stores.append(open_store(out))
    one, three = stores
    assert len(one) == len(grid) > 1000
    assert np.array_equal(one.images(range(len(one))), three.images(range(len(three))))
    assert np.array_equal(one.boxes, three.boxes)
    assert one.patches.equals(three.patches)
    with open_pyramid(path) as slide:
        for patch in (0, 70, len(grid) - 1):
            assert np.array_equal(one.read(patch).image, read_patch(slide, grid, *grid.corners[patch].tolist()))
    assert np.array_equal(one.patches[["x", "y"]], np.rint(grid.corners * 1.1).astype(int))


def test_a_damaged_tile_stops_the_cut_and_leaves_no_store(tmp_path):
    path = write_image(tmp_path / "he.tif", np.full((256, 256, 3), 200))
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages[0].dataoffsets[9]
    path.write_bytes(path.read_bytes()[:end])
    grid = grid_of((256, 256), make_nuclei([]))
    with pytest.raises(InputError, match="row 2, column 1"):
        cut_patches(path, grid, make_nuclei([]), tmp_path / "x.zarr", classes=("a",), source="", group="", tissue="",
                attrs={}, workers=2)  # fmt: skip
    assert not (tmp_path / "x.zarr").exists()


@settings(max_examples=60, deadline=None)
@given(
    stride=st.sampled_from([1.0, 0.5, 0.3]),
    ratio=st.sampled_from([1.0, 0.9131, 1.25]),
    seed=st.integers(0, 1000),
    min_nuclei=st.integers(0, 3),
    min_labelled=st.integers(0, 2),
)
def test_patches_have_the_nuclei_whose_centre_is_inside(stride, ratio, seed, min_nuclei, min_labelled):
    rng = np.random.default_rng(seed)
    width, height, size = 150, 110, 32
    low = rng.uniform(-10, 170, (40, 2))
    nuclei = make_nuclei(np.concatenate([low, low + rng.uniform(1, 9, (40, 2))], axis=1), rng.integers(-1, 3, 40))
    chosen = PatchSettings(stride=stride, min_tissue=0, min_nuclei=min_nuclei, min_labelled=min_labelled)
    grid = grid_of((width, height), nuclei, ratio=ratio, size=size, chosen=chosen)
    step = round(stride * size)
    expected = {}
    for y in range(0, int(height / ratio) - size + 1, step):
        for x in range(0, int(width / ratio) - size + 1, step):
            inside = ((nuclei.centres >= [x, y]) & (nuclei.centres < [x + size, y + size])).all(axis=1)
            if inside.sum() >= min_nuclei and (nuclei.labels[inside] >= 0).sum() >= min_labelled:
                expected[x, y] = np.flatnonzero(inside).tolist()
    got = {tuple(corner): grid.nuclei_of(i).tolist() for i, corner in enumerate(grid.corners.tolist())}
    assert got == expected
    assert len(grid) == len(expected)


def test_a_centre_on_the_border_is_in_one_patch():
    nuclei = make_nuclei([[30, 30, 34, 34], [30, 8, 34, 12], [-4, -4, 4, 4]])
    grid = grid_of((64, 64), nuclei)
    members = {tuple(c): grid.nuclei_of(i).tolist() for i, c in enumerate(grid.corners.tolist())}
    assert members == {(0, 0): [2], (32, 0): [1], (0, 32): [], (32, 32): [0]}


def test_every_patch_of_the_grid_is_accounted_for():
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 600, (400, 2))
    nuclei = make_nuclei(np.concatenate([low, low + 8], axis=1), rng.integers(-1, 2, 400))
    half = everywhere(640, 640)
    half.inside[:, 20:] = False
    chosen = PatchSettings(min_tissue=0.5, min_nuclei=1, min_labelled=1, max_patches=25)
    grid = grid_of((640, 640), nuclei, chosen=chosen, tissue=half, imaged=everywhere(640, 400))
    assert len(grid) == 25
    assert sum(grid.passed_over.values()) + 25 == 20 * 20
    assert grid.passed_over["beyond the imaged area"] == 20 * 8  # 400 px: 12.5 patches, and the half one is beyond
    assert grid.passed_over["with too little tissue"] == 10 * 12
    assert grid.corners[:, 0].max() < 320
    again, other = (
        grid_of((640, 640), nuclei, chosen=chosen, tissue=half, imaged=everywhere(640, 400), seed=seed)
        for seed in (0, 1)
    )
    assert np.array_equal(grid.corners, again.corners)
    assert not np.array_equal(grid.corners, other.corners)


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(InputError, match="at least one patch"):
        grid_of((30, 100), make_nuclei([]))


def test_boxes_follow_any_affine_and_bad_polygons_are_not_a_number():
    turn = np.array([[0.6, -0.8, 5], [0.8, 0.6, 7], [0, 0, 1.0]])
    square = shapely.box(0, 0, 10, 5)
    line = shapely.Polygon([(0, 0), (1, 1), (2, 2)])
    flat = shapely.Polygon([(0, 0), (3, 0), (3, 0)])
    bow = shapely.Polygon([(0, 0), (4, 4), (4, 0), (0, 4)])
    boxes, centroids = boxes_from_polygons([square, line, shapely.Polygon(), flat, square, bow], turn, 0.5, 0.25)
    corners = np.array([[0, 0], [10, 0], [10, 5], [0, 5]]) @ turn[:2, :2].T + turn[:2, 2]
    expected = np.concatenate([corners.min(axis=0), corners.max(axis=0)]) * 2
    assert np.allclose(boxes[[0, 4]], expected)
    assert np.allclose(centroids[0], corners.mean(axis=0) * 2)
    assert np.isnan(boxes[[1, 2, 3]]).all()
    assert np.isnan(centroids[[1, 2, 3]]).all()
    assert boxes_from_polygons([], turn, 0.5, 0.25)[0].shape == (0, 4)


def test_nuclei_at_the_rim_are_clipped_and_their_centroids_with_them(tmp_path):
    path = write_image(tmp_path / "he.tif", np.full((64, 64, 3), 200))
    nuclei = SlideBoxes(
        np.array([[28, 10, 34, 20.0], [-3, 2, 5, 6]]), np.array([[33.9, 12.0], [-0.5, 4]]), np.array([1, -1], np.int8)
    )
    grid = grid_of((64, 64), nuclei)
    cut_patches(
        path, grid, nuclei, tmp_path / "x.zarr", classes=("a", "b"), source="s", group="g", tissue="t", attrs={}
    )
    store = open_store(tmp_path / "x.zarr")  # a centroid outside of its box is an error of the store
    assert store.boxes.tolist() == [[28, 10, 32, 20], [0, 2, 5, 6]]
    assert store.labels.tolist() == [1, -1]
    assert store.centroids.tolist() == [[32, 12], [0, 4]]


@pytest.mark.parametrize("values", [{"stride": 0}, {"stride": 1.5}, {"min_tissue": 2}, {"max_patches": 0}, {"n": 1}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        PatchSettings.from_dict(values)


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
