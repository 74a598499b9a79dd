"""One small finished run of the whole workflow that all tests share, with the objects that its scripts received.

The run is made once for all test processes, from a copy of the workflow. Two fixtures give access: `finished` (read
only) and `work` (a copy that a test may change).
"""

import ast
import fcntl
import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from programs import ENVIRONMENT, ROOT, run

from celldetr.config.base import merge
from celldetr.config.segmentation import missing_packages

SOURCES = ("workflow", "scripts", "config", "envs")
RUN_JOB = Path(__file__).with_name("run_job.py")
MORE = ("results/xenium/drawn_1/spatialdata.zarr",)  # what `all` does not ask for

RECORDER = """import os, shutil, sys
if ".snakemake/scripts/" in sys.orig_argv[-1] and "RECORDED_JOBS" in os.environ:
    shutil.copy(sys.orig_argv[-1], os.environ["RECORDED_JOBS"])
"""

TABLES = {
    "table1": ("deformable_detr", "celldetr_p"),
    "table2": ("ssl_probe",),
    "table3": ("st_zero_shot", "st_finetune"),
}
OTHERS = () if missing_packages() else ("hover_net",)  # of stage segmentation
EXPERIMENTS = (
    *("deformable_detr", "celldetr_p", "ssl_pretrain", "ssl_probe"),
    *("st_pretrain", "st_zero_shot", "st_finetune"),
    *OTHERS,
)
FEWEST = (
    "celldetr_p",
    "ssl_pretrain",
    "st_pretrain",
    "st_zero_shot",
    *OTHERS,
)  # one of each stage: every rule has a job

SMALL = {
    "patch": {"size": 64, "mpp": 0.5},
    "model": {"d_model": 32, "ffn": 32, "decoder_layers": 1, "queries": 16},
    "training": {"epochs": 2, "warmup_steps": 1},
    "inference": {"nucleus_threshold": 0.01},  # the models have learnt little: some of their boxes must count
    "evaluation": {"resamples": 10},
    "overlays": {"patches": 2},
    "example": {
        "images": [16, 12, 16],
        "reference_cells": 1000,
        "xenium": {"drawn_1": {"size_um": [330, 260]}, "drawn_2": {"size_um": [330, 260]}},
        "sthelar": {"drawn_s0": [3, 2]},
        "slides": {"drawn_slide_1": [300, 240], "drawn_slide_2": [300, 240]},
    },
    "slides": {"total": 40},
    "cells": {"nucleus_threshold": 0.01, "class_threshold": 0.01, "jobs": 2},
    "figure3": {"experiments": ["celldetr_p"], "nuclei": 2},
    "figure4": {"patches": 2},
    "frozen_features": {"k": 3},
    "xenium": {"cells_per_type": 60, "split": {"block_um": 64.0}},
}


def small_config(experiments=EXPERIMENTS):
    """Return the example's configuration with some of its experiments, as small as it can be."""
    text = (ROOT / "config" / "example" / "config.yaml").read_text(encoding="utf-8")
    config = merge(yaml.safe_load(text), SMALL)
    config["experiments"] = {name: config["experiments"][name] for name in experiments}
    for block in config["experiments"].values():
        if block["stage"] == "segmentation":
            block["training"] = {"epochs": 1}
    table1 = config["tables"]["table1"]
    table1["others"] = [name for name in table1["others"] if name in experiments]
    for name, listed in TABLES.items():
        config["tables"][name]["experiments"] = [row for row in listed if row in experiments] or ["celldetr_p"]
    return config


def counted_jobs(output):
    """Read Snakemake's table of jobs: rule -> number of jobs; empty if nothing would run."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", output, re.M) if rule != "total"}


def copy_sources(folder):
    """Copy the workflow, with its times, so that a test can edit it."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@dataclass
class SmallRun:
    """A working folder, the copy of the workflow that it was made from, and its recorded jobs."""

    work: Path
    source: Path
    jobs: Path

    @property
    def environment(self):
        """Variables of the processes: the library is the one of the copy."""
        return ENVIRONMENT | {"PYTHONPATH": str(self.source / "scripts")}

    def command(self, *arguments):
        """Return the command line of Snakemake."""
        return [
            *("snakemake", "--snakefile", str(self.source / "workflow" / "Snakefile")),
            *("--configfile", str(self.work / "config.yaml")),
            *("--directory", str(self.work), "--cores", "2", *map(str, arguments)),
        ]

    def snakemake(self, *arguments, timeout=1500, **variables):
        """Run Snakemake; return the completed process with all output in `stdout`."""
        environment = self.environment | variables
        return run(*self.command(*arguments), cwd=self.source, environment=environment, timeout=timeout)

    def configure(self, changes):
        """Lay settings over the configuration of this run."""
        path = self.work / "config.yaml"
        config = merge(yaml.safe_load(path.read_text(encoding="utf-8")), changes)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")

    def planned(self, *arguments, changes=None):
        """Rules of a dry run and how many jobs of each, with some settings changed for this call."""
        path = self.work / "config.yaml"
        before = path.read_text(encoding="utf-8")
        self.configure(changes or {})
        done = self.snakemake(*(arguments or ["all"]), "--dry-run")
        path.write_text(before, encoding="utf-8")
        assert done.returncode == 0, done.stdout
        return {rule: count for rule, count in counted_jobs(done.stdout).items() if rule != "all"}

    def copy(self, folder):
        """Return the run and its workflow in a folder of their own; the times of their files are kept."""
        for part in (self.work, self.source):
            shutil.copytree(part, folder / part.name, symlinks=True)
        return SmallRun(folder / self.work.name, folder / self.source.name, self.jobs)

    def job(self, rule):
        """Return the path of a recorded job of a rule and what Snakemake gave to it."""
        path = self.jobs / f"{rule}.pickle"
        return path, pickle.loads(path.read_bytes())

    def run_job(self, rule, *faults, timeout=280):
        """Run the script of a rule again, once per fault; return what `run_job.py` reports of each."""
        path, _ = self.job(rule)
        report = self.work / f"{rule}_report.json"
        command = (sys.executable, RUN_JOB, path, report, *faults)
        done = run(*command, cwd=self.work, environment=self.environment, timeout=timeout)
        assert done.returncode == 0, done.stdout[-4000:]
        attempts = json.loads(report.read_text(encoding="utf-8"))
        report.unlink()
        return attempts


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the finished run; the first test process that asks makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_run"
    folder.mkdir(exist_ok=True)
    run = SmallRun(folder / "work", folder / "source", folder / "jobs")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _make(run)
            (folder / "done").touch()
    return run


@pytest.fixture
def work(finished, tmp_path):
    """Return a copy of the finished run and of its workflow, to be changed; it is removed after the test."""
    copy = finished.copy(tmp_path / "run")
    yield copy
    shutil.rmtree(tmp_path / "run")


def _make(run):
    recorded, site = run.jobs / "recorded", run.jobs / "site"
    for folder in (run.work, recorded, site):
        folder.mkdir(parents=True)
    copy_sources(run.source)
    (site / "sitecustomize.py").write_text(RECORDER, encoding="utf-8")
    (run.work / "config.yaml").write_text(yaml.safe_dump(small_config()), encoding="utf-8")
    path = os.pathsep.join([str(site), run.environment["PYTHONPATH"]])
    done = run.snakemake("all", *MORE, PYTHONPATH=path, RECORDED_JOBS=str(recorded))
    assert done.returncode == 0, done.stdout[-6000:]
    for job in sorted(map(_given, recorded.iterdir()), key=lambda job: list(job.output)):  # the last one is kept
        (run.jobs / f"{job.rule}.pickle").write_bytes(pickle.dumps(job))


def _given(file):
    """Read the object out of the preamble that Snakemake puts before a script."""
    preamble = file.read_text(encoding="utf-8").split("snakemake preamble end")[0]
    call = next(
        node
        for node in ast.walk(ast.parse(preamble.rpartition("\n")[0]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pickle.loads"
    )
    job = pickle.loads(ast.literal_eval(call.args[0]))
    job.script = file.name.partition(".")[2]
    return job
