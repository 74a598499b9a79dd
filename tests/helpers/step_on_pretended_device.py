"""Training steps on the pretended device, in a process of their own: PyTorch counts devices at its first backward.

Usage: step_on_pretended_device.py STORE MODE... Prints JSON by mode: ``device`` of the loss, ``to_host`` (shapes that
the host read), ``waited`` (shapes of the copies that it waited for), ``costs`` (shape that the costs should have).
"""

import json
import sys

import numpy as np
import torch
from pretended_device import Copies, moved, pretended_device
from tiny_training import make_experiment, make_ssl_experiment, make_stage

from celldetr.store import open_store
from celldetr.training.data import TrainingBatches
from celldetr.training.matching import Matching
from celldetr.training.optimizer import make_optimizer
from celldetr.training.prefetch import prepare
from celldetr.training.stage import Losses

BATCH = 8


def stage_of(store, mode):
    """Build the stage of a mode."""
    experiment = make_ssl_experiment(batch_size=BATCH) if mode == "ssl" else make_experiment(mode, batch_size=BATCH)
    return make_stage(store, experiment, 24, 4)


def any_matches(matching):
    """Match anything, without a look at the costs."""
    layers, _, slots, _ = matching._costs.shape
    query = np.where(np.arange(slots) < matching._counts[:, None], np.arange(slots), -1)
    return torch.from_numpy(query[None].repeat(layers, axis=0)).to(matching._device, non_blocking=True)


def one_step(stage, optimizer, batch):
    """Take a step as `celldetr.training.loop.Training.take_step` does; return the loss."""
    losses, total = stage.training_losses(batch)
    total.backward()
    torch.nn.utils.clip_grad_norm_(stage.model.parameters(), stage.settings.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    Losses(losses, total)
    return total


def measure(mode, path):
    """Take a step of a mode and return what it read."""
    device, fakes = pretended_device()
    Matching.result = any_matches
    stage = stage_of(open_store(path), mode)
    settings, step = stage.settings, 1
    batch = TrainingBatches(stage.train_data, BATCH, settings.seed)[step]
    with fakes, Copies() as copies:
        moved(stage.model, device)
        loss = one_step(stage, make_optimizer(stage.model, settings), prepare(batch, device, settings))
    model = stage.model.settings
    costs = (model.decoder_layers, BATCH, batch.targets.labels.shape[1], model.queries)
    found = {"device": str(loss.device), "to_host": copies.to_host, "waited": copies.waited, "costs": costs}
    return {**found, "nuclei": int(batch.targets.counts.sum())}


if __name__ == "__main__":
    print(json.dumps({mode: measure(mode, sys.argv[1]) for mode in sys.argv[2:]}))  # noqa: T201 - the result
