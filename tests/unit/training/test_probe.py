"""Probes: what trains, what stays as it is, and that nothing is computed backwards for it."""

import pytest
import torch
from tiny_training import make_experiment, make_split, make_stage, train

from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import read_checkpoint, save_model
from celldetr.training.data import TrainingBatches
from celldetr.training.supervised import SupervisedStage

PARTS = {"head": {"class_head"}, "representation": {"class_head", "representation"}}


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


def test_nothing_is_computed_backwards_through_what_is_frozen(store):
    stage = make_stage(store, make_experiment("parallel", probe="head"))
    batch = TrainingBatches(stage.train_data, 4, seed=1)[0]
    outputs = stage.compute(torch.rand(4, 3, 32, 32), batch.targets, batch)
    assert not outputs.seen.features.memory.requires_grad
    assert not outputs.seen.detections.boxes.requires_grad
    assert not outputs.losses["l1"].requires_grad
    outputs.total.backward()
    assert {name.split(".")[0] for name, p in stage.model.named_parameters() if p.grad is not None} == {"class_head"}


@pytest.mark.parametrize("probe", ["none", "head", "representation"])
def test_frozen_parts_have_no_dropout(store, tmp_path, monkeypatch, probe):
    seen = []
    compute = SupervisedStage.compute

    def watch(self, images, targets, batch):
        parts = {name for name, part in self.model.named_children() if any(m.training for m in part.modules())}
        seen.append((batch.training, parts))
        return compute(self, images, targets, batch)

    monkeypatch.setattr(SupervisedStage, "compute", watch)
    experiment = make_experiment("parallel", probe=probe, epochs=2)
    train(experiment, [store], make_split(store, 8, 2), tmp_path)
    everything = {name for name, _ in CellDETR(experiment.model).named_children()}
    assert len(seen) == 6
    assert all(parts == (PARTS.get(probe, everything) if training else set()) for training, parts in seen)
