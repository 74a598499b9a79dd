"""Augmentation: boxes follow the image, and every process sees its share of the same images."""

import numpy as np
import pytest
import torch

from celldetr.config.experiment import AugmentationSettings
from celldetr.model.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from celldetr.training.augment import augment, draw
from celldetr.training.data import Targets

NONE = {"elastic": 0.0, "flip": 0.0, "blur": 0.0, "jitter": 0.0, "hed": 0.0}
SIZE = 96


def only(**chosen):
    return AugmentationSettings(**{**NONE, **chosen})


def scene(batch=6, seed=0):
    """Ellipses of a value of their own on black, with their boxes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    images = np.zeros((batch, 3, SIZE, SIZE), np.float32)
    boxes = np.zeros((batch, 4, 4), np.float32)
    for image in range(batch):
        for slot, centre in enumerate(((24, 24), (72, 24), (24, 72), (72, 72))):
            at, half = centre + rng.uniform(-8, 8, 2), rng.uniform(5, 11, 2)
            inside = ((x - at[0]) / half[0]) ** 2 + ((y - at[1]) / half[1]) ** 2 <= 1
            images[image, :, inside] = (slot + 1) / 4
            boxes[image, slot] = [*(at - half), *(at + half)]
    targets = Targets(
        xyxy_to_cxcywh(torch.from_numpy(boxes) / SIZE), torch.arange(4).expand(batch, 4), torch.full((batch,), 4)
    )
    return torch.from_numpy(images), targets


def seen_boxes(image):
    """Boxes of the connected bright regions."""
    from scipy.ndimage import find_objects, label

    regions = find_objects(label(image[0].numpy() > 0.12)[0])
    boxes = [[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in regions if s is not None]
    return torch.tensor(boxes, dtype=torch.float32) / SIZE


def iou(first, second):
    """Intersection over union of xyxy boxes (..., 4), one with one."""
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    first, second = ((boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second))
    return sides.prod(-1) / (first + second - sides.prod(-1))


@pytest.mark.parametrize("settings", [only(elastic=1.0), only(elastic=1.0, flip=0.5)])
def test_boxes_follow_what_is_in_the_image(settings):
    images, targets = scene(12)
    changed, moved = augment(images, targets, draw(settings, 0, 3, len(images)), settings)
    gain = []
    for image in range(len(images)):
        seen = seen_boxes(changed[image])
        assert len(seen) == 4
        stayed, best = (
            torch.stack([iou(box.expand_as(seen), seen).max() for box in cxcywh_to_xyxy(boxes)])
            for boxes in (targets.boxes[image], moved.boxes[image])
        )
        assert (best > 0.75).all(), best  # a pixel more or less of ten
        gain.append(float((best - stayed).mean()))
    assert np.mean(gain) > 0.03


def test_elastic_loses_no_nucleus_at_the_edge_and_keeps_sizes_positive():
    settings = only(elastic=1.0)
    corners = torch.tensor([[0, 0, 1, 1], [95, 95, 96, 96], [0, 40, 3, 50], [0, 0, 96, 96]], dtype=torch.float32)
    boxes = xyxy_to_cxcywh(corners / SIZE).expand(20, 4, 4).clone()
    targets = Targets(boxes, torch.zeros(20, 4, dtype=torch.long), torch.full((20,), 4))
    _, moved = augment(torch.rand(20, 3, SIZE, SIZE), targets, draw(settings, 1, 1, 20), settings)
    ends = cxcywh_to_xyxy(moved.boxes)
    assert (moved.boxes[..., 2:] > 0).all()
    assert (ends > -1e-6).all()
    assert (ends < 1 + 1e-6).all()
    assert (iou(cxcywh_to_xyxy(boxes[:, 3]), ends[:, 3]) > 0.98).all()


def test_flips_move_pixels_and_boxes_exactly():
    settings = only(flip=0.5)
    images, targets = scene(16)
    draws = draw(settings, 0, 0, 16)
    changed, moved = augment(images, targets, draws, settings)
    assert 0 < draws.flip_x.sum() < 16
    for image in range(16):
        flips = [axis for axis, on in ((-1, draws.flip_x[image]), (-2, draws.flip_y[image])) if on]
        assert torch.equal(changed[image], images[image].flip(flips))
        expected = targets.boxes[image].clone()
        for axis in flips:
            expected[:, -1 - axis] = 1 - expected[:, -1 - axis]
        assert torch.allclose(moved.boxes[image], expected)
    assert torch.equal(moved.labels, targets.labels)


@pytest.mark.parametrize("kind", ["blur", "jitter", "hed"])
def test_colour_changes_leave_boxes_alone_and_images_in_range(kind):
    settings = only(**{kind: 1.0}, hed_alpha=0.5, hed_beta=0.2)
    images, targets = torch.rand(4, 3, 40, 40), scene(4)[1]
    changed, moved = augment(images, targets, draw(settings, 0, 0, 4), settings)
    assert torch.equal(moved.boxes, targets.boxes)
    assert 0 <= float(changed.min()) < float(changed.max()) <= 1
    assert all(not torch.allclose(a, b) for a, b in zip(changed, images, strict=True))


def test_colour_changes_of_strength_zero_change_nothing():
    settings = only(jitter=1.0, hed=1.0, brightness=0, contrast=0, saturation=0, hue=0, hed_alpha=0, hed_beta=0)
    images, targets = torch.rand(4, 3, 20, 20) * 0.9 + 0.1, scene(4)[1]
    changed, _ = augment(images, targets, draw(settings, 0, 0, 4), settings)
    assert torch.allclose(changed, images, atol=2e-5)


def test_stain_jitter_changes_the_amount_of_stain():
    """Twice the hematoxylin is the square of what its colour lets through."""
    settings = only(hed=1.0)
    hematoxylin = torch.tensor([0.65, 0.70, 0.29])
    hematoxylin = hematoxylin / hematoxylin.norm()
    images = (10 ** (-0.3 * hematoxylin)).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    draws = draw(settings, 0, 0, 1)
    draws.stain[0] = [[2, 1], [0, 0]]
    targets = Targets(torch.full((1, 1, 4), 0.5), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    changed, _ = augment(images, targets, draws, settings)
    assert torch.allclose(changed, images**2, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_see_their_share_of_the_same_images(parts):
    settings = AugmentationSettings(elastic=0.5, blur=0.5, jitter=0.5, hed=0.5)
    images, targets = scene(8)
    draws = draw(settings, 7, 11, 8)
    whole, boxes = augment(images, targets, draws, settings)
    size = 8 // parts
    for part in range(parts):
        mine = slice(part * size, (part + 1) * size)
        cut = Targets(targets.boxes[mine], targets.labels[mine], targets.counts[mine])
        some, moved = augment(images[mine], cut, draws.of(mine), settings)
        assert torch.allclose(some, whole[mine], atol=1e-6)
        assert torch.allclose(moved.boxes, boxes.boxes[mine], atol=1e-6)


def test_probabilities_are_those_of_the_settings():
    draws = draw(AugmentationSettings(elastic=0.2, flip=0.5, blur=0.0, jitter=1.0), 0, 0, 4000)
    shares = [getattr(draws, name).mean() for name in ("elastic", "flip_x", "flip_y", "blur", "jitter")]
    assert shares == pytest.approx([0.2, 0.5, 0.5, 0, 1], abs=0.03)
