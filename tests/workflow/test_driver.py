"""What a user of the driver meets: kills, locks, mistakes in the configuration, profiles, initial weights."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch
import yaml
from programs import ROOT, run
from small_run import counted_jobs, small_config

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


def plan(folder, change, *targets):
    """Dry-run the small example in an empty folder with one change."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(change(small_config())), encoding="utf-8")
    command = ["snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--configfile", path]
    return run(*command, "--directory", folder, "--cores", 1, "--dry-run", *(targets or ["all"]))


def test_a_wrong_key_stops_before_anything_runs(tmp_path):
    done = plan(tmp_path, lambda config: config | {"training": {"epocs": 2}})
    assert done.returncode != 0
    assert "training.epocs: unknown key; did you mean 'epochs'?" in done.stdout
    assert not (tmp_path / "results").exists()


def test_a_wrong_sheet_stops_before_anything_runs(tmp_path):
    sheet = tmp_path / "xenium.tsv"
    text = (ROOT / "config" / "example" / "xenium.tsv").read_text(encoding="utf-8")
    sheet.write_text(text.replace("drawn_2\tyes", "../drawn_2\tyes"), encoding="utf-8")
    done = plan(tmp_path, lambda config: config | {"xenium": config["xenium"] | {"samples": str(sheet)}})
    assert done.returncode != 0
    assert "row 2: sample: got '../drawn_2'" in done.stdout


def test_a_missing_archive_is_named(tmp_path):
    done = plan(tmp_path, lambda config: config | {"example": None}, "results/pannuke/split1.tsv")
    assert done.returncode != 0
    assert "example-input/fold_1.zip" in done.stdout


def test_a_single_target_builds_only_its_ancestors(tmp_path):
    done = plan(tmp_path, dict, "results/pannuke/split1.tsv")
    assert set(counted_jobs(done.stdout)) == {"make_example", "download_pannuke", "convert_pannuke", "split_pannuke"}


def test_table_3_needs_no_model_of_table_1(tmp_path):
    done = plan(tmp_path, dict, "results/table3.tsv")
    assert counted_jobs(done.stdout)["train"] == 2
    assert not re.search("celldetr_[sp]|deformable_detr", done.stdout)


def test_slurm_profile_plans_the_paper_from_a_clone_as_typed():
    done = run("snakemake", "--profile", "slurm", "-n", "all", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    jobs = counted_jobs(done.stdout)
    assert jobs["train"] == 20
    assert jobs["download_pannuke"] == 3
    assert jobs["register_xenium"] == 4
    assert jobs["extract_slide"] == 15


def test_example_profile_plans_from_a_clone_as_typed(tmp_path):
    done = run("snakemake", "--profile", "example", "--directory", tmp_path, "-n", "all", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "make_example" in done.stdout
