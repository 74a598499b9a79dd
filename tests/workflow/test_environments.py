"""Per-rule environments: each holds what its rules import, at the versions of the lock, and nothing it should not."""

import ast
import re
import sys

import programs
import pytest
import yaml
from programs import ROOT, run

from celldetr.runtime import provenance

PACKAGE_OF = {
    "PIL": "pillow",
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


def pins(environment):
    """Return canonical name -> pin of a conda file."""
    content = yaml.safe_load((ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8"))
    lines = next(item["pip"] for item in content["dependencies"] if isinstance(item, dict))
    return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines}


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


@pytest.mark.parametrize("environment", sorted({environment for environment, _ in RULES.values()}))
def test_pins_are_those_of_the_lock_and_no_others(environment):
    lock = set((ROOT / "envs" / "lock.txt").read_text(encoding="utf-8").splitlines())
    assert set(pins(environment).values()) <= lock
    unneeded = {"tacco", "scanpy", "spatialdata"} if environment in ("training", "cells") else {"torch"}
    assert not unneeded & set(pins(environment))
    text = (ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8")
    done = run(sys.executable, "-c", f"import pin; print(pin.text({environment!r}), end='')", cwd=ROOT / "envs")
    assert done.stdout == text, "run `python envs/pin.py`"
