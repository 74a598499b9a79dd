"""Probes: what trains, what stays as it is, and that nothing is computed backwards for it."""

import pytest
import torch
from tiny_training import make_experiment, make_split, train

from celldetr.config.evaluation import ScoringSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import read_checkpoint, save_model
from celldetr.training.data import PatchData, TrainingBatches
from celldetr.training.loop import make_optimizer
from celldetr.training.supervised import SupervisedStage

PARTS = {"head": {"class_head"}, "representation": {"class_head", "representation"}}


def make_stage(store, mode, probe):
    experiment = make_experiment(mode, probe=probe)
    data = PatchData([store], make_split(store, 8, 0), "train")
    stage = SupervisedStage(experiment, CellDETR(experiment.model), data, data, ScoringSettings())
    return stage, TrainingBatches(data, 4, seed=1)[0]


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("probe", ["head", "representation"])
def test_exactly_the_probed_parameters_change(store, tmp_path, mode, probe):
    experiment = make_experiment(mode, probe=probe, epochs=2, weight_decay=0.1, model={"representation": {"layers": 2}})
    torch.manual_seed(5)
    save_model(tmp_path / "first.pt", CellDETR(experiment.model), experiment.model)
    split = make_split(store, 6, 2)
    path = train(experiment, [store], split, tmp_path / "run", initial=tmp_path / "first.pt", trained_on=())
    before, after = (read_checkpoint(file)["state"] for file in (tmp_path / "first.pt", path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.split(".")[0] in PARTS[probe]}
    assert changed == expected


@pytest.mark.parametrize("probe", ["head", "representation"])
def test_the_optimiser_holds_what_trains_alone(store, probe):
    stage, _ = make_stage(store, "parallel", probe)
    held = {id(p) for group in make_optimizer(stage.model, stage.settings).param_groups for p in group["params"]}
    expected = {id(p) for name, p in stage.model.named_parameters() if name.split(".")[0] in PARTS[probe]}
    assert held == expected


def test_nothing_is_computed_backwards_through_what_is_frozen(store):
    stage, batch = make_stage(store, "parallel", "head")
    outputs = stage.compute(torch.rand(4, 3, 32, 32), batch.targets, batch)
    assert not outputs.features.memory.requires_grad
    assert not outputs.detections.boxes.requires_grad
    assert not outputs.losses["l1"].requires_grad
    stage.total(outputs.losses).backward()
    assert {name.split(".")[0] for name, p in stage.model.named_parameters() if p.grad is not None} == {"class_head"}


@pytest.mark.parametrize("probe", ["none", "head", "representation"])
def test_frozen_parts_are_evaluated_and_the_rest_trains(store, probe):
    stage, _ = make_stage(store, "parallel", probe)
    for _ in range(2):
        stage.train()
        training = {name for name, part in stage.model.named_children() if any(m.training for m in part.modules())}
        whole = {name for name, _ in stage.model.named_children()}
        assert training == PARTS.get(probe, whole)
        stage.model.eval()
        assert not any(module.training for module in stage.model.modules())


def test_during_a_run_frozen_features_have_no_dropout(store, tmp_path, monkeypatch):
    seen = []
    compute = SupervisedStage.compute

    def watch(self, images, targets, batch):
        modes = {name: part.training for name, part in self.model.named_children()}
        seen.append((batch.training, modes["encoder"], modes["class_head"]))
        return compute(self, images, targets, batch)

    monkeypatch.setattr(SupervisedStage, "compute", watch)
    train(make_experiment("parallel", probe="head", epochs=2), [store], make_split(store, 8, 2), tmp_path)
    assert set(seen) == {(True, False, True), (False, False, False)}
