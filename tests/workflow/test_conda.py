"""`--sdm conda` with a stand-in for conda: every rule runs in the environment of its file, and in no other."""

import shutil
import subprocess
import sys

import pytest
import stand_in_conda
import yaml
from programs import ENVIRONMENT, ROOT, run
from small_run import FEWEST, MORE, counted_jobs, small_config
from test_environments import RULES

NOT_IN_THE_EXAMPLE = {"download_imagenet"}  # the example starts from random weights; its script is download_pannuke's


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
@pytest.mark.timeout(1600)
def test_every_rule_runs_in_the_environment_of_its_file(tmp_path, conda):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_config(FEWEST)), encoding="utf-8")
    command = ("snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--configfile", config)
    command += ("--sdm", "conda", "--directory", tmp_path, "--cores", 2)
    done = run(*command, "all", *MORE, environment=conda, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:]
    assert set(RULES) - set(counted_jobs(done.stdout)) == NOT_IN_THE_EXAMPLE
    made = {copy.read_bytes() for copy in (tmp_path / ".snakemake" / "conda").glob("*.yaml")}
    assert made == {path.read_bytes() for path in (ROOT / "envs").glob("*.yaml")}
    assert "Nothing to be done" in run(*command, "--dry-run", "all", environment=conda).stdout
    shutil.rmtree(tmp_path)
