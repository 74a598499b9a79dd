"""Contrastive pretraining: the views, who sees whom, the loss, retrieval and spread."""

import math

import numpy as np
import pytest
import torch
from tiny_training import make_ssl_experiment
from torch.nn import functional

from celldetr.config.experiment import NoiseSettings
from celldetr.model.celldetr import CellDETR
from celldetr.training.contrastive import (
    ViewDraws,
    Views,
    contrastive_loss,
    found_own,
    make_views,
    project_views,
    similarities,
    spread,
)
from celldetr.training.data import Targets

NOISE = NoiseSettings(low=0.1, high=0.4)


def make_targets(counts, seed=0):
    """Nuclei of random size in the middle of the image, padded as `PatchData` does."""
    generator = torch.Generator().manual_seed(seed)
    slots = max(1, *counts)
    boxes = torch.tensor([0.5, 0.5, 1, 1]).repeat(len(counts), slots, 1)
    for row, count in enumerate(counts):
        draws = torch.rand(count, 4, generator=generator)
        boxes[row, :count] = torch.cat((0.2 + 0.6 * draws[:, :2], 0.1 + 0.2 * draws[:, 2:]), dim=1)
    complete = torch.ones(len(counts), dtype=torch.bool)
    return Targets(boxes, torch.full((len(counts), slots), -1), torch.tensor(counts), complete)


def views_of(counts, seed=0, *, once=False, slots=None):
    targets = make_targets(counts, seed)
    slots = slots or 2 * targets.labels.shape[1]
    uniforms = torch.rand(len(counts), slots, 9, generator=torch.Generator().manual_seed(seed + 1))
    return targets, lay_out(targets, uniforms, once=once)


def lay_out(targets, uniforms, *, once):
    filled = 2 * targets.counts if once else torch.full_like(targets.counts, uniforms.shape[1])
    return make_views(targets.boxes, ViewDraws(targets.counts, filled, uniforms), NOISE)


def test_anchors_fill_the_slots_and_every_nucleus_has_one():
    targets, views = views_of([3, 5, 0, 1])
    assert views.valid.sum(dim=1).tolist() == [10, 10, 0, 10]
    assert views.original.sum(dim=1).tolist() == [3, 5, 0, 1]
    for row, count in enumerate((3, 5, 0, 1)):
        taken = torch.bincount(views.nucleus[row][views.anchor[row]], minlength=count)
        assert len(taken) == count
        if count:
            assert taken.min() >= 1
            assert taken.max() - taken.min() <= 1  # they take turns
        assert torch.equal(views.boxes[row, :count], targets.boxes[row, :count])
    assert torch.equal(views.boxes[2], torch.tensor([0.5, 0.5, 1, 1]).repeat(10, 1))


def test_every_anchor_is_noised_and_keeps_its_centre_in_its_nucleus():
    _, views = views_of([6, 4], seed=3)
    own = views.boxes.gather(1, views.nucleus[..., None].expand(-1, -1, 4))
    moved, original = views.boxes[views.anchor], own[views.anchor]
    assert ((moved - original).abs() > 1e-3).any(dim=1).all()
    assert ((moved[:, :2] - original[:, :2]).abs() <= original[:, 2:] / 2).all()
    ratio = moved[:, 2:] / original[:, 2:]
    assert ((ratio - 1).abs() <= 0.4 + 1e-4).all()


def test_mask_is_the_one_of_the_paper():
    """2 nuclei, 2 anchors of them, and 2 slots of padding (an image beside it has 3)."""
    _, views = views_of([2, 3], once=True)
    x = [  # originals 0 and 1, anchors 2 and 3, padding 4 and 5
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert torch.equal(views.mask[0], torch.tensor(x, dtype=torch.bool))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    built = CellDETR(make_ssl_experiment({"dropout": 0.0, "representation": {"layers": 3, "positions": False}}).model)
    for name, parameter in built.named_parameters():
        if "self_attention" in name and parameter.dim() > 1:  # so that who sees whom matters
            torch.nn.init.normal_(parameter, std=0.5)
    return built.eval()


def features_of(model, count, seed=0):
    with torch.no_grad():
        return model.encode(torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def projected_of(model, features, views):
    with torch.no_grad():
        return project_views(model, features, views)


def changed(model, features, views, slot):
    """(B, S) bool: views whose embedding changes with the box of a slot of the first image."""
    boxes = views.boxes.clone()
    boxes[0, slot] = torch.tensor([0.3, 0.6, 0.5, 0.4])
    before, after = (projected_of(model, features, each) for each in (views, views._replace(boxes=boxes)))
    return ((before - after).abs() > 1e-5).any(dim=-1)


def test_an_anchor_changes_itself_alone_and_an_original_changes_all_of_its_image(model):
    features, (_, views) = features_of(model, 2), views_of([3, 4])
    assert changed(model, features, views, 5).nonzero().tolist() == [[0, 5]]
    by_original = changed(model, features, views, 1)
    assert by_original[0].all()
    assert not by_original[1].any()


def test_an_image_alone_gives_what_it_gives_beside_others_and_in_more_slots(model):
    features = features_of(model, 3)
    targets = make_targets([2, 5, 0])
    uniforms = torch.rand(3, 10, 9)
    together = lay_out(targets, uniforms, once=True)
    projected = projected_of(model, features, together)
    alone = lay_out(
        Targets(targets.boxes[:1, :2], targets.labels[:1, :2], targets.counts[:1], targets.complete[:1]),
        uniforms[:1, :4],
        once=True,
    )
    single = projected_of(model, features._replace(memory=features.memory[:1]), alone)
    assert torch.allclose(single[0], projected[0, :4], atol=1e-5)
    assert projected[~together.valid].isfinite().all()
    first = Views(*(values[:1] for values in together))
    one, all_ = (contrastive_loss(x, v, 0.1, "image") for x, v in ((single, alone), (projected[:1], first)))
    assert float(one) == pytest.approx(float(all_), rel=1e-5)


@pytest.mark.parametrize("negatives", ["image", "batch"])
@pytest.mark.parametrize("once", [True, False])
def test_loss_is_that_of_a_loop_over_images_and_anchors(negatives, once):
    _, views = views_of([3, 0, 5, 1], once=once)
    projected = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(7))
    unit = functional.normalize(projected.double(), dim=-1).numpy()
    counts = views.counts.tolist()
    everyone = [unit[row, j] for row, n in enumerate(counts) for j in range(n)]
    total = 0.0
    for row, n in enumerate(counts):
        terms = []
        for a in range(n, (2 * n if once else 10) if n else 0):
            others = [unit[row, j] for j in range(n)] if negatives == "image" else everyone
            exps = [math.exp(float(unit[row, a] @ other) / 0.2) for other in others]
            terms.append(-math.log(math.exp(float(unit[row, a] @ unit[row, a % n]) / 0.2) / sum(exps)))
        total += float(np.mean(terms)) if n >= 2 else 0.0
    assert float(contrastive_loss(projected, views, 0.2, negatives)) == pytest.approx(total, rel=1e-5)


def test_images_with_one_nucleus_or_none_have_no_loss_but_a_gradient_of_zero():
    for negatives in ("image", "batch"):
        _, views = views_of([0, 1, 0])
        projected = torch.randn(3, 2, 4, requires_grad=True)
        loss = contrastive_loss(projected, views, 0.1, negatives)
        loss.backward()
        assert float(loss.detach()) == 0
        assert torch.equal(projected.grad, torch.zeros_like(projected))


def test_padding_has_no_gradient_and_no_influence():
    _, views = views_of([2, 4], once=True)
    projected = torch.randn(2, 8, 4, requires_grad=True)
    loss = contrastive_loss(projected, views, 0.1, "batch")
    loss.backward()
    assert (projected.grad[~views.valid] == 0).all()
    other = torch.where(views.valid[..., None], projected.detach(), 1e3)
    assert float(contrastive_loss(other, views, 0.1, "batch")) == float(loss.detach())


def test_loss_is_computed_in_full_precision():
    _, views = views_of([5, 5])
    projected = torch.randn(2, 10, 16)
    rounded = projected.bfloat16()
    assert contrastive_loss(rounded, views, 0.1, "image").dtype == torch.float32
    same = contrastive_loss(rounded.float(), views, 0.1, "image")
    assert torch.equal(contrastive_loss(rounded, views, 0.1, "image"), same)


def test_retrieval_of_planted_embeddings():
    """Anchors equal their originals but for 2 of 7, which equal another one; a single nucleus does not count."""
    _, views = views_of([4, 3, 1, 0], once=True)
    projected = torch.zeros(4, 8, 8)
    projected[:, :4] = torch.eye(8)[:4]
    for row, count in enumerate((4, 3, 1)):
        projected[row, count : 2 * count] = 3 * projected[row, :count] + 0.1
    projected[0, 4], projected[1, 5] = projected[0, 1].clone(), projected[1, 0].clone()
    own = found_own(similarities(projected, views), views)
    assert views.compared.sum() == 7
    assert own.sum() == 5
    assert not own[0, 4]
    assert not own[1, 5]


def test_similarities_are_cosines_to_the_originals_of_the_image():
    _, views = views_of([2, 3], once=True)
    projected = torch.randn(2, 6, 4)
    found = similarities(projected, views)
    assert found.shape == (2, 6, 3)
    assert float(found[0, 2, 1]) == pytest.approx(float(functional.cosine_similarity(*projected[0, [2, 1]], dim=0)))
    assert (found[0, :, 2] == -2).all()


def test_spread_is_one_for_random_directions_and_zero_for_one():
    x = functional.normalize(torch.randn(4000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert spread(len(x), x.sum(0), x.square().sum(0)) == pytest.approx(1, abs=0.02)
    same = x[:1].expand(100, -1)
    assert spread(100, same.sum(0), same.square().sum(0)) == pytest.approx(0, abs=1e-6)
    near = functional.normalize(x + 20 * x[:1])
    assert 0.01 < spread(len(x), near.sum(0), near.square().sum(0)) < 0.1
