"""Asking Slurm, and Snakemake with a small run on it."""

import os
import re
import signal
import subprocess
import time

import yaml
from programs import ENVIRONMENT, ROOT

EAGER = """import asyncio

sleep = asyncio.sleep
asyncio.sleep = lambda seconds, *more: sleep(min(seconds, 3), *more)
"""
"""Snakemake's plugin asks for the states of its jobs 10 s later each time that none has ended; here every 3 s."""
NO_ACCOUNTING = "#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n"


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
    """Snakemake with the Slurm profile in a working folder that has a config.yaml; `accounting`: sacct works."""

    def __init__(self, folder, tools, accounting=True):
        self.folder = folder
        tools.mkdir()
        (tools / "sitecustomize.py").write_text(EAGER, encoding="utf-8")
        self.environment = ENVIRONMENT | {"PYTHONPATH": f"{tools}{os.pathsep}{ROOT / 'scripts'}"}
        if not accounting:
            (tools / "sacct").write_text(NO_ACCOUNTING, encoding="utf-8")
            (tools / "sacct").chmod(0o755)
            self.environment["PATH"] = f"{tools}{os.pathsep}{ENVIRONMENT['PATH']}"
        self.command = [
            *("snakemake", "--profile", "slurm", "--slurm-status-command", "sacct" if accounting else "squeue"),
            *("--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "10"),
            *("--set-threads", "train=1", "predict=1", "detect_slide=1"),
            *("--configfile", str(folder / "config.yaml"), "--directory", str(folder)),
        ]

    def configure(self, **training):
        """Change settings of the training."""
        path = self.folder / "config.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["training"] |= training
        path.write_text(yaml.safe_dump(config), encoding="utf-8")

    def start(self, *arguments):
        """Start a driver and do not wait for it."""
        with open(self.folder / "driver.log", "w", encoding="utf-8") as log:
            return subprocess.Popen(
                [*self.command, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __call__(self, *arguments, seconds=800):
        """Run a driver to its end; return what it printed."""
        driver = self.start(*arguments)
        try:
            driver.wait(seconds)
        finally:
            end(driver)
        assert driver.returncode == 0, self.driver_log()[-6000:]
        return self.driver_log()

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
