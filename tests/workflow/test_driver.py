"""A killed driver, and initial weights of the backbone."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch

from celldetr.config.experiment import BackboneSettings
from celldetr.model.backbone import Backbone
from celldetr.model.weights import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = "results/models/celldetr_p/split1/model.pt"


def test_driver_and_training_killed_and_started_again(work):
    """After SIGKILL of the driver and its jobs in the middle of training, the next run continues to the end."""
    work.configure({"training": {"epochs": 12}})
    folder = (work.work / MODEL).parent
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.unlink()
    log = open(work.work / "first.log", "w")  # noqa: SIM115 - the process writes to it
    process = subprocess.Popen(
        work.command(MODEL), env=work.environment, stdout=log, stderr=log, start_new_session=True, cwd=work.source
    )
    try:
        until = time.monotonic() + 300
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
    assert checkpoint.exists(), (work.work / "first.log").read_text()
    assert not (work.work / MODEL).exists()
    assert work.snakemake("--unlock").returncode == 0
    done = work.snakemake(MODEL)
    assert done.returncode == 0, done.stdout[-4000:]
    log = (work.work / "results" / "logs" / "train" / "celldetr_p_split1.log").read_text()
    assert re.search(r"continuing from .*last\.ckpt at step [1-9]", log)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = [line["epoch"] for line in lines if "epoch" in line]
    assert sorted(set(epochs)) == list(range(min(epochs), min(epochs) + 12))


def test_imagenet_weights_reach_the_model(work):
    """The backbone's frozen batch norms show where they came from."""
    resnet = BackboneSettings(stages=(2, 3))
    state = Backbone(resnet.model_copy(update={"stages": (1, 2, 3, 4)})).state_dict()
    planted = {name: torch.rand_like(value) if "bn" in name else value for name, value in state.items()}
    torch.save({**planted, "fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, work.work / "my_resnet.pth")
    experiment = {"initial": "imagenet", "model": {"backbone": resnet.to_dict()}}
    settings = {"imagenet": {"urls": ["my_resnet.pth"], "sha256": None}, "training": {"epochs": 1}}
    work.configure({**settings, "experiments": {"deformable_detr": experiment}})
    target = "results/models/deformable_detr/split1/model.pt"
    done = work.snakemake(target)
    assert done.returncode == 0, done.stdout[-4000:]
    model = load_model(work.work / target)
    assert torch.equal(model.backbone.bn1.weight, planted["bn1.weight"])
    assert torch.equal(model.backbone.layer3[5].bn3.running_var, planted["layer3.5.bn3.running_var"])
    record = json.loads((work.work / target).with_name("provenance.json").read_text(encoding="utf-8"))
    assert "results/raw/weights/resnet50.pth" in record["inputs"]
