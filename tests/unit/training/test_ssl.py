"""Runs of contrastive pretraining: they learn, log, stop and go on, share a batch, and hand on their weights."""

import numpy as np
import pytest
import torch
from tiny_training import (
    make_crowded_store,
    make_split,
    make_ssl_experiment,
    make_stage,
    make_store,
    read_log,
    train,
)

from celldetr.model.weights import load_model
from celldetr.training import ssl
from celldetr.training.contrastive import (
    ViewDraws,
    contrastive_loss,
    make_views,
    project_views,
    training_draws,
    validation_draws,
)
from celldetr.training.data import PatchData, TrainingBatches


def test_shares_of_a_batch_have_the_noise_and_the_slots_of_the_whole(slide):
    data = PatchData([slide], make_split(slide, 9, 0), "train")
    seen = []
    for step in range(6):
        whole = training_draws(TrainingBatches(data, 4, seed=3)[step], 3)
        batches = [TrainingBatches(data, 4, 3, rank, 2)[step] for rank in range(2)]
        shares = zip(*(training_draws(batch, 3) for batch in batches), strict=True)
        assert all(torch.equal(torch.cat(values), all_) for values, all_ in zip(shares, whole, strict=True))
        assert set(whole.filled.tolist()) == {2 * max(int(batch.targets.counts.max()) for batch in batches)}
        seen.append(float(whole.uniforms[0, 0, 0]))
    assert len(set(seen)) == 6


def test_noise_of_validation_depends_on_the_patch_alone(slide):
    data = PatchData([slide], make_split(slide, 0, 9), "val")
    together = validation_draws([2, 5], data.targets(np.array([2, 5])), 3).uniforms
    alone = data.targets(np.array([5]))
    count = int(alone.counts[0])
    assert count > 0
    own = slice(count, 2 * count)
    assert torch.equal(validation_draws([5], alone, 3).uniforms[0, own], together[1, own])


def test_a_run_logs_its_start_and_leaves_all_its_results(slide, tmp_path):
    path = train(make_ssl_experiment(), [slide], make_split(slide, 7, 5), tmp_path)
    lines = read_log(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["train"] is None
    for line in lines:
        val = line["val"]
        expected = {"loss", "contrastive", "nucleus", "l1", "giou", "retrieval", "own", "others"}
        expected |= {"spread", "detection", "score"}
        assert val.keys() == expected
        assert val["score"] == val["retrieval"]
        assert 0 < val["spread"] <= 1.5
    assert lines[1]["train"].keys() == {"loss", "contrastive", "nucleus", "l1", "giou"}
    model = load_model(path)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert "projection" in names
    assert "class_head" not in names


def test_the_loss_of_a_step_is_the_mean_over_images_with_two_nuclei_whose_slots_are_full(slide):
    stage = make_stage(slide, make_ssl_experiment())
    batch = TrainingBatches(stage.train_data, 8, seed=1)[0]
    counts = batch.targets.counts
    assert 0 < (counts < 2).sum() < 7
    outputs = stage.compute(torch.rand(8, 3, 32, 32), batch.targets, batch)
    projected, views = outputs.inner
    assert torch.equal(views.valid.sum(dim=1), 2 * counts.max() * (counts > 0))
    total = contrastive_loss(projected, views, 0.1, "image")
    assert float(outputs.losses["contrastive"].detach()) == pytest.approx(
        float(total.detach()) / int((counts > 1).sum())
    )


def test_spread_of_the_log_is_that_of_the_originals(slide, tmp_path):
    experiment = make_ssl_experiment(select="last", epochs=1)
    split = make_split(slide, 4, 6)
    model = load_model(train(experiment, [slide], split, tmp_path))
    data = PatchData([slide], split, "val")
    targets = data.targets(np.arange(6))
    draws = ViewDraws(targets.counts, 2 * targets.counts, torch.zeros(6, 2 * targets.labels.shape[1], 9))
    views = make_views(targets.boxes, draws, experiment.training.noise)
    with torch.no_grad():
        projected = project_views(model, model.encode(data.read(np.arange(6))[0].permute(0, 3, 1, 2) / 255), views)
    unit = torch.nn.functional.normalize(projected[views.original], dim=-1)
    deviation = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    assert read_log(tmp_path)[-1]["val"]["spread"] == pytest.approx(float(deviation), rel=1e-3)


def test_every_parameter_gets_a_gradient(slide):
    stage = make_stage(slide, make_ssl_experiment())
    batch = TrainingBatches(stage.train_data, 4, seed=1)[0]
    stage.compute(torch.rand(4, 3, 32, 32), batch.targets, batch).total.backward()
    assert [name for name, parameter in stage.model.named_parameters() if parameter.grad is None] == []


def test_labels_of_a_store_are_not_looked_at(tmp_path):
    for name, unlabelled in (("a", False), ("b", True)):
        labelled = make_store(tmp_path / name / "slide.zarr", 10, unlabelled=unlabelled)
        train(make_ssl_experiment(epochs=1), [labelled], make_split(labelled, 6, 4), tmp_path / name / "run")
    lines = [read_log(tmp_path / name / "run") for name in ("a", "b")]
    assert lines[0] == lines[1]


def test_a_collapsed_model_is_told(slide, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ssl, "project_views", lambda model, features, views: torch.ones(*views.valid.shape, 8))
    train(make_ssl_experiment(epochs=1), [slide], make_split(slide, 4, 4), tmp_path)
    assert "spread of 0.000, below 0.1" in caplog.text
    assert read_log(tmp_path)[0]["val"]["spread"] == pytest.approx(0, abs=1e-4)


def test_patches_without_nuclei_are_legal(slide, tmp_path):
    split = make_split(slide, 4, 2)
    split["patch"] = [4, 9, 4, 9, 4, 9]
    train(make_ssl_experiment(batch_size=2, epochs=1), [slide], split, tmp_path)
    last = read_log(tmp_path)[-1]
    assert last["train"]["contrastive"] == 0
    assert last["train"]["nucleus"] > 0
    assert last["val"]["retrieval"] is None
    assert last["val"]["spread"] is None


def test_retrieval_rises_well_above_its_start(tmp_path):
    crowded = make_crowded_store(tmp_path / "crowd.zarr", 32)
    experiment = make_ssl_experiment(
        {"dropout": 0.0},
        epochs=6,
        lr=3e-3,
        backbone_lr=3e-3,
        noise={"low": 0.4, "high": 0.8},
        augmentation={"elastic": 0.0, "flip": 0.0, "blur": 0.2, "jitter": 0.0, "hed": 1.0},
    )
    train(experiment, [crowded], make_split(crowded, 24, 8), tmp_path)
    lines = read_log(tmp_path)
    start, end = lines[0]["val"], lines[-1]["val"]
    assert start["retrieval"] < 0.6
    assert end["retrieval"] > 0.85
    assert end["spread"] > start["spread"]
    assert end["own"] - end["others"] > 0.5 > start["own"] - start["others"]
    assert end["contrastive"] < 0.5 * start["contrastive"]


def test_the_weight_of_the_contrastive_loss_counts(slide, tmp_path):
    for weight in (1.0, 3.0):
        experiment = make_ssl_experiment(epochs=1, lr=1e-9, backbone_lr=0.0, contrastive={"weight": weight})
        train(experiment, [slide], make_split(slide, 4, 4), tmp_path / str(weight))
    for part, line in (("train", 1), ("val", 0)):
        one, three = (read_log(tmp_path / weight)[line][part] for weight in ("1.0", "3.0"))
        assert three["loss"] - one["loss"] == pytest.approx(2 * one["contrastive"], rel=1e-4)
