"""Detection over a slide: every nucleus once, whatever the tiles, at its place; and only where there is tissue."""

import geopandas
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from slide_files import damage_tiles, whole_tissue, write_image
from small_model import small_model

from celldetr.inference.detection import Tiling, _Findings, detect_slide, model_detector, write_nuclei
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.slides.outlines import read_nucleus_file

PINK, WHITE, DARK = (225, 170, 205), (245, 245, 245), (60, 40, 120)


def draw(width, height, seed=0, spacing=22):
    """Draw dark discs on pink; the image and their boxes (n, 4)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(spacing, width - 12, spacing), np.arange(spacing, height - 12, spacing)), -1)
    centres = grid.reshape(-1, 2) + rng.integers(-4, 5, (grid.size // 2, 2)) + 0.5
    image = np.full((height, width, 3), PINK, np.uint8)
    boxes = []
    for x, y in centres:
        r = int(rng.integers(3, 6))
        rows, columns = np.mgrid[int(y) - r : int(y) + r + 1, int(x) - r : int(x) + r + 1]
        inside = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= (r + 0.3) ** 2
        image[rows[inside], columns[inside]] = DARK
        boxes.append([columns[inside].min(), rows[inside].min(), columns[inside].max() + 1, rows[inside].max() + 1])
    return image, np.array(boxes, float)


def find_dark(images):
    """Find what is dark in each image, cut off at its edge as a detector would see it."""
    found = []
    for image in images:
        pieces, _ = ndimage.label(image[..., 1] < 100, np.ones((3, 3)))
        spans = ndimage.find_objects(pieces)
        boxes = np.array([[x.start, y.start, x.stop, y.stop] for y, x in spans], float).reshape(-1, 4)
        found.append((boxes, np.linspace(0.5, 1, len(boxes))))
    return found


def in_order(boxes):
    return boxes[np.lexsort(boxes.T[:2])]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    image, boxes = draw(331, 287)
    return write_image(tmp_path_factory.mktemp("slide") / "slide.tif", image), boxes


def detect(path, tiling, *, mpp=1.0, find=find_dark, batch_size=4, workers=1, on_damage="stop"):
    options = {"slide": "s", "slide_mpp": mpp, "batch_size": batch_size, "on_damage": on_damage, "workers": workers}
    boxes, _ = detect_slide(path, find, tiling, **options)
    return boxes


@settings(max_examples=15, deadline=None)
@given(st.integers(40, 200), st.integers(12, 19), st.integers(1, 5), st.integers(1, 2))
def test_each_nucleus_is_found_once_whatever_the_tiles(slide, size, margin, batch, workers):
    path, truth = slide
    tiling = Tiling(size, 1.0, margin)
    found = detect(path, tiling, batch_size=batch, workers=workers)
    np.testing.assert_array_equal(in_order(found), in_order(truth))


@settings(max_examples=40, deadline=None)
@given(st.integers(30, 90), st.integers(4, 14), st.integers(0, 10_000))
def test_tiles_that_do_not_agree_on_the_place_count_each_nucleus_once(size, margin, seed):
    rng = np.random.default_rng(seed)
    tiling = Tiling(size, 1.0, margin)
    _, truth = draw(200, 180, seed)
    overlap = truth[:6] + rng.uniform(3, 4, (6, 1))  # nuclei that lie over others
    truth = np.concatenate([truth, overlap])
    findings = _Findings(tiling, np.array([200.0, 180.0]))
    tiles = tiling.grid((200, 180), 1.0, whole_tissue(200, 180)).corners
    for tile, corner in enumerate(tiles):
        boxes = truth - np.tile(corner, 2)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        seen = ((centres > 0) & (centres < size)).all(axis=1)
        shaken = boxes[seen] + rng.uniform(-0.12, 0.12, (int(seen.sum()), 4)) * margin / 4
        findings.add(tile, corner, shaken, np.ones(len(shaken)))
    boxes, _ = findings.unique()
    assert len(boxes) == len(truth)
    nearest = np.abs(boxes[:, None] - truth).max(axis=2)
    assert (nearest.min(axis=0) <= 0.5).all()


FOUR = Tiling(48, 1.0, 8), [[-8, -8], [24, -8], [-8, 24], [24, 24]]  # tiles whose cores meet at 32, 32
TWO = Tiling(96, 1.0, 24), [[0, -24], [48, -24]]  # tiles whose cores meet at 72


@pytest.mark.parametrize(
    ("tiling", "corners", "truth"),
    [
        (*FOUR, [[28, 28, 36, 36]]),
        (*TWO, [[60, 30, 80, 50], [64, 30, 84, 50]]),  # over each other, on either side of the border
        (*TWO, [[54, 30, 74, 50], [57, 30, 77, 50]]),  # and on one side of it
    ],
)
def test_nuclei_at_the_border_of_cores_count_once_each(tiling, corners, truth):
    findings = _Findings(tiling, np.array([200.0, 96.0]))
    for tile, corner in enumerate(np.array(corners)):
        findings.add(tile, corner, truth - np.tile(corner, 2) + 0.1 * tile, np.ones(len(truth)))
    found, _ = findings.unique()
    np.testing.assert_allclose(in_order(found), truth, atol=0.4)


def test_glass_is_not_looked_at(tmp_path):
    image, boxes = draw(800, 400)
    image[:, 400:] = WHITE
    path = write_image(tmp_path / "slide.tif", image)
    seen = []

    def find(images):
        seen.extend(images)
        return find_dark(images)

    tiling = Tiling.of(64, 2.0, 28.0)
    found = detect(path, tiling, mpp=2.0, find=find)
    left = boxes[boxes[:, 2] <= 400]
    np.testing.assert_array_equal(in_order(found[found[:, 2] < 395]), in_order(left[left[:, 2] < 395]))
    assert not any((tile == WHITE).all() for tile in seen)
    with pytest.raises(ConfigError, match="margin_um"):
        Tiling.of(64, 2.0, 64.0)


def test_boxes_are_px_of_level_0(tmp_path):
    image, boxes = draw(200, 200)
    path = write_image(tmp_path / "slide.tif", image.repeat(2, axis=0).repeat(2, axis=1))
    found = detect(path, Tiling(64, 1.0, 16), mpp=0.5)
    assert np.abs(in_order(found) - in_order(boxes * 2)).max() <= 2  # a px of the tiles


def test_what_was_found_is_read_again(tmp_path):
    _, boxes = draw(400, 400)
    for count in (len(boxes), 0):
        scores = np.linspace(0, 1, count)
        write_nuclei(tmp_path / "n.parquet", boxes[:count], scores)
        found = read_nucleus_file(tmp_path / "n.parquet", image_mpp=0.5, mpp=0.5)
        np.testing.assert_allclose(found.nuclei.boxes, boxes[:count])
        np.testing.assert_allclose(geopandas.read_parquet(tmp_path / "n.parquet")["score"], scores, rtol=1e-6)


def test_damaged_tiles_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    image, truth = draw(512, 256)
    path = write_image(tmp_path / "slide.tif", image, levels=4, compression="deflate")
    damage_tiles(path, [(0, 0)])
    tiling = Tiling(64, 1.0, 14)
    with pytest.raises(InputError, match=r"slide\.tif.*row 0, column 0"):
        detect(path, tiling)
    found = detect(path, tiling, batch_size=3, workers=2, on_damage="skip")
    assert f"{15 * 8 - 9} tiles, 9 tiles damaged" in caplog.text  # all whose margins reach it
    far = truth[(truth[:, :2] > 108).any(axis=1)]  # outside of the cores of those tiles
    assert {tuple(box) for box in far} <= {tuple(box) for box in found}


def test_a_model_finds_what_it_predicts():
    model = small_model("sequential")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    expected = model.predict(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, 0.0)
    for (boxes, scores), one in zip(model_detector(model, 0.0, "cpu")(images), expected, strict=True):
        np.testing.assert_allclose(boxes, one.boxes.numpy(), rtol=1e-6)
        np.testing.assert_allclose(scores, one.nucleus_score.numpy(), rtol=1e-6)
