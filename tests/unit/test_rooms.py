"""The arrows between the rooms of the library: which room may import which, and where PyTorch may be imported."""

import ast
from pathlib import Path

import pytest

import celldetr

LIBRARY = Path(celldetr.__file__).parent
DATA = {"config", "runtime", "fetch", "store", "slides"}
BELOW = {
    "runtime": set(),
    "config": {"runtime"},
    "fetch": {"config", "runtime"},
    "store": {"config", "runtime"},
    "slides": {"config", "runtime", "fetch", "store"},
    "pannuke": DATA,
    "xenium": DATA,
    "model": DATA,
    "segmentation": DATA | {"model"},
    "evaluation": DATA | {"pannuke", "xenium"},
    "training": DATA | {"pannuke", "xenium", "model", "segmentation", "evaluation"},
    "inference": DATA | {"pannuke", "xenium", "model", "segmentation", "evaluation", "training"},
    "cells": DATA | {"model", "evaluation", "inference"},
    "report": DATA | {"pannuke", "xenium", "model", "evaluation", "training", "inference", "cells"},
    "example": DATA | {"pannuke", "xenium", "model", "evaluation"},
}
"""Room -> rooms that it may import. A program (``__main__``), which nothing imports, may use all."""
TORCH = {"model", "segmentation", "training", "inference", "cells"}
"""Rooms that may import PyTorch and what is built on it."""


def imports(path):
    """Names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path):
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


IMPORTS = {module_name(path): imports(path) for path in sorted(LIBRARY.rglob("*.py"))}
ROOMS = {name.split(".")[1] for name in IMPORTS if "." in name}


def test_every_room_has_its_arrows():
    assert set(BELOW) == ROOMS


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_rooms_below_it(room):
    found = {
        (module, name)
        for module, names in IMPORTS.items()
        for name in names
        if module.split(".")[1:2] == [room] and not module.endswith("__main__") and name.startswith("celldetr.")
    }
    wrong = {(module, name) for module, name in found if name.split(".")[1] not in BELOW[room] | {room, "__version__"}}
    assert wrong == set()


def test_the_rooms_have_levels():
    """No two rooms may import each other, not even through others."""
    left = dict(BELOW)
    while left:
        lowest = {room for room, below in left.items() if not below & set(left)}
        assert lowest, f"these rooms import each other: {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in lowest}


def test_pytorch_stays_in_its_rooms():
    torch = {"torch", "torchvision", "timm", "monai", "cellseg_models_pytorch", "lightning", "deformops", "triton"}
    users = {module for module, names in IMPORTS.items() if torch & {name.split(".")[0] for name in names}}
    assert {module.split(".")[1] for module in users} <= TORCH, sorted(users)


def test_no_modules_import_each_other():
    left = {module: {name for name in names if name in IMPORTS} - {module} for module, names in IMPORTS.items()}
    while left:
        done = {module for module, names in left.items() if not names & set(left)}
        assert done, f"an import cycle goes through some of {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in done}
