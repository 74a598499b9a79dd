"""Asking Slurm, and the smallest example with Snakemake on it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from celldetr.config.base import merge

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
SMALL = {
    "patch": {"size": 64, "mpp": 0.5},
    "model": {"d_model": 32, "ffn": 32, "decoder_layers": 2, "queries": 20},
    "training": {"epochs": 2, "warmup_steps": 2},
    "evaluation": {"resamples": 20},
    "overlays": {"patches": 2},
    "xenium": None,
    "figure3": None,
    "example": {
        "images": [24, 12, 24],
        "xenium": {},
        "slides": {"drawn_slide_1": [300, 240], "drawn_slide_2": [300, 240]},
    },
    "slides": {"total": 40},
}


def ask(*command):
    """Ask Slurm for something."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def jobs():
    """Return what Slurm knows of each job, by its number."""
    found = {}
    for line in ask("scontrol", "show", "job", "--oneliner").splitlines():
        fields = dict(re.findall(r"(\S+?)=(\S*)", line))
        if "JobId" in fields:
            found[int(fields["JobId"])] = fields
    return found


def wait_for(condition, what, process=None, seconds=240):
    """Wait until something is so and return it; fail when it takes too long or a process ends before."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, f"the driver ended, waiting for {what}"
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.3)
    return found


class Workflow:
    """The smallest example with one training run for table 1 and two slides, in a folder of its own."""

    def __init__(self, folder, accounting=False):
        self.folder = folder
        text = (ROOT / "config" / "example" / "config.yaml").read_text(encoding="utf-8")
        config = merge(yaml.safe_load(text), SMALL)
        config["experiments"] = {"celldetr_p": config["experiments"]["celldetr_p"]}
        config["tables"] = {"table1": config["tables"]["table1"] | {"experiments": ["celldetr_p"]}}
        config["frozen_features"] = {"k": 3}
        self.config = config
        status = "sacct" if accounting else "squeue"
        self.profile = [
            *("--profile", "slurm", "--slurm-status-command", status, "--slurm-init-seconds-before-status-checks", "3"),
            *("--latency-wait", "10", "--set-threads", "train=1", "predict=1", "detect_slide=1"),
        ]

    def command(self, *arguments, local=False):
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        how = ["--cores", "2", "--workflow-profile", "none"] if local else self.profile
        return ["snakemake", *how, "--configfile", path, "--directory", self.folder, *arguments]

    def __call__(self, *arguments, local=False, seconds=600):
        done = subprocess.run(
            [str(word) for word in self.command(*arguments, local=local)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def start(self, *arguments):
        """Start a driver and do not wait for it."""
        with open(self.folder / "driver.log", "w", encoding="utf-8") as log:
            return subprocess.Popen(
                [str(word) for word in self.command(*arguments)],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def driver_log(self):
        return (self.folder / "driver.log").read_text(encoding="utf-8")

    def train_logs(self):
        """Return Slurm's logs of the training jobs, in the order of their submission, by job number."""
        logs = (self.folder / ".snakemake" / "slurm_logs" / "rule_train").rglob("*.log")
        return {int(path.stem): path.read_text(encoding="utf-8") for path in sorted(logs, key=lambda p: int(p.stem))}


def end(process):
    """Kill a driver and its children, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
