"""Hashes of code, provenance files, and the frame around rule scripts."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest

import celldetr
from celldetr.runtime import provenance
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.runtime.rule import AHEAD_SECONDS, run_rule

SCRIPTS = Path(celldetr.__file__).parents[1]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Make a copy of the scripts whose sources a test may edit."""
    root = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, root, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    monkeypatch.setattr(celldetr, "__file__", str(root / "celldetr" / "__init__.py"))
    return root


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_hash_follows_imports_and_nothing_else(copy):
    before = {name: provenance.source_hash(copy / f"{name}.py") for name in ("train", "score", "convert_pannuke")}
    append(copy / "celldetr" / "training" / "losses.py", "\nEXTRA = 1\n")
    after = {name: provenance.source_hash(copy / f"{name}.py") for name in before}
    assert before["train"] != after["train"]
    assert before["score"] == after["score"]
    assert before["convert_pannuke"] == after["convert_pannuke"]
    append(copy / "celldetr" / "runtime" / "errors.py", "\nEXTRA = 1\n")
    assert all(provenance.source_hash(copy / f"{name}.py") != after[name] for name in before)


def test_comments_docstrings_and_layout_do_not_count(copy):
    before = provenance.source_hash(copy / "train.py")
    path = copy / "celldetr" / "runtime" / "errors.py"
    text = path.read_text(encoding="utf-8")
    path.write_text("# a comment\n" + text.replace("An error whose", "Some error whose"), encoding="utf-8")
    assert provenance.source_hash(copy / "train.py") == before


def test_data_rules_never_import_torch():
    """Nor does anything they import: their environments do not hold it."""
    root = SCRIPTS
    for name in (
        "download",
        "convert_pannuke",
        "split_pannuke",
        "make_example",
        "score",
        "table",
        "figure3",
        "overlays",
    ):
        waiting, seen = [root / f"{name}.py"], set()
        while waiting:
            file = waiting.pop()
            if file not in seen:
                seen.add(file)
                text = file.read_text(encoding="utf-8")
                assert not re.search(r"^\s*(import|from) torch\b", text, re.M), f"{name}.py reaches {file}"
                waiting += provenance.imported_files(file, root)


def test_provenance_file_says_where_a_result_came_from(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("abc")
    provenance.write_provenance(tmp_path / "p.json", settings={"lr": 0.1}, inputs=[source], seed=3)
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["inputs"][str(source)] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record["settings"] == {"lr": 0.1}
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


def test_output_appears_only_when_complete(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")

    def fail():
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    target = tmp_path / "folder"
    with atomic(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("1")
    with atomic(target) as temporary:
        assert not temporary.exists()
        temporary.mkdir()
    assert list(target.iterdir()) == []


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "shown", "hidden"),
    [
        (InputError("say"), "error: say", "Traceback"),
        (KeyError("k"), "Traceback", "error: "),
        (OSError(errno.ENOSPC, "No space", "a.zarr"), "error: a.zarr: the disk is full; free some space", "Traceback"),
        (OSError(errno.EROFS, "Read-only", "a.zarr"), "error: a.zarr: the file system is read-only", "Traceback"),
        (OSError(errno.EINVAL, "wrong"), "Traceback", "error: "),
        (MemoryError("2 GiB"), "error: out of memory (2 GiB); give the rule more mem_mb", "Traceback"),
        (OSError(errno.ENOMEM, "Cannot allocate"), "Cannot allocate); give the rule more mem_mb", "Traceback"),
        (RuntimeError("can't start new thread"), "error: out of memory (can't start new thread); give", "Traceback"),
        (RuntimeError("can't allocate lock"), "error: out of memory (can't allocate lock); give", "Traceback"),
        (
            RuntimeError("CUDA out of memory. Tried"),
            "set training.activation_checkpointing: true or",
            "mem_mb",
        ),
        (RuntimeError("wrong shape"), "Traceback", "error: "),
        (
            caused(InputError("a.zarr: damaged"), MemoryError()),
            "error: a.zarr: damaged\nOr it is whole, and",
            "Traceback",
        ),
        (BrokenProcessPool("gone"), "error: a worker process was killed, most likely because the memory", "Traceback"),
    ],
)
def test_rule_frame_writes_the_log_and_exits_with_1(tmp_path, capsys, error, shown, hidden):
    def main(snakemake):
        raise error

    log = tmp_path / "logs" / "rule.log"
    with pytest.raises(SystemExit) as stop:
        run_rule(main, SimpleNamespace(log=[str(log)]))
    assert stop.value.code == 1
    assert shown in log.read_text()
    assert hidden not in log.read_text()
    assert shown in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_stops_nothing(capsys):
    def main(snakemake):
        sys.stdout.write("said\n")
        done.append(snakemake)

    done = []
    run_rule(main, SimpleNamespace(log=["/dev/full"]))
    assert len(done) == 1
    assert capsys.readouterr().out == "said\n"

    def fails(snakemake):
        raise InputError("say " * 5000)

    with pytest.raises(SystemExit) as stop:
        run_rule(fails, SimpleNamespace(log=["/dev/full"]))
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: say say")


def test_a_crash_leaves_its_line_in_the_log(tmp_path):
    log = tmp_path / "a.log"
    program = "import os, signal\nfrom types import SimpleNamespace\nfrom celldetr.runtime.rule import run_rule\n"
    program += "def crashes(snakemake):\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    program += f"run_rule(crashes, SimpleNamespace(log=[{str(log)!r}]))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in log.read_text()
    assert "in crashes" in log.read_text()


def test_a_log_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "logs").touch()
    with pytest.raises(SystemExit):
        run_rule(print, SimpleNamespace(log=[str(tmp_path / "logs" / "a.log")]))
    assert str(tmp_path / "logs") in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_error_of_a_full_disk_names_what_was_written(tmp_path):
    with (
        pytest.raises(OSError, match=re.escape(str(tmp_path / "a.pt"))),
        atomic(tmp_path / "a.pt"),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_an_input_from_the_future_is_refused_before_anything_is_done(tmp_path, capsys, kind):
    """Snakemake would remove the results afterwards, because they are older than the input."""
    path, stamp = tmp_path / "input", tmp_path / "input"
    if kind == "folder":
        path.mkdir()
        stamp = path / ".snakemake_timestamp"
    stamp.touch()
    job = SimpleNamespace(log=[str(tmp_path / "rule.log")], input=[str(path), str(tmp_path / "gone")])
    done = []
    for ahead in (-1000, AHEAD_SECONDS / 2):
        os.utime(stamp, (time.time() + ahead,) * 2)
        run_rule(done.append, job)
    assert done == [job, job]
    os.utime(stamp, (time.time() + 2 * AHEAD_SECONDS,) * 2)
    if kind == "link":
        (tmp_path / "link").symlink_to(path)
        job.input = [str(tmp_path / "link")]
    with pytest.raises(SystemExit):
        run_rule(done.append, job)
    assert done == [job, job]
    shown = capsys.readouterr().err
    assert re.search(rf"error: {job.input[0]}: was changed at .* touch {job.input[0]}", shown)


def test_revision_is_that_of_the_checkout():
    top = Path(celldetr.__file__).parents[2]
    head = subprocess.run(
        ["git", "-C", str(top), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert provenance.git_revision().rstrip("+") == head.strip()
