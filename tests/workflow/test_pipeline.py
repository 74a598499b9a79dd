"""The whole workflow at smoke size: from archives to tables, reruns, and what a user sees when something is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest
import torch
import yaml
from programs import ENVIRONMENT, ROOT, run

from celldetr.config.base import merge
from celldetr.config.classes import ST_TYPES
from celldetr.config.experiment import BackboneSettings
from celldetr.model.backbone import Backbone
from celldetr.model.weights import load_model
from celldetr.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SMALL = {
    "patch": {"size": 64, "mpp": 0.5},
    "model": {"d_model": 32, "ffn": 32, "decoder_layers": 2, "queries": 20},
    "training": {"epochs": 2, "warmup_steps": 2},
    "evaluation": {"resamples": 20},
    "overlays": {"patches": 2},
    "figure3": {"nuclei": 2},
    "example": {
        "images": [24, 12, 24],
        "reference_cells": 1200,
        "xenium": {"drawn_1": {"size_um": [330, 260]}, "drawn_2": {"size_um": [330, 260]}},
        "slides": {"drawn_slide_1": [300, 240], "drawn_slide_2": [300, 240]},
    },
    "slides": {"total": 40},
    "figure4": {"patches": 2},
    "frozen_features": {"k": 3},
    "xenium": {"cells_per_type": 60, "split": {"block_um": 64.0}},
}


TRAINING_LOG = "results/logs/train/celldetr_p_split1.log"


FIGURES = ("attention", "figure3", "figure4c", "figure5b")
AFTER_PATCHES = (
    "split_xenium",
    "figure5a",
    "figure5b",
    "train",
    "learning_curves",
    "predict",
    "score",
    "table",
    "overlays",
)

AFTER_SLIDES = (
    *("train", "figure4b", "figure4c", "similarity", "frozen_features", "learning_curves"),
    *("predict", "score", "table", "overlays"),
)


def smoke():
    """Return the example's configuration, as small as it can be."""
    text = (ROOT / "config" / "example" / "config.yaml").read_text(encoding="utf-8")
    return merge(yaml.safe_load(text), SMALL)


def counted_jobs(output):
    """Read the table of a dry-run: rule -> number of jobs; empty when nothing would run."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", output, re.M) if rule != "total"}


class Workflow:
    """One working folder with its configuration."""

    def __init__(self, folder):
        self.folder = folder
        self.config = smoke()

    def command(self, *arguments):
        path = self.folder / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        return [
            *("snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile"), "--configfile", str(path)),
            *("--directory", str(self.folder), "--cores", "2", *map(str, arguments)),
        ]

    def __call__(self, *arguments):
        return run(*self.command(*arguments))

    def planned(self, *targets, changes=None):
        """Rules that would run, with some settings changed."""
        kept, self.config = self.config, merge(self.config, changes or {})
        done = self(*(targets or ["all"]), "--dry-run")
        self.config = kept
        assert done.returncode == 0, done.stdout
        return set(counted_jobs(done.stdout)) - {"all"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run everything once."""
    workflow = Workflow(tmp_path_factory.mktemp("finished"))
    done = workflow("all")
    assert done.returncode == 0, done.stdout[-6000:]
    return workflow


def test_table_holds_published_and_measured_rows(finished):
    table = pd.read_csv(finished.folder / "results" / "table1.tsv", sep="\t", keep_default_na=True)
    assert {"paper", "measured"} <= set(table["source"])
    measured = table[table["source"] == "measured"]
    assert list(measured["system"]) == ["Deformable DETR", "CellDETR-S", "CellDETR-P"]
    assert {"Neoplastic_P", "Necrotic_F", "Detection_F"} <= set(table.columns)


def test_zero_shot_and_finetuned_rows_stand_in_table_3(finished):
    table = pd.read_csv(finished.folder / "results" / "table3.tsv", sep="\t", keep_default_na=False)
    measured = table[table["source"] == "measured"].set_index("experiment")
    assert list(measured.index) == ["st_zero_shot", "st_finetune"]
    assert measured.loc["st_zero_shot", "Necrotic_F"] == "NA"
    assert measured.loc["st_zero_shot", "note"] == "Necrotic: the model has no such class"
    assert measured.loc["st_finetune", "Necrotic_F"] != "NA"
    scores = pd.read_csv(finished.folder / "results" / "scores" / "st_pretrain" / "split1.tsv", sep="\t")
    assert set(scores["class"]) == {"Detection", *ST_TYPES}


def test_probe_finetuned_and_frozen_feature_rows_stand_in_table_2(finished):
    table = pd.read_csv(finished.folder / "results" / "table2.tsv", sep="\t", keep_default_na=False)
    assert list(table.loc[table["source"] == "measured", "experiment"]) == ["ssl_probe", "ssl_finetune"]
    readout = table[table["source"] == "readout"]
    assert list(readout["system"]) == ["Nearest neighbours", "Logistic regression"]
    assert (readout["Detection_F"] == "NA").all()
    assert (readout["Neoplastic_F"].astype(float) > 0).any()


def test_slides_give_patches_without_labels_and_the_probe_moves_the_class_head_alone(finished):
    results = finished.folder / "results"
    for slide in ("drawn_slide_1", "drawn_slide_2"):
        store = open_store(results / "slides" / slide / f"{slide}.zarr")
        assert store.classes == ()
        assert (store.labels == -1).all()
    split = pd.read_csv(results / "slides" / "split.tsv", sep="\t")
    assert set(split["part"]) == {"train", "val"}
    assert len(split) == SMALL["slides"]["total"]
    models = [load_model(results / "models" / name / "split1" / "model.pt") for name in ("ssl_pretrain", "ssl_probe")]
    before, after = (model.state_dict() for model in models)
    shared = [name for name in after if name in before]
    assert {name.split(".")[0] for name in after if name not in before} == {"class_head"}
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_xenium_samples_are_registered_labelled_and_split_without_shared_tissue(finished):
    folder = finished.folder / "results" / "xenium"
    for sample, origin in (("drawn_1", "file, refined"), ("drawn_2", "estimated")):
        record = json.loads((folder / sample / "registration.json").read_text(encoding="utf-8"))
        assert record["origin"] == origin
        assert record["quality"]["distance"] < 1.5
        store = open_store(folder / sample / f"{sample}.zarr")
        assert store.classes == ST_TYPES
        labelled = (store.labels >= 0).mean()
        assert 0.4 < labelled < 1
    split = pd.read_csv(folder / "split.tsv", sep="\t")
    assert set(split["part"]) == {"train", "val", "test"}
    assert open_store(folder / "test.zarr").n_patches == (split["part"] == "test").sum()


def test_a_sample_can_be_saved_as_spatialdata(finished):
    target = "results/xenium/drawn_1/spatialdata.zarr"
    done = finished(target)
    assert done.returncode == 0, done.stdout[-4000:]
    assert {"images", "shapes", "tables"} <= {path.name for path in (finished.folder / target).iterdir()}


def test_provenance_stands_beside_models_and_tables(finished):
    results = finished.folder / "results"
    for path in (
        results / "table1.provenance.json",
        results / "table3.provenance.json",
        results / "models" / "celldetr_s" / "split1" / "provenance.json",
        results / "models" / "st_pretrain" / "split1" / "provenance.json",
        results / "xenium" / "drawn_1" / "registration.provenance.json",
        results / "xenium" / "drawn_1" / "cells.provenance.json",
    ):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"settings", "versions", "git_revision", "inputs", "wall_seconds"} <= set(record)


def test_every_rule_wrote_its_log_and_benchmark(finished):
    results = finished.folder / "results"
    for folder in ("logs", "benchmarks"):
        names = {path.relative_to(results / folder).parts[0].split(".")[0] for path in (results / folder).rglob("*.*")}
        assert {
            "convert_pannuke",
            "download_pannuke",
            "train",
            "predict",
            "score",
            "attention",
            "figure3",
            "table1",
            "download_xenium",
            "register_xenium",
            "prepare_reference",
            "annotate_xenium",
            "extract_xenium",
            "split_xenium",
            "figure5b",
            "table3",
            "download_slide",
            "detect_slide",
            "extract_slide",
            "choose_slide_patches",
            "similarity",
            "figure4b",
            "frozen_features",
            "learning_curves",
        } <= names


def test_stores_are_valid_and_the_test_fold_is_held_out(finished):
    split = pd.read_csv(finished.folder / "results" / "pannuke" / "split1.tsv", sep="\t")
    assert set(split.loc[split["part"] == "test", "store"]) == {"fold2"}
    assert set(split.loc[split["part"] != "test", "store"]) == {"fold1", "fold3"}
    for fold, count in zip((1, 2, 3), SMALL["example"]["images"], strict=True):
        store = open_store(finished.folder / "results" / "pannuke" / f"fold{fold}.zarr")
        assert store.n_patches == count
        assert (split["store"] == f"fold{fold}").sum() == count


def test_nothing_reruns_when_nothing_changed(finished):
    assert finished.planned() == set()


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"evaluation": {"radius": 5.0}}, {"score", "attention", "table", "figure3", "figure5b"}),
        ({"evaluation": {"resamples": 30}}, {"score", "table"}),
        ({"evaluation": {"metric": "hovernet_compat"}}, {"table"}),
        ({"overlays": {"patches": 3}}, {"overlays"}),
        ({"figure3": {"nuclei": 1}}, {"attention", "figure3"}),
        (
            {"inference": {"batch_size": 4}},
            {"predict", "score", "table", "overlays", "similarity", "frozen_features", *FIGURES},
        ),
        (
            {"experiments": {"celldetr_s": {"training": {"lr": 5.0e-4}}}},
            {"train", "learning_curves", "predict", "score", "table", "overlays", "attention", "figure3"},
        ),
        ({"xenium": {"registration": {"regions": 3}}}, {"register_xenium", "extract_xenium", *AFTER_PATCHES}),
        ({"xenium": {"cell_types": {"min_margin": 0.3}}}, {"annotate_xenium", "extract_xenium", *AFTER_PATCHES}),
        ({"xenium": {"patches": {"min_nuclei": 2}}}, {"extract_xenium", *AFTER_PATCHES}),
        ({"xenium": {"split": {"block_um": 96.0}}}, set(AFTER_PATCHES) - {"figure5a"}),
        ({"slides": {"total": 30}}, {"choose_slide_patches", *AFTER_SLIDES}),
        ({"frozen_features": {"k": 2}}, {"frozen_features", "table"}),
        ({"figure4": {"patches": 1}}, {"similarity", "figure4c"}),
    ],
)
def test_a_setting_reruns_what_depends_on_it(finished, changes, rules):
    assert finished.planned(changes=changes) == rules


def test_an_experiments_setting_leaves_the_others_alone(finished):
    changes = {"experiments": {"celldetr_s": {"training": {"lr": 5.0e-4}}}}
    target = "results/predictions/celldetr_p/split1.parquet"
    assert finished.planned(target, changes=changes) == set()


def test_a_single_target_builds_only_its_ancestors(tmp_path):
    workflow = Workflow(tmp_path)
    planned = workflow.planned("results/pannuke/split1.tsv")
    assert planned == {"make_example", "download_pannuke", "convert_pannuke", "split_pannuke"}


def test_table_3_needs_no_model_of_table_1(tmp_path):
    workflow = Workflow(tmp_path)
    assert "train" in workflow.planned("results/table3.tsv")
    planned = workflow("results/table3.tsv", "--dry-run", "--quiet", "rules").stdout
    assert not re.search("celldetr_[sp]|deformable_detr", planned)


def test_report_is_one_file(finished):
    done = finished("--report", finished.folder / "report.html")
    assert done.returncode == 0, done.stdout
    assert (finished.folder / "report.html").stat().st_size > 100_000


def test_driver_and_training_killed_and_started_again(finished, tmp_path):
    """After SIGKILL of everything in the middle of training, the next run ends with the same model."""
    workflow = Workflow(tmp_path)
    shutil.copytree(finished.folder / "example-input", tmp_path / "example-input")
    workflow.config["training"]["epochs"] = 12
    target = "results/models/celldetr_p/split1/model.pt"
    log = open(tmp_path / "first.log", "w")  # noqa: SIM115 - the process writes to it
    process = subprocess.Popen(
        workflow.command(target), env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
    )
    checkpoint = tmp_path / "results" / "models" / "celldetr_p" / "split1" / "checkpoints" / "last.ckpt"
    try:
        until = time.monotonic() + 300
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
    assert checkpoint.exists(), (tmp_path / "first.log").read_text()
    assert not (tmp_path / target).exists()
    assert workflow("--unlock").returncode == 0
    done = workflow(target)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"going on from .*last\.ckpt at step [1-9]", (tmp_path / TRAINING_LOG).read_text())
    lines = [
        json.loads(line) for line in (tmp_path / target).with_name("log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    epochs = [line["epoch"] for line in lines if "epoch" in line]
    assert sorted(set(epochs)) == list(range(min(epochs), min(epochs) + 12))


def test_initial_weights_reach_the_model(finished, tmp_path):
    """The backbone's weights by their rule, then a whole model; frozen batch norms tell where weights came from."""
    workflow = Workflow(tmp_path)
    shutil.copytree(finished.folder / "example-input", tmp_path / "example-input")
    resnet = BackboneSettings(stages=(2, 3))
    state = Backbone(resnet.model_copy(update={"stages": (1, 2, 3, 4)})).state_dict()
    planted = {name: torch.rand_like(value) if "bn" in name else value for name, value in state.items()}
    torch.save({**planted, "fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, tmp_path / "my_resnet.pth")
    workflow.config["imagenet"] = {"urls": ["my_resnet.pth"]}
    workflow.config["training"]["epochs"] = 1
    first, second = (f"results/models/{name}/split1/model.pt" for name in ("celldetr_s", "celldetr_p"))
    for name, initial in (("celldetr_s", "imagenet"), ("celldetr_p", first)):
        workflow.config["experiments"][name] |= {"initial": initial, "model": {"backbone": resnet.to_dict()}}
    done = workflow(second)
    assert done.returncode == 0, done.stdout[-4000:]
    for target, source in ((first, "results/raw/weights/resnet50.pth"), (second, first)):
        model = load_model(tmp_path / target)
        assert torch.equal(model.backbone.bn1.weight, planted["bn1.weight"])
        assert torch.equal(model.backbone.layer3[5].bn3.running_var, planted["layer3.5.bn3.running_var"])
        record = json.loads((tmp_path / target).with_name("provenance.json").read_text(encoding="utf-8"))
        assert source in record["inputs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"epocs": 2}}, "training.epocs: unknown key; did you mean 'epochs'?"),
        ({"figure3": {"split": 2}}, "figure3.split: got 2, expected one of"),
    ],
)
def test_a_wrong_configuration_stops_before_anything_runs(tmp_path, changes, message):
    workflow = Workflow(tmp_path)
    workflow.config = merge(workflow.config, changes)
    done = workflow("all")
    assert done.returncode != 0
    assert message in done.stdout
    assert not (tmp_path / "results").exists()


def test_two_drivers_in_one_folder_are_refused(tmp_path):
    workflow = Workflow(tmp_path)
    command = workflow.command("results/pannuke/split1.tsv")
    first = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob(".snakemake/locks/*")) and first.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        second = workflow("results/pannuke/fold1.zarr")
        assert second.returncode != 0
        assert "cannot be locked" in second.stdout
    finally:
        assert first.wait(600) == 0
    assert (tmp_path / "results" / "pannuke" / "split1.tsv").is_file()


def test_a_missing_archive_is_named(tmp_path):
    workflow = Workflow(tmp_path)
    workflow.config["example"] = None
    done = workflow("results/pannuke/split1.tsv")
    assert done.returncode != 0
    assert "example-input/fold_1.zip" in done.stdout


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
