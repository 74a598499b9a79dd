"""Micro-Net: its targets, weights and post-processing against direct counts, and that it learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_nuclei import check_nuclei, discs, planted, system_settings, train_steps
from numpy.random import default_rng
from scipy import ndimage

from celldetr.runtime.errors import ConfigError
from celldetr.segmentation.micro_net import MicroNet, border_weights, pixels_to_nuclei, without_rims
from celldetr.segmentation.nuclei import nuclei_of_map

TOUCHING = discs((14, 16, 9), (30, 16, 9), (30, 34, 10), (62, 60, 8), (2, 50, 7))


@pytest.fixture
def system():
    torch.manual_seed(0)
    return MicroNet(system_settings("micro_net"))


def probabilities(classes, outputs):
    """One-hot (outputs, S, S) of a map of classes, 0 the background."""
    return np.moveaxis(np.eye(outputs, dtype=np.float32)[classes], -1, 0)


def test_rims_are_the_pixels_beside_another_id():
    instances = default_rng(0).choice([0, 0, 1, 1, 1, 1, 2], (2, 12, 9)).repeat(3, axis=1)
    expected = np.zeros_like(instances)
    for b, y, x in np.ndindex(instances.shape):
        beside = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        beside = [instances[b, j, i] for j, i in beside if 0 <= j < instances.shape[1] and 0 <= i < instances.shape[2]]
        if all(other == instances[b, y, x] for other in beside):
            expected[b, y, x] = instances[b, y, x]
    np.testing.assert_array_equal(without_rims(torch.from_numpy(instances)), expected)
    assert expected.any()


def test_touching_nuclei_come_back_from_perfect_pixels():
    _, truth = planted(TOUCHING)
    target = torch.where(without_rims(truth.instances) > 0, truth.classes, 0)[0].numpy()
    found = nuclei_of_map(*pixels_to_nuclei(probabilities(target, 4)), 10)
    assert len(found.boxes) == 5
    for (left, top, right, bottom), mask, shares in zip(found.boxes.astype(int), found.masks, found[3], strict=True):
        painted = np.zeros(TOUCHING.shape, dtype=bool)
        painted[top:bottom, left:right] = mask
        number = np.bincount(TOUCHING[painted]).argmax()
        own = number == TOUCHING
        assert (own & painted).sum() > 0.9 * (own | painted).sum()
        assert shares.tolist() == np.eye(3)[(number - 1) % 3].tolist()
    assert found.nucleus_score == pytest.approx(1), "the rim counts with the probability inside"


def test_holes_are_filled_but_nuclei_in_them_stay():
    ring = discs((32, 32, 28)) - discs((32, 32, 20)) + discs((32, 32, 8))
    ring[5:7, 31:33] = 0
    instances, *_ = pixels_to_nuclei(probabilities(ring, 2))
    assert instances[6, 32] == instances[4, 32] == instances[20, 32] != 0
    assert instances[32, 32] not in (0, instances[4, 32])
    assert (instances > 0).sum() == ndimage.binary_dilation(discs((32, 32, 28)) > 0).sum()


def test_weights_are_those_of_u_net():
    near, far = discs((20, 20, 5), (34, 20, 5)), discs((0, 0, 3), (60, 60, 3))
    maps = np.stack([TOUCHING, discs(), discs((20, 20, 5)), far, near])
    found = border_weights(torch.from_numpy(maps)).numpy()
    for instances, weights in zip(maps, found, strict=True):
        distances = [ndimage.distance_transform_edt(instances != k) for k in range(1, 1 + instances.max())]
        nearest = np.sort([*distances, *np.full((2, *instances.shape), np.inf)], axis=0)[:2]
        expected = 1 + 10 * np.exp(-(nearest.sum(axis=0) ** 2) / 50) * (instances == 0)
        near = nearest[1] <= 15
        np.testing.assert_allclose(weights[near], expected[near], rtol=1e-5)
        assert (np.abs(weights - expected)[~near] < 0.12).all()
    assert found[0].max() > 8, "the gap between touching nuclei counts most"
    assert (found[1:4] == 1).all()


def test_auxiliary_losses_fade_with_the_epochs(system):
    images, truth = planted(TOUCHING)
    values = []
    for epoch in (1, 4):
        system.epoch = epoch
        torch.manual_seed(1)
        values.append({name: loss.item() for name, loss in system.train().losses(images, truth).items()})
    first, fourth = values
    assert list(first) == ["main", "auxiliary_1", "auxiliary_2", "auxiliary_3"]
    for name, value in first.items():
        assert fourth[name] == pytest.approx(value / (1 if name == "main" else 4), rel=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (50, 50), (33, 70)])
def test_pixels_are_those_of_the_image(system, size):
    for training, outputs in ((False, 1), (True, 4)):
        logits = system.train(training)(torch.rand(2, 3, *size))
        assert [tuple(values.shape) for values in logits] == [(2, 4, *size)] * outputs


def test_it_learns_and_finds_what_was_planted(system):
    images, truth = planted(TOUCHING)
    losses = train_steps(system, images, truth, 50, lr=5e-3)
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        [found] = system.eval().segment(images)
    check_nuclei(found, 64, 3)
    assert len(found.boxes) == 5
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    nearest = []
    for y, x in ndimage.find_objects(TOUCHING):
        distance = np.hypot(*(centres - [(x.start + x.stop) / 2, (y.start + y.stop) / 2]).T)
        assert distance.min() < 2
        nearest.append(distance.argmin())
    assert (found.class_scores[nearest].argmax(axis=1) == truth.labels[0].numpy()).sum() >= 4


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_images_without_nuclei_or_contrast_are_legal(system, precision):
    images, truth = planted(discs(), discs())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        losses = system.train().losses(images, truth)
        sum(losses.values()).backward()
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert all(parameter.grad.isfinite().all() for parameter in system.parameters())
        with torch.no_grad():
            found = system.eval().segment(images)
        for nuclei in found:
            check_nuclei(nuclei, 64, 3)


def test_it_refuses_pretrained_weights(system):
    with pytest.raises(ConfigError, match="has no pretrained weights; set `initial: none`"):
        system.load_pretrained(Path("weights.pth"))
