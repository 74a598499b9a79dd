"""What goes beyond the paper: mixed query selection, one-to-many layers, balanced classes, averaged weights."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import assert_same_result, make_experiment, make_split, make_store, stopping

from celldetr.errors import ConfigError
from celldetr.experiment import LossSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.checkpoints import load_model, read_checkpoint
from celldetr.model.position import anchor_boxes, box_code
from celldetr.training.average import WeightAverage
from celldetr.training.base import pixels
from celldetr.training.data import Batch, PatchData, Targets, TrainingBatches
from celldetr.training.denoising import noised_boxes, own_matches
from celldetr.training.errors import Interrupted
from celldetr.training.loop import train
from celldetr.training.losses import class_loss, class_weights, detection_losses
from celldetr.training.matching import assign, match
from celldetr.training.supervised import SupervisedStage


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "fold1.zarr", 14)


def mixed(mode="sequential", **model):
    torch.manual_seed(0)
    return CellDETR(make_experiment(mode, {"query_selection": "mixed", **model}).model)


def test_anchors_lie_where_their_tokens_are():
    boxes = anchor_boxes(((4, 2), (1, 1)), torch.device("cpu"))
    assert boxes.shape == (9, 4)
    assert boxes[2].tolist() == pytest.approx([0.25, 0.375, 0.05, 0.05])
    assert boxes[8].tolist() == pytest.approx([0.5, 0.5, 0.1, 0.1])


def test_box_code_tells_boxes_apart():
    boxes = torch.rand(50, 4)
    codes = box_code(boxes, 64)
    assert codes.shape == (50, 64)
    apart = torch.cdist(codes, codes) + 10 * torch.eye(50)
    assert apart.min() > 0.05
    moved = box_code(boxes + torch.tensor([0.0, 0.0, 0.0, 0.1]), 64)
    assert torch.equal(moved[:, :48], codes[:, :48])  # each coordinate has a quarter of its own


@pytest.mark.parametrize("mode", ["baseline", "sequential"])
def test_queries_begin_at_the_best_proposals(mode):
    model = mixed(mode).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = model.encode(images)
        detections = model.detect(features)
        proposals = model.decoder.proposals
        logits = proposals.class_embed(proposals.transform(features.memory)).amax(dim=-1)
    layers, queries = model.settings.decoder_layers + 1, model.settings.queries
    assert detections.boxes.shape == (layers, 2, queries, 4)
    best = logits.sort(dim=1, descending=True).values[:, :queries]
    torch.testing.assert_close(detections.logits[0].amax(dim=-1), best)
    # box heads start by moving nothing: all layers hold the anchors of these tokens
    anchors = anchor_boxes(features.shapes, images.device)[logits.argsort(dim=1, descending=True)[:, :queries]]
    for boxes in detections.boxes:
        torch.testing.assert_close(boxes, anchors, atol=1e-5, rtol=0)


def test_fewer_tokens_than_queries_are_all_queries():
    model = mixed(queries=500)
    assert model.detect(model.encode(torch.rand(1, 3, 32, 32))).boxes.shape[2] == 64 + 16
    assert len(model.predict(torch.rand(1, 3, 32, 32), 0.0)[0].query) == 80


def test_proposals_learn_from_the_losses():
    model = mixed()
    features = model.encode(torch.rand(1, 3, 32, 32))
    logits, boxes = model.detect(features)
    targets = Targets(torch.tensor([[[0.3, 0.3, 0.2, 0.2]]]), torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))
    found = match(logits.detach(), boxes.detach(), targets, LossSettings())
    sum(value[0] for value in detection_losses(logits, boxes, targets, found, 1.0).values()).backward()
    for part in ("transform", "class_embed", "bbox_embed"):
        weights = getattr(model.decoder.proposals, part).parameters()
        assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_one_to_many_gives_each_nucleus_its_queries_but_for_the_last_layer(repeats, counts, seed):
    cost = np.random.default_rng(seed).random((3, len(counts), 5, 20), dtype=np.float32)
    layer, image, query, box = assign(cost, np.array(counts), repeats)
    for at in range(3):
        for i, count in enumerate(counts):
            here = (layer == at) & (image == i)
            assert np.bincount(box[here], minlength=count).tolist() == [repeats if at < 2 else 1] * count
            assert len(set(query[here])) == here.sum()
    once = assign(cost, np.array(counts))
    assert np.array_equal(once[:, once[0] == 2], np.stack([layer, image, query, box])[:, layer == 2])


def test_losses_of_repeated_layers_are_means_over_the_repeats():
    logits, boxes = torch.zeros(2, 1, 4, 1), torch.full((2, 1, 4, 4), 0.5)
    targets = Targets(torch.full((1, 1, 4), 0.25), torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))
    found = match(logits, boxes, targets, LossSettings(repeats=3))
    losses = detection_losses(logits, boxes, targets, found, 1.0, repeats=3)
    assert losses["l1"].tolist() == pytest.approx([1.0, 1.0])
    assert len(found.last(1).query) == 1
    assert found.last(1).layer.tolist() == [1]


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


def test_average_follows_the_weights():
    model = torch.nn.Linear(2, 1)
    average = WeightAverage(model, 0.9)
    seen = []
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(step)
        seen.append(float(average.weights["weight"][0, 0]))
    assert seen[-1] == pytest.approx(199 - 9, abs=0.1)  # a ramp is followed decay / (1 - decay) steps behind
    with average.applied():
        assert float(model.weight.detach()[0, 0]) == pytest.approx(seen[-1])
    assert float(model.weight.detach()[0, 0]) == 199


def averaged(**training):
    return make_experiment(
        "parallel",
        {"query_selection": "mixed"},
        average=0.9,
        losses={"repeats": 2, "class_balance": 0.5},
        select="last",
        **training,
    )


def test_an_averaged_run_keeps_the_average_and_goes_on_to_the_same_end(store, tmp_path, monkeypatch):
    split = make_split(store, 8, 4)
    whole = train(averaged(epochs=4), [store], split, tmp_path / "whole")
    state = read_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    kept = load_model(whole).state_dict()
    trained = [name for name, weight in state["average"].items() if not torch.equal(state["model"][name], weight)]
    assert trained
    assert all(torch.equal(kept[name], weight) for name, weight in state["average"].items())

    again = train(averaged(epochs=4), [store], split, tmp_path / "whole")  # a finished run writes its results again
    assert all(torch.equal(load_model(again).state_dict()[name], kept[name]) for name in kept)

    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stopping(patch, 3)
        with pytest.raises(Interrupted):
            train(averaged(epochs=4), [store], split, folder)
    train(averaged(epochs=4), [store], split, folder)
    assert_same_result(tmp_path / "whole", folder)


def denoising(**training):
    model = {"query_selection": "mixed", "dropout": 0.0}
    return make_experiment("sequential", model, denoising={"groups": 3, "noise": 0.3}, **training)


def denoising_stage(store):
    experiment = denoising()
    data = [PatchData([store], make_split(store, 10, 4), part) for part in ("train", "val")]
    torch.manual_seed(0)
    stage = SupervisedStage(experiment, CellDETR(experiment.model), *data, nucleus_threshold=0.4, radius=3.0)
    return stage, TrainingBatches(data[0], 10, 1)[0]


def test_noised_boxes_lie_near_their_nuclei_and_do_not_depend_on_the_devices(store):
    stage, batch = denoising_stage(store)
    settings, targets = stage.settings.denoising, batch.targets
    noised = noised_boxes(targets, batch, settings, seed=1)
    moved = (noised - targets.boxes[:, None])[targets.valid[:, None].expand(-1, 3, -1)]
    size = targets.boxes[:, None].expand_as(noised)[targets.valid[:, None].expand(-1, 3, -1)][:, 2:]
    assert (moved[:, :2].abs() <= 0.5 * size + 1e-6).all()
    assert (moved[:, 2:].abs() <= 0.45 * size + 1e-6).all()
    assert (moved.abs() > 0).any(dim=0).all()
    for share in (slice(0, 5), slice(5, 10)):
        slots = int(targets.counts[share].max())
        part = Batch(
            batch.images[share],
            Targets(targets.boxes[share, :slots], targets.labels[share, :slots], targets.counts[share]),
            batch.patches[share],
            step=batch.step,
            share=share,
            counts_global=batch.counts_global,
        )
        again, valid = noised_boxes(part.targets, part, settings, seed=1), part.targets.valid
        assert torch.equal(again.transpose(1, 2)[valid], noised[share, :, :slots].transpose(1, 2)[valid])


def test_noised_boxes_are_matched_to_their_nuclei():
    targets = Targets(torch.full((2, 3, 4), 0.5), torch.tensor([[0, 1, -1], [-1, -1, -1]]), torch.tensor([2, 0]))
    assert torch.stack(own_matches(targets, 2, layers=2)).T.tolist() == [
        [layer, 0, 3 * group + box, box] for layer in (0, 1) for group in (0, 1) for box in (0, 1)
    ]


def test_groups_of_noised_boxes_do_not_see_each_other():
    model = mixed(dropout=0.0)
    features = model.encode(torch.rand(1, 3, 32, 32))
    boxes, valid = torch.rand(1, 2, 3, 4), torch.tensor([[True, True, False]])
    before = model.restore(features, boxes, valid).logits.unflatten(2, (2, 3))
    moved = boxes.clone()
    moved[0, 0, 0] = torch.rand(4)  # one of the first group
    after = model.restore(features, moved, valid).logits.unflatten(2, (2, 3))
    assert torch.equal(before[:, :, 1], after[:, :, 1])
    assert not torch.equal(before[-1, 0, 0, 1], after[-1, 0, 0, 1])
    moved = boxes.clone()
    moved[0, :, 2] = torch.rand(4)  # padding
    after = model.restore(features, moved, valid).logits.unflatten(2, (2, 3))
    assert torch.equal(before[:, :, :, :2], after[:, :, :, :2])


def test_padding_of_noised_boxes_counts_for_nothing(store):
    stage, batch = denoising_stage(store)
    features = stage.model.encode(torch.rand(10, 3, 32, 32))
    losses = stage.denoising_losses(features, batch.targets, batch, 5.0)
    wider = Targets(
        torch.cat([batch.targets.boxes, torch.rand(10, 4, 4)], dim=1),
        torch.nn.functional.pad(batch.targets.labels, (0, 4), value=-1),
        batch.targets.counts,
    )
    again = stage.denoising_losses(features, wider, batch, 5.0)
    assert losses.keys() == {"denoising_nucleus", "denoising_l1", "denoising_giou"}
    for name, value in again.items():
        torch.testing.assert_close(losses[name], value)
        assert value.shape == (2,)


def test_the_decoder_learns_to_restore_noised_boxes(store):
    stage, batch = denoising_stage(store)
    images, optimizer = pixels(batch.images), torch.optim.Adam(stage.model.parameters(), lr=5e-3)
    seen = []
    for _ in range(120):
        losses = stage.denoising_losses(stage.model.encode(images), batch.targets, batch, 20.0)
        seen.append(float(losses["denoising_giou"][-1].detach()))
        optimizer.zero_grad()
        sum(value.sum() for value in losses.values()).backward()
        optimizer.step()
    assert seen[-1] < 0.5 * seen[0]


def test_losses_of_denoising_are_logged_in_training_alone(store, tmp_path):
    train(denoising(epochs=1), [store], make_split(store, 10, 4), tmp_path, radius=3.0)
    line = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8"))
    parts = {"nucleus", "l1", "giou", "classes"}
    assert line["train"].keys() >= parts | {"denoising_nucleus", "denoising_l1", "denoising_giou"}
    assert line["val"].keys() >= parts
    assert not any(name.startswith("denoising") for name in line["val"])


def test_denoising_needs_mixed_queries():
    with pytest.raises(ConfigError, match=r"experiments.tiny.training.denoising.groups: got 1, expected 0 without"):
        make_experiment("sequential", denoising={"groups": 1})
