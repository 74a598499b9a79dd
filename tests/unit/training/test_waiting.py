"""A training step on a device of its own: everything is where it should be, and the host waits for one transfer."""

import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from step_on_pretended_device import BATCH, one_step, stage_of
from tiny_training import make_store

from celldetr.runtime.errors import NonFinite
from celldetr.training.data import TrainingBatches
from celldetr.training.optimizer import make_optimizer
from celldetr.training.prefetch import Prefetcher, prepare
from celldetr.training.run_log import RunLog
from celldetr.training.stage import Losses

STEP = Path(__file__).parents[2] / "helpers" / "step_on_pretended_device.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "fold1.zarr", 30)


MODES = ("baseline", "sequential", "parallel", "ssl")


def test_a_step_reads_costs_and_losses_and_nothing_else(store):
    """Any other read of the device, shape that depends on values, or tensor on the wrong device is an error."""
    done = subprocess.run(
        [sys.executable, STEP, store.path, *MODES], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mode, found in json.loads(done.stdout).items():
        assert found["nuclei"], mode
        assert found["device"] == "pretended:0", mode
        assert found["to_host"][0] == found["costs"], mode
        assert len(found["to_host"]) == 2, mode
        assert found["waited"] == [], mode


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_on_a_gpu_waits_but_for_the_costs(store, mode):
    """PyTorch itself tells of any other wait; what an event is awaited for is not told."""
    stage = stage_of(store, mode)
    stage.model.to("cuda")
    optimizer = make_optimizer(stage.model, stage.settings)
    batches = TrainingBatches(stage.train_data, BATCH, 1)
    prefetcher = Prefetcher("cuda", stage.settings, compiled=True)
    try:
        for batch in prefetcher(batches[step] for step in range(3)):
            one_step(stage, optimizer, batch)
            torch.cuda.set_sync_debug_mode("error")  # the first step filled the caches
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_batches_prepared_beside_a_busy_gpu_are_those_of_a_cpu(store, compiled):
    """The step that reads a batch is late: nothing may write to its memory before."""
    stage = stage_of(store, "parallel")
    batches, found = TrainingBatches(stage.train_data, BATCH, 1), []
    for batch in Prefetcher("cuda", stage.settings, compiled=compiled)(batches[step] for step in range(12)):
        torch.cuda._sleep(20_000_000)
        found.append((batch.images.clone(), batch.targets.boxes.clone()))
        del batch
    for step, (images, boxes) in enumerate(found):
        expected = prepare(batches[step], "cpu", stage.settings)
        assert torch.allclose(images.cpu(), expected.images, atol=1e-4)
        assert torch.equal(boxes.cpu(), expected.targets.boxes)


def test_losses_that_arrive_late_name_their_own_patches(store, tmp_path):
    stage = stage_of(store, "parallel")
    batches = TrainingBatches(stage.train_data, BATCH, 1)
    nan = torch.tensor(float("nan"))
    with closing(RunLog(tmp_path, stage, batches.steps_per_epoch, 0, [], {})) as run_log:
        run_log._pending = batches[0], Losses({"l1": nan}, nan)
        with pytest.raises(NonFinite, match=r"step 1: losses loss, l1 are not finite") as caught:
            run_log.add_step(batches[1], {"l1": nan}, nan, 1.0)
    named = set(re.findall(r"fold1:\d+", str(caught.value)))
    assert named == {stage.train_data.name(int(patch)) for patch in batches.order(0)[:BATCH]}
