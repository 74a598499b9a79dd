"""Per-rule environments: each holds what its rules import, at the versions of the locks, and nothing it should not."""

import ast
import re
import sys

import programs
import pytest
import yaml
from programs import ROOT, run

from celldetr.config.segmentation import PACKAGES, missing_packages
from celldetr.runtime import provenance

PACKAGE_OF = {
    "PIL": "pillow",
    "cellseg_models_pytorch": "cellseg-models-pytorch",
    "huggingface_hub": "huggingface-hub",
    "openslide": "openslide-python",
    "sklearn": "scikit-learn",
    "spatialdata_io": "spatialdata-io",
    "yaml": "pyyaml",
}
RULES = {
    name: (re.search(r"envs/(\w+)\.yaml", block)[1], re.search(r"scripts/(\w+)\.py", block)[1])
    for name, block in programs.RULES.items()
}


ENVIRONMENTS = sorted(path.stem for path in (ROOT / "envs").glob("*.yaml"))


def canonical_pins(lines):
    """Return canonical name -> pin of lines that hold one."""
    return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines if re.match(r"[^#]+==", line)}


def pins(environment):
    """Return canonical name -> pin of a conda file."""
    content = yaml.safe_load((ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8"))
    return canonical_pins(next(item["pip"] for item in content["dependencies"] if isinstance(item, dict)))


def locked(name):
    """Return canonical name -> pin of a lock."""
    return canonical_pins((ROOT / "envs" / name).read_text(encoding="utf-8").splitlines())


def imported(script):
    """Return the top-level packages that a script and the library below it import."""
    root = ROOT / "scripts"
    waiting, seen, names = [root / f"{script}.py"], set(), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += provenance.imported_files(path, root)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    optional = {"deformops", "triton"}  # torch for CUDA brings Triton
    return names - set(sys.stdlib_module_names) - {"celldetr"} - optional


@pytest.mark.parametrize("rule", RULES)
def test_environment_holds_what_the_rule_imports(rule):
    environment, script = RULES[rule]
    needed = {PACKAGE_OF.get(name, name).lower() for name in imported(script)}
    assert needed
    assert needed <= set(pins(environment)), f"envs/{environment}.yaml lacks packages; see envs/pin.py"


def test_missing_packages_looks_for_what_only_the_systems_import():
    names = imported("train_segmentation") | imported("predict_segmentation")
    ours = pins("training")
    assert {name for name in names if PACKAGE_OF.get(name, name).lower() not in ours} == set(PACKAGES)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_pins_are_those_of_the_locks_and_no_others(environment):
    versions = locked("lock.txt") | (locked("lock-baselines.txt") if environment == "baselines" else {})
    assert pins(environment).items() <= versions.items()
    unneeded = {"tacco", "scanpy", "spatialdata"} if environment in ("training", "cells", "baselines") else {"torch"}
    assert not unneeded & set(pins(environment))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_files_are_those_that_pin_writes(environment):
    if environment == "baselines" and (missing := missing_packages()):
        pytest.skip(f"{', '.join(missing)} not installed; see `make test-baselines`")
    text = (ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8")
    done = run(sys.executable, "-c", f"import pin; print(pin.text({environment!r}), end='')", cwd=ROOT / "envs")
    assert done.stdout == text, "run `python envs/pin.py`"


def test_the_lock_of_the_baselines_holds_only_what_differs():
    base, own = locked("lock.txt"), locked("lock-baselines.txt")
    assert not base.items() & own.items()
    assert set(base) & set(own) == {"torch", "triton"}
