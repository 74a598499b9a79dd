"""Running Snakemake in tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def run(*arguments, cwd=ROOT, timeout=2000, environment=None):
    """Run a program of this environment; return its completed process with all output in `stdout`."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=ENVIRONMENT | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def snakemake(tmp_path):
    """Call Snakemake on this workflow in a folder of the test's own."""

    def call(*arguments, config=ROOT / "config" / "example" / "config.yaml", **options):
        return run(
            "snakemake",
            *("--snakefile", ROOT / "workflow" / "Snakefile"),
            *("--configfile", config),
            *("--directory", tmp_path),
            *("--cores", 1),
            *arguments,
            **options,
        )

    return call
