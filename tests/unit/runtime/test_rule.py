"""The frame around the scripts of rules."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
from named_inputs import files, job_with

from celldetr.runtime.errors import ConfigError, InputError, ProcessFailed, masked
from celldetr.runtime.rule import AHEAD_SECONDS, RUN_VARIABLE, run_rule, user_named


def caused(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space", "a.zarr")
READ_ONLY = OSError(errno.EROFS, "Read-only", "a.zarr")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("say"), "say"),
        (FULL, "a.zarr: the disk is full; free some space"),
        (READ_ONLY, "a.zarr: the file system is read-only"),
        (MemoryError("2 GiB"), "out of memory (2 GiB); give the rule more mem_mb"),
        (OSError(errno.ENOMEM, "Cannot allocate"), "out of memory ([Errno 12] Cannot allocate); give the rule more"),
        (RuntimeError("can't start new thread"), "out of memory (can't start new thread); give"),
        (RuntimeError("CUDA out of memory."), "out of memory (CUDA out of memory.); set training.activation_check"),
        (caused(InputError("a.zarr: damaged"), MemoryError()), "a.zarr: damaged\nOr the file is good and"),
        (BrokenProcessPool("gone"), "a worker process was killed, most likely because the memory"),
        *((error, None) for error in (KeyError("k"), OSError(errno.EINVAL, "wrong"), RuntimeError("wrong shape"))),
    ],
)
def test_rule_frame_writes_the_log_and_exits_with_1(tmp_path, capsys, error, message):
    """An error that a user cannot correct has a traceback instead of a message."""

    def main(snakemake):
        raise error

    log = tmp_path / "logs" / "rule.log"
    with pytest.raises(SystemExit) as stop:
        run_rule(main, SimpleNamespace(log=[str(log)]))
    assert stop.value.code == 1
    shown = log.read_text()
    assert ("Traceback" in shown, "error: " in shown) == (message is None, message is not None)
    assert f"error: {message}" in shown or message is None
    assert shown in capsys.readouterr().err


def test_messages_and_the_log_call_files_what_the_user_calls_them(tmp_path, capsys):
    """A link or a copy below results/raw is none of the user's files; but its time is."""
    raw = {"he": "results/raw/s/he.tif", "outs": "results/raw/s/outs", "alignment": [], "cells": "results/c.parquet"}
    place = "row s of the sheet, column "
    given = {"he": {"path": "my/{a}.svs", "place": place + "he"}, "outs": {"path": None, "place": place + "outs"}}
    given["alignment"] = {"path": "a.csv", "place": place + "alignment"}
    job = SimpleNamespace(log=[str(tmp_path / "rule.log")], params=SimpleNamespace(given=given))
    job.input = type("Inputs", (tuple,), {"get": raw.get})()

    def main(snakemake):
        logging.getLogger("x").warning("%s: large", raw["he"])
        raise InputError(f"{raw['he']} and {raw['outs']}/dapi.tif do not fit")

    with pytest.raises(SystemExit):
        run_rule(main, job)
    for shown in (capsys.readouterr().err, (tmp_path / "rule.log").read_text()):
        assert "my/{a}.svs: large" in shown
        assert (
            "error: my/{a}.svs and results/raw/s/outs/dapi.tif do not fit (my/{a}.svs: row s of the sheet, column he; "
            "results/raw/s/outs: row s of the sheet, column outs)\n"
        ) in shown


HE, OUTS = ("my/he: row s, column he of sheet.tsv", "my/outs: row s, column outs of sheet.tsv")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("results/raw/s/he.tif: damaged", f"my/he: damaged ({HE})"),
        (f"{Path('results/raw/s/he.tif').absolute()}: damaged", f"my/he: damaged ({HE})"),
        ("panel and reference: got 0 genes", f"panel and reference: got 0 genes ({HE}; {OUTS})"),
        ("results/c.parquet: damaged", "results/c.parquet: damaged"),
    ],
)
def test_a_message_says_where_its_files_are_named(tmp_path, capsys, message, shown):
    """Also one that names no input; one about a file of the workflow does not send the user to the sheet."""
    named = files(he="results/raw/s/he.tif", outs="results/raw/s/outs", cells="results/c.parquet")
    with pytest.raises(SystemExit):
        run_rule(failing(InputError(message), []), job_with(tmp_path, "he", "outs", input=named))
    assert capsys.readouterr().err == f"error: {shown}\n"


def test_a_download_that_fails_says_where_its_file_is_named(tmp_path, capsys):
    job = job_with(tmp_path, "he", input=files(), output=files(he="results/raw/s/he.tif"))
    with pytest.raises(SystemExit):
        run_rule(failing(InputError("results/raw/s/he.tif: no source delivered the file"), []), job)
    assert capsys.readouterr().err == f"error: my/he: no source delivered the file ({HE})\n"


def test_pages_and_pictures_have_the_names_of_the_user(tmp_path):
    """Only while the rule runs, which reads these files."""
    found = []

    def main(snakemake):
        found.extend(map(user_named, texts))

    texts = ["he.tif", "results/raw/s/he.tif cannot be opened", "not he.tif"]
    run_rule(main, job_with(tmp_path, "he", input=files(he="results/raw/s/he.tif")))
    assert found == ["my/he", "my/he cannot be opened", "not he.tif"]
    assert list(map(user_named, texts)) == texts


def failing(error, calls):
    """Return the work of a rule, which counts its calls and raises an error unless that is None."""

    def main(snakemake):
        calls.append(error)
        if error is not None:
            raise error

    return main


REFUSED = InputError("results/x: wrong species")


def attempts(job, *errors):
    """Run a job, whose attempts would end in these errors; return which attempts did any work."""
    work = []
    for number, error in enumerate(errors):
        calls = []
        try:
            run_rule(failing(error, calls), job)
        except SystemExit as stop:
            assert stop.code  # noqa: PT017 - also of an attempt that ends at once
        work += [number] * len(calls)
    return work


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Return a job of a run of Snakemake, with an input that is older than its log."""
    monkeypatch.setenv(RUN_VARIABLE, "first")
    path = tmp_path / "input.csv"
    path.touch()
    os.utime(path, (time.time() - 100,) * 2)
    return job_with(tmp_path, "he", input=files(he=path))


def test_what_is_refused_is_not_tried_again_in_a_run(tried):
    """The next attempts say the same. Snakemake removes the log before each."""
    assert attempts(tried, REFUSED) == [0]
    log, shown = Path(tried.log[0]), f"error: {REFUSED} ({HE})\n"
    for _ in range(2):
        assert log.read_text() == shown
        log.unlink()
        assert attempts(tried, None) == []
    assert log.read_text() == shown


def test_a_damaged_file_is_not_tried_again(tried):
    """Libraries say so by an error of the system without a number."""
    assert attempts(tried, caused(InputError("a.h5: cannot be read"), OSError("truncated file")), None) == [0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("2 GiB"),
        caused(InputError("a.h5: damaged"), MemoryError()),
        caused(InputError("a.h5: cannot be read"), OSError(errno.EIO, "Input/output error")),
        caused(InputError("a.h5: cannot be read"), BrokenProcessPool("gone")),
        FULL,
        ProcessFailed("killed"),
        ConfigError("training.gpus: got 2, expected at most 1 here"),
        KeyError("k"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(tried, error):
    assert attempts(tried, error, error, None) == [0, 1, 2]


def test_an_error_of_the_system_that_a_message_hides_is_tried_again(tried):
    """`raise ... from None` leaves it in the context."""
    hidden = InputError("a.h5: damaged")
    hidden.__context__, hidden.__suppress_context__ = OSError(errno.EIO, "Input/output error"), True
    assert attempts(tried, hidden, None) == [0, 1]


@pytest.mark.parametrize("changed", ["run", "newer input", "older input", "parameter", "no run", "no input"])
def test_a_refusal_holds_for_its_run_inputs_and_parameters(tried, tmp_path, monkeypatch, changed):
    """A job without inputs gets something from a server, and outside a run there are no attempts."""
    if changed == "no run":
        monkeypatch.delenv(RUN_VARIABLE)
    if changed == "no input":
        tried.input = files()
    assert attempts(tried, REFUSED) == [0]
    if changed == "run":
        monkeypatch.setenv(RUN_VARIABLE, "second")
    if changed == "newer input":
        os.utime(tried.input[0], (time.time() + 10,) * 2)
    if changed == "older input":  # cp -p
        os.utime(tried.input[0], (time.time() - 200,) * 2)
    if changed == "parameter":
        tried.params.label_column = "cell_type"
    assert attempts(tried, None, None) == [0, 1]
    assert changed.startswith("no ") or list(tmp_path.glob(".*")) == []


def test_an_input_that_is_mended_during_the_first_attempt_is_tried_again(tried):
    def main(snakemake):
        Path(snakemake.input[0]).write_text("mended")
        raise REFUSED

    with pytest.raises(SystemExit):
        run_rule(main, tried)
    assert attempts(tried, None) == [0]


def test_a_damaged_refusal_is_forgotten(tried, tmp_path):
    assert attempts(tried, REFUSED) == [0]
    [kept] = tmp_path.glob(".*.refused")
    kept.write_bytes(b"\xff" + kept.read_bytes())
    assert attempts(tried, None) == [0]
    assert not kept.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_credentials_of_urls_are_in_no_log(tmp_path, capsys):
    url, other = "https://me:p@ss@host/a.svs?sig=S3cret&x=1", "s3://me:S3cret@bucket/b?S3cret=1"

    def main(snakemake):
        logging.getLogger("x").warning("%s: again", url)
        raise KeyError(f"{url} and (url: {other})")

    with pytest.raises(SystemExit):
        run_rule(main, SimpleNamespace(log=[str(tmp_path / "rule.log")]))
    for text in (*capsys.readouterr(), (tmp_path / "rule.log").read_text()):
        assert "S3cret" not in text
        assert "p@ss" not in text
    assert "https://***@host/a.svs?***: again" in (tmp_path / "rule.log").read_text()
    assert masked("is it host/a? b=1") == "is it host/a? b=1"


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
