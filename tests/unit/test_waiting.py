"""A training step on a device of its own: everything is where it should be, and the host waits for one transfer."""

import re

import numpy as np
import pytest
import torch
from pretended_device import Copies, moved, pretended_device
from tiny_training import make_experiment, make_split, make_ssl_experiment, make_store

from celldetr.model.celldetr import CellDETR
from celldetr.training.augment import draw
from celldetr.training.base import Report
from celldetr.training.data import PatchData, TrainingBatches
from celldetr.training.errors import NonFinite
from celldetr.training.matching import Matches, Matching
from celldetr.training.ssl import SslStage
from celldetr.training.supervised import SupervisedStage

BATCH = 8


class Trainer:
    """What a stage asks of its trainer in a step."""

    world_size, global_rank = 1, 0

    def __init__(self, optimizer):
        self.optimizers = [optimizer]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "fold1.zarr", 30)


def make_stage(store, mode):
    experiment = make_ssl_experiment(batch_size=BATCH) if mode == "ssl" else make_experiment(mode, batch_size=BATCH)
    data = [PatchData([store], make_split(store, 24, 4), part) for part in ("train", "val")]
    kind = SslStage if mode == "ssl" else SupervisedStage
    return kind(experiment, CellDETR(experiment.model), *data, nucleus_threshold=0.4, radius=3.0)


def any_matches(matching):
    """Match anything, without a look at the costs."""
    layers = range(len(matching._costs))
    pairs = [(layer, i, k, k) for layer in layers for i, n in enumerate(matching._counts) for k in range(n)]
    rows = torch.from_numpy(np.array(pairs).T.copy()).to(matching._device, non_blocking=True)
    return Matches(*rows)


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel", "ssl"])
def test_a_step_reads_costs_and_losses_and_nothing_else(store, mode, monkeypatch):
    """Any other read of the device, shape that depends on values, or tensor on the wrong device is an error."""
    device, fakes = pretended_device()
    monkeypatch.setattr(Matching, "result", any_matches)
    stage = make_stage(store, mode)
    settings, step = stage.settings, 1
    batch = TrainingBatches(stage.train_data, BATCH, settings.seed)[step]
    stage.step = step
    n_blurred = draw(settings.augmentation, settings.seed, step, BATCH).blur.sum()
    assert n_blurred
    assert batch.targets.counts.sum()
    with fakes, Copies() as copies:
        moved(stage.model, device)
        stage._device = device
        optimizer = stage.configure_optimizers()
        trainer = Trainer(optimizer)
        stage.trainer = trainer
        loss = stage.training_step(batch.to(device), 0)
        loss.backward()
        stage.configure_gradient_clipping(optimizer)
        optimizer.step()
    assert loss.device == device
    assert len(copies.to_host) == 2
    model = stage.model.settings
    assert copies.to_host[0] == (model.decoder_layers, BATCH, batch.targets.labels.shape[1], model.queries)
    # kornia moves the blur's deviations; on CUDA without waiting
    assert set(copies.waited) <= {(n_blurred, 2)}


def test_losses_that_arrive_late_name_their_own_patches(store):
    stage = make_stage(store, "parallel")
    batches = TrainingBatches(stage.train_data, BATCH, 1)
    stage._report = Report(batches[0], {"l1": torch.tensor(1.0)}, torch.tensor(float("nan")))
    with pytest.raises(NonFinite, match=r"step 1: losses loss are not finite") as caught, stage._naming(batches[1]):
        raise NonFinite("costs of the matching")
    named = set(re.findall(r"fold1:\d+", str(caught.value)))
    assert named == {stage.train_data.name(int(patch)) for patch in batches.order(0)[:BATCH]}
