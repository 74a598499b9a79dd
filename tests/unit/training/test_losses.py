"""Losses of supervised training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from celldetr.config.experiment import LossSettings, MatchingSettings
from celldetr.training.data import Targets
from celldetr.training.losses import class_loss, class_weights, detection_losses, focal, weighted
from celldetr.training.matching import Matches, Matching

WEIGHTS = LossSettings()


def match(logits, boxes, targets):
    return Matching(logits, boxes, targets, MatchingSettings()).result()


def case(counts=(2, 0, 3), layers=2, queries=5, classes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slots = max(1, *counts)

    def boxes(*shape):
        values = torch.rand(*shape, 4, generator=generator)
        return torch.cat([values[..., :2] * 0.8 + 0.1, values[..., 2:] * 0.2 + 0.02], dim=-1)

    logits = torch.randn(layers, len(counts), queries, classes, generator=generator).requires_grad_()
    labels = torch.randint(classes, (len(counts), slots), generator=generator)
    labels[torch.arange(slots) >= torch.tensor(counts)[:, None]] = -1
    predicted = boxes(layers, len(counts), queries).requires_grad_()
    return logits, predicted, Targets(boxes(len(counts), slots), labels, torch.tensor(counts))


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
    found = match(logits.detach(), boxes, targets)
    losses = detection_losses(logits, boxes, targets, found, 5.0)
    assert float(losses["l1"].abs().sum()) == pytest.approx(0, abs=1e-6)
    assert float(losses["giou"].abs().sum()) == pytest.approx(0, abs=1e-5)


def test_losses_of_a_batch_are_sums_over_its_images():
    logits, boxes, targets = case(classes=3)
    found = match(logits.detach(), boxes.detach(), targets)
    together = detection_losses(logits, boxes, targets, found, 5.0)
    for name, value in together.items():
        parts = 0
        for image in range(3):
            one = Targets(*(x[image : image + 1] for x in (targets.boxes, targets.labels, targets.counts)))
            cut = logits[:, image : image + 1], boxes[:, image : image + 1], one
            alone = match(cut[0].detach(), cut[1].detach(), one)
            parts = parts + detection_losses(*cut, alone, 5.0)[name]
        assert torch.allclose(value, parts, atol=1e-6), name


def test_queries_without_a_nucleus_are_pushed_down_and_matched_ones_up():
    logits, boxes, targets = case(layers=1)
    found = match(logits.detach(), boxes.detach(), targets)
    weighted(detection_losses(logits, boxes, targets, found, 5.0), WEIGHTS).backward()
    up = torch.zeros_like(logits, dtype=torch.bool)
    up[found.layer, found.image, found.query] = True
    assert (logits.grad[up] < 0).all()
    assert (logits.grad[~up] > 0).all()
    unmatched = ~up.squeeze(-1)
    assert (boxes.grad[unmatched] == 0).all()


def test_unlabelled_nuclei_count_for_detection_and_not_for_classes():
    logits, boxes, targets = case(counts=(2,), layers=1, classes=3)
    unlabelled = Targets(targets.boxes, torch.full_like(targets.labels, -1), targets.counts)
    found = match(logits.detach(), boxes.detach(), unlabelled)
    losses = detection_losses(logits, boxes, unlabelled, found, 2.0)
    assert losses["l1"].item() > 0
    losses["nucleus"].sum().backward()
    assert (logits.grad[0, 0, found.query] == 0).all()
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


def test_images_without_nuclei_have_a_finite_loss_and_gradient():
    logits, boxes, targets = case(counts=(0, 0))
    losses = detection_losses(logits, boxes, targets, match(logits, boxes, targets), 1.0)
    weighted(losses, WEIGHTS).backward()
    assert logits.grad.isfinite().all()
    assert boxes.grad is not None
    assert (boxes.grad == 0).all()


def test_weights_are_those_of_the_settings():
    losses = {name: torch.tensor([1.0, 1.0]) for name in ("nucleus", "l1", "giou")} | {"classes": torch.tensor(1.0)}
    assert float(weighted(losses, WEIGHTS)) == pytest.approx(2 * (2 + 5 + 2) + 1.6)


def test_half_precision_logits_give_losses_in_full_precision():
    logits, boxes, targets = case()
    found = Matches(*(torch.zeros(1, dtype=torch.long) for _ in range(4)))
    losses = detection_losses(logits.bfloat16(), boxes, targets, found, 1.0)
    assert {value.dtype for value in losses.values()} == {torch.float32}


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
