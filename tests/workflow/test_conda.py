"""`--sdm conda` with a stand-in for conda: every rule runs in the environment of its file, and in no other."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_conda
import yaml
from programs import ENVIRONMENT, ROOT, run
from small_run import FEWEST, MORE, counted_jobs, small_config
from test_environments import RULES

NOT_IN_THE_EXAMPLE = {"download_imagenet"}  # the example starts from random weights; its script is download_pannuke's
ABSENT = {
    "data": ("torch", "tacco", "anndata", "hypothesis"),
    "report": ("torch", "tacco", "anndata"),
    "spatial": ("torch", "kornia"),
    "training": ("tacco", "anndata", "spatialdata"),
    "cells": ("tacco", "anndata", "spatialdata"),
}


def imports(python, statement):
    """Whether a statement runs, with Snakemake's own packages appended to the path as in a script."""
    code = f"import sys; sys.path.append({str(stand_in_conda.SITE)!r}); {statement}"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 or "ModuleNotFoundError" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.fixture(scope="module")
def conda(tmp_path_factory):
    """Install the stand-in; return the settings of a shell that finds it."""
    folder = tmp_path_factory.mktemp("conda")
    run(sys.executable, stand_in_conda.__file__, "install", folder / "here")
    environment = {"PATH": f"{folder / 'here' / 'bin'}:{ENVIRONMENT['PATH']}", "PYTHONNOUSERSITE": "1"}
    environment["PYTHONPATH"] = ""
    return environment


def conda_file(path, *packages):
    """Write a conda file with some packages at the versions of the lock."""
    lock = stand_in_conda.canonical
    lines = (ROOT / "envs" / "lock.txt").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if "==" in line and lock(line.split("==")[0]) in packages]
    assert len(chosen) == len(packages)
    path.write_text(yaml.safe_dump({"dependencies": ["python", {"pip": chosen}]}), encoding="utf-8")
    return path


def test_an_environment_holds_what_its_file_pins_and_nothing_else(tmp_path):
    stand_in_conda.create(conda_file(tmp_path / "a.yaml", "numpy", "packaging"), tmp_path / "a")
    python = tmp_path / "a" / "bin" / "python"
    assert imports(python, "import numpy, packaging.version, snakemake.logging; numpy.linalg.inv([[2.0]])")
    for name in ("pandas", "requests", "yaml.nodes", "torch"):
        assert not imports(python, f"import {name}")
    assert imports(python, "import importlib.util as u; assert u.find_spec('pandas') is None")


def test_a_version_that_is_not_installed_makes_no_environment(tmp_path):
    path = conda_file(tmp_path / "a.yaml", "numpy")
    path.write_text(re.sub(r"numpy==\S+", "numpy==0.0.1", path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(SystemExit, match="numpy==0.0.1 cannot be had"):
        stand_in_conda.create(path, tmp_path / "a")


class Finished:
    """A working folder in which everything ran with `--sdm conda`."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(small_config(FEWEST)), encoding="utf-8")
        self.command = (
            *("snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--configfile", config),
            *("--sdm", "conda", "--directory", folder, "--cores", 2),
        )
        self.done = self("all", *MORE)

    def __call__(self, *arguments):
        return run(*self.command, *arguments, environment=self.environment, timeout=1500)

    def environments(self):
        """Name of the file in envs/ -> folder of the environment that was made from it."""
        made = {}
        for copy in (self.folder / ".snakemake" / "conda").glob("*.yaml"):
            content = copy.read_bytes()
            made |= {
                path.stem: Path(copy).with_suffix("")
                for path in (ROOT / "envs").glob("*.yaml")
                if path.read_bytes() == content
            }
        return made


@pytest.fixture(scope="module")
def isolated(tmp_path_factory, conda):
    found = Finished(tmp_path_factory.mktemp("all"), conda)
    yield found
    shutil.rmtree(found.folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_rule_runs_in_the_environment_of_its_file(isolated):
    assert isolated.done.returncode == 0, isolated.done.stdout[-6000:]
    assert set(RULES) - set(counted_jobs(isolated.done.stdout)) == NOT_IN_THE_EXAMPLE
    assert set(isolated.environments()) == {environment for environment, _ in RULES.values()}
    assert isolated("--dry-run", "all").stdout.count("Nothing to be done") == 1


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", ABSENT)
def test_no_environment_holds_what_its_rules_do_not_need(isolated, name):
    python = isolated.environments()[name] / "bin" / "python"
    assert imports(python, "import numpy, pandas, zarr, pyarrow")
    for package in ABSENT[name]:
        assert not imports(python, f"import {package}"), package
