"""Detections beside the true nuclei."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image
from planted_folds import detections

from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.colours import class_colours
from celldetr.report.overlays import choose_patches, overlays
from celldetr.report.style import save
from celldetr.runtime.errors import InputError

SIZE = 64


def predictions(n_patches, count=5):
    rng = np.random.default_rng(0)
    patch = np.repeat(np.arange(n_patches), count)
    low = rng.uniform(0, SIZE - 10, (len(patch), 2))
    labels = rng.integers(0, len(PANNUKE_CLASSES), len(patch))
    return detections(patch, np.concatenate([low, low + 9], axis=1), labels, n_patches, classes=PANNUKE_CLASSES)


def test_overlays_draw_every_box_of_the_chosen_patches(tmp_path):
    found = predictions(9)
    patches = np.array([1, 4, 5, 8])
    truth = [(np.array([[1, 1, 9, 9]] * k, dtype=np.float32).reshape(-1, 4), np.full(k, -1)) for k in range(4)]
    images = np.full((4, SIZE, SIZE, 3), 200, dtype=np.uint8)
    figure = overlays(images, patches, truth, found, title="a model")
    counts = [len(axis.patches) / 2 for axis in figure.axes]  # each box has a dark casing
    assert counts == [0, 5, 1, 5, 2, 5, 3, 5]
    assert {"a model", "patch 4: 1 true", "5 predicted", "no label", *PANNUKE_CLASSES} <= {
        text.get_text() for text in figure.findobj(Text)
    }
    save(figure, tmp_path / "overlays.png")
    with Image.open(tmp_path / "overlays.png") as picture:
        assert min(picture.size) > 500
    with pytest.raises(InputError, match="without patches"):
        overlays(images[:0], patches[:0], [], found, title="none")


def test_masks_are_drawn_as_outlines_around_their_pixels():
    """The second true nucleus has no pixels of its own."""
    boxes, labels = np.array([[4, 6, 12, 11], [20, 30, 24, 40]]), np.array([1, 0])
    masks = [np.ones((5, 8), dtype=bool), np.ones((10, 4), dtype=bool)]
    found = replace(detections(np.zeros(2, int), boxes, labels, 1, classes=PANNUKE_CLASSES), masks=masks)
    instances = np.zeros((1, SIZE, SIZE), dtype=np.uint16)
    instances[0, 6:11, 4:12], instances[0, 50:60, 50:] = 1, 3
    truth = [(np.array([[4, 6, 12, 11], [5, 7, 6, 8], [50, 50, 64, 60]], dtype=np.float32), np.array([1, 2, 0]))]
    images = np.full((1, SIZE, SIZE, 3), 200, dtype=np.uint8)
    figure = overlays(images, np.array([0]), truth, found, title="a model", instances=instances)
    left, right = figure.axes
    drawn = [[(*outline.get_paths()[0].get_extents().extents,) for outline in axis.collections] for axis in figure.axes]
    assert drawn == [[(4, 6, 12, 11), (50, 50, 64, 60)], [(4, 6, 12, 11), (20, 30, 24, 40)]]
    colours = [[tuple(*outline.get_edgecolor()) for outline in axis.collections] for axis in figure.axes]
    assert colours == [[to_rgba(class_colours(PANNUKE_CLASSES)[label]) for label in (1, 0)]] * 2
    assert not left.patches + right.patches


def test_patches_with_nuclei_are_chosen_first():
    box_ptr = np.cumsum([0, 0, 3, 0, 0, 1, 2, 0])
    assert choose_patches(box_ptr, 3, 0).tolist() == [1, 4, 5]
    assert set(choose_patches(box_ptr, 5, 0)) > {1, 4, 5}
    assert choose_patches(box_ptr, 99, 0).tolist() == list(range(7))
    assert choose_patches(np.array([0]), 3, 0).tolist() == []


def test_classes_have_colours_of_their_own():
    for classes in (PANNUKE_CLASSES, ST_TYPES):
        assert len(set(class_colours(classes))) == len(classes) + 1
