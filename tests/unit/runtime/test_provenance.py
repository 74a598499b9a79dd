"""Hashes of code, and provenance files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import celldetr
from celldetr.runtime import provenance

SCRIPTS = Path(celldetr.__file__).parents[1]
ROOT = SCRIPTS.parent


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Make a copy of the scripts whose sources a test may edit."""
    root = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, root, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    monkeypatch.setattr(celldetr, "__file__", str(root / "celldetr" / "__init__.py"))
    return root


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, path
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def hashes(root):
    return {path.stem: provenance.source_hash(path) for path in root.glob("*.py")}


def changed(root, before):
    return {name for name, value in hashes(root).items() if value != before[name]}


def test_an_edit_changes_the_hashes_of_what_imports_it(copy):
    before = hashes(copy)
    append(copy / "celldetr" / "model" / "boxes.py", "\nEXTRA = 1\n")
    found = changed(copy, before)
    assert {"train", "predict"} <= found
    assert not found & {"score", "convert_pannuke", "register_xenium", "table", "figure3"}
    append(copy / "celldetr" / "__init__.py", "\nEXTRA = 1\n")
    assert changed(copy, before) == set(before)


def test_the_look_of_a_picture_reruns_reports_only(copy):
    before = hashes(copy)
    for module in (copy / "celldetr" / "report").glob("*.py"):
        append(module, "\nEXTRA = 1\n")
    found = changed(copy, before)
    assert found == {
        *("figure3", "figure4b", "figure4c", "figure5a", "figure5b", "learning_curves", "overlays", "table"),
        "cells_page",
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("segmentation/hover_net", {"train_segmentation", "predict_segmentation"}),
        ("segmentation/cellvit_losses", {"train_segmentation", "predict_segmentation"}),
        ("training/segmentation", {"train_segmentation"}),
        ("training/loop", {"train", "train_segmentation"}),
        ("inference/segment", {"predict_segmentation"}),
    ],
)
def test_an_edit_of_other_systems_leaves_celldetr_alone(copy, module, expected):
    before = hashes(copy)
    append(copy / "celldetr" / f"{module}.py", "\nEXTRA = 1\n")
    assert changed(copy, before) == expected


def test_words_and_layout_do_not_count(copy):
    before = hashes(copy)
    for frame in ("runtime/rule.py", "runtime/errors.py", "runtime/provenance.py", "config/base.py"):
        append(copy / "celldetr" / frame, "\nMESSAGE = 'another text'\n")
    append(copy / "celldetr" / "runtime" / "files.py", "# a comment\n")
    edit(copy / "celldetr" / "runtime" / "files.py", '"""Write JSON', '"""Write any JSON')
    convert = copy / "celldetr" / "pannuke" / "convert.py"
    edit(convert, '"the conversion is wrong: please report it"', 'f"please report {sha256}"')
    edit(convert, 'log.info("%d of %d images', 'log.warning("image %d of %d')
    edit(copy / "celldetr" / "config" / "experiment.py", 'description="learning rate"', 'description="the rate"')
    assert changed(copy, before) == set()
    edit(convert, "raise InputError(", "raise ValueError(")
    assert changed(copy, before) == {"convert_pannuke"}


def test_hashes_do_not_depend_on_the_version_of_python(tmp_path):
    """Otherwise a machine with another Python would train all models again."""
    script = tmp_path / "script.py"
    script.write_text("@cache\ndef f(x, *, y=None):\n    return [f'{x!r:>4}', y, g()]\n", encoding="utf-8")
    assert provenance.source_hash(script) == "f1cf68f3e909f445"


def test_provenance_file_says_where_a_result_came_from(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("abc")
    settings = {"lr": 0.1, "urls": ["https://me:S3cret@host/a?sig=S3cret", "https://host/b"]}
    provenance.write_provenance(tmp_path / "p.json", settings=settings, inputs=[source], seed=3)
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["inputs"][str(source)] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record["settings"] == {"lr": 0.1, "urls": ["https://***@host/a?***", "https://host/b"]}
    assert record["seed"] == 3
    assert record["versions"]["python"] == sys.version.split()[0]
    assert len(record["git_revision"]) >= 7


def test_folder_checksum_sees_names_and_contents(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = provenance.sha256(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    second = provenance.sha256(tmp_path / "d")
    (tmp_path / "d" / "b").write_text("2")
    assert len({first, second, provenance.sha256(tmp_path / "d")}) == 3


def test_revision_is_that_of_the_checkout():
    top = Path(celldetr.__file__).parents[2]
    head = subprocess.run(
        ["git", "-C", str(top), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert provenance.git_revision().rstrip("+") == head.strip()
