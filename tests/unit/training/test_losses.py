"""Losses of supervised training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import match, random_detections
from torch.nn import functional

from celldetr.config.experiment import LossSettings
from celldetr.training.data import Targets
from celldetr.training.losses import class_loss, class_weights, detection_losses, focal, weighted

WEIGHTS = LossSettings()


def case(counts=(2, 0, 3), layers=2, classes=1):
    logits, boxes, targets = random_detections(counts, queries=5, classes=classes, layers=layers)
    return logits.requires_grad_(), boxes.requires_grad_(), targets


def test_focal_loss_of_known_numbers():
    got = focal(torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 1.0]))
    p = [1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0)]
    expected = [
        0.25 * (1 - p[0]) ** 2 * -math.log(p[0]),
        0.75 * p[1] ** 2 * -math.log(1 - p[1]),
        0.25 * (1 - p[2]) ** 2 * -math.log(p[2]),
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_is_finite_far_out():
    logits = torch.tensor([-200.0, 200.0, 200.0, -200.0], requires_grad=True)
    loss = focal(logits, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert loss.tolist() == pytest.approx([50.0, 150.0, 0.0, 0.0], rel=1e-4)


def test_perfect_boxes_cost_nothing():
    logits, _, targets = case()
    boxes = torch.full((2, 3, 5, 4), 0.5)
    boxes[:, :, :3] = targets.boxes
    found = match(logits, boxes, targets)
    losses = detection_losses(logits, boxes, targets, found, 5.0)
    assert float(losses["l1"].abs().sum()) == pytest.approx(0, abs=1e-6)
    assert float(losses["giou"].abs().sum()) == pytest.approx(0, abs=1e-5)


def test_losses_of_a_batch_are_sums_over_its_images():
    logits, boxes, targets = case(classes=3)
    found = match(logits, boxes, targets)
    together = detection_losses(logits, boxes, targets, found, 5.0)
    for name, value in together.items():
        parts = 0
        for image in range(3):
            one = Targets(*(x[image : image + 1] for x in vars(targets).values()))
            cut = logits[:, image : image + 1], boxes[:, image : image + 1], one
            alone = match(*cut)
            parts = parts + detection_losses(*cut, alone, 5.0)[name]
        assert torch.allclose(value, parts, atol=1e-6), name


def test_queries_without_a_nucleus_are_pushed_down_and_matched_ones_up():
    logits, boxes, targets = case(layers=1)
    found = match(logits, boxes, targets)
    weighted(detection_losses(logits, boxes, targets, found, 5.0), WEIGHTS).backward()
    up = torch.zeros_like(logits, dtype=torch.bool)
    layer, image, box = (found >= 0).nonzero().T
    up[layer, image, found[layer, image, box]] = True
    assert (logits.grad[up] < 0).all()
    assert (logits.grad[~up] > 0).all()
    unmatched = ~up.squeeze(-1)
    assert (boxes.grad[unmatched] == 0).all()


def test_unlabelled_nuclei_count_for_detection_and_not_for_classes():
    logits, boxes, targets = case(counts=(2,), layers=1, classes=3)
    unlabelled = replace(targets, labels=torch.full_like(targets.labels, -1))
    found = match(logits, boxes, unlabelled)
    losses = detection_losses(logits, boxes, unlabelled, found, 2.0)
    assert losses["l1"].item() > 0
    losses["nucleus"].sum().backward()
    assert (logits.grad[0, 0, found[0, 0]] == 0).all()
    assert (logits.grad[0, 0].sum(dim=-1) > 0).sum() == 3


def test_class_loss_is_the_mean_over_classes_summed_over_labelled_nuclei():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 4, -1], [2, -1, -1]])
    expected = sum(
        focal(logits[i, j], functional.one_hot(labels[i, j], 5).float()).mean() for i, j in ((0, 0), (0, 1), (1, 0))
    )
    assert float(class_loss(logits, labels, 4.0)) == pytest.approx(float(expected) / 4)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1, 5)])
def test_class_loss_without_labels_is_zero_with_a_zero_gradient(shape):
    logits = torch.randn(shape, requires_grad=True)
    loss = class_loss(logits, torch.full(shape[:-1], -1), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_weights_are_those_of_the_settings():
    losses = {name: torch.tensor([1.0, 1.0]) for name in ("nucleus", "l1", "giou")} | {"classes": torch.tensor(1.0)}
    assert float(weighted(losses, WEIGHTS)) == pytest.approx(2 * (2 + 5 + 2) + 1.6)


@given(st.lists(st.integers(-1, 4), max_size=60), st.sampled_from([0.0, 0.5, 1.0]))
def test_class_weights_keep_the_sum_and_favour_the_rare(labels, exponent):
    labels = np.array(labels, dtype=np.int8)
    weights = np.array(class_weights(labels, 5, exponent))
    known = labels[labels >= 0]
    if len(known):
        assert weights[known].mean() == pytest.approx(1)
        counts = np.bincount(known, minlength=5)
        present = counts > 0
        assert (np.diff(weights[present][np.argsort(counts[present], kind="stable")]) <= 1e-9).all()
        if exponent == 1:
            assert np.ptp((weights * counts)[present]) == pytest.approx(0, abs=1e-9)


def test_class_loss_takes_the_weights():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, -1, 1, 0])
    one = [float(class_loss(logits[[i]], labels[[i]], 1.0)) for i in range(6)]
    weighted = float(class_loss(logits, labels, 2.0, torch.tensor([2.0, 0.5, 1.0])))
    expected = (2 * one[0] + 0.5 * one[1] + one[2] + 0.5 * one[4] + 2 * one[5]) / 2
    assert weighted == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_what_else_is_found_is_no_mistake_in_an_image_that_is_not_complete(classes):
    """Queries without a match have no loss there; matched ones, and all of the other images, have the same."""
    logits, boxes, targets = case(classes=classes)
    found = match(logits, boxes, targets)
    partial = replace(targets, complete=torch.tensor([False, False, True]))
    whole, some = (detection_losses(logits, boxes, nuclei, found, 1.0) for nuclei in (targets, partial))
    gradients = [torch.autograd.grad(losses["nucleus"].sum(), logits)[0] for losses in (whole, some)]
    matched = torch.zeros(logits.shape[:3], dtype=torch.bool)
    for layer, image, _, query in zip(*torch.nonzero(found >= 0).T, found[found >= 0], strict=True):
        matched[layer, image, query] = True
    kept = matched | targets.complete.new_tensor([False, False, True])[:, None]
    assert torch.equal(gradients[1], gradients[0] * kept[..., None])
    assert (gradients[0] != 0).all()
    assert all(torch.equal(whole[name], some[name]) for name in ("l1", "giou"))
