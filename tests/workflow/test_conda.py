"""`--sdm conda` with a stand-in for conda: rules run in the environment of their file, and in no other."""

import subprocess
import sys

import pytest
import stand_in_conda
import yaml
from programs import ENVIRONMENT, ROOT, run
from small_run import counted_jobs
from test_environments import RULES

from celldetr.config.segmentation import missing_packages

SOME_OF_EACH = {  # what packages load when they are used, such as readers of Parquet and JPEG, is seen by running only
    "data": ("convert_pannuke",),
    "report": ("table", "overlays"),
    "spatial": ("annotate_xenium", "extract_slide"),
    "training": ("predict",),
    "cells": ("detect_slide",),
    "baselines": ("predict_segmentation",),
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


def test_an_environment_holds_what_its_file_pins_and_nothing_else(tmp_path):
    locked = (ROOT / "envs" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in locked if line.startswith(("numpy==", "packaging=="))]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"dependencies": ["python", {"pip": pins}]}), encoding="utf-8")
    stand_in_conda.create(tmp_path / "a.yaml", tmp_path / "a")
    python = tmp_path / "a" / "bin" / "python"
    assert imports(python, "import numpy, packaging.version, snakemake.logging; numpy.linalg.inv([[2.0]])")
    for name in ("pandas", "requests", "yaml.nodes", "torch"):
        assert not imports(python, f"import {name}")
    assert imports(python, "import importlib.util as u; assert u.find_spec('pandas') is None")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("environments", [set(SOME_OF_EACH) - {"baselines"}, {"baselines"}], ids=["ours", "baselines"])
def test_rules_run_and_all_scripts_can_be_imported_in_their_environment(request, environments):
    """Some rules of each environment run; whatever the scripts of the others import is there, too."""
    if environments == {"baselines"} and (missing := missing_packages()):
        pytest.skip(f"{', '.join(missing)} not installed; see `make test-baselines`")
    finished, work, conda = map(request.getfixturevalue, ("finished", "work", "conda"))
    rules = [rule for name in environments for rule in SOME_OF_EACH[name]]
    chosen = ("--allowed-rules", *rules, "--force", *(finished.job(rule)[1].output[0] for rule in rules))
    done = work.snakemake("--sdm", "conda", *chosen, **conda)
    assert done.returncode == 0, done.stdout[-6000:]
    assert set(counted_jobs(done.stdout)) == set(rules)
    names = {path.read_bytes(): path.stem for path in (ROOT / "envs").glob("*.yaml")}
    made = {names[copy.read_bytes()]: copy for copy in (work.work / ".snakemake" / "conda").glob("*.yaml")}
    assert set(made) == environments
    for name, copy in made.items():
        scripts = ", ".join(sorted({script for environment, script in RULES.values() if environment == name}))
        statement = f"sys.path.append({str(ROOT / 'scripts')!r}); import {scripts}"
        assert imports(copy.with_suffix("") / "bin" / "python", statement), (name, scripts)


def test_some_rules_of_each_environment_are_run():
    assert set(SOME_OF_EACH) >= {environment for environment, _ in RULES.values()}
