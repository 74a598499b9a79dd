"""Files of results: complete or not there."""

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, held, link_or_copy, making, read_npz, write_npz


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


def test_two_jobs_with_one_output_do_not_mix(tmp_path, monkeypatch):
    """One outlived its driver; each publishes what it wrote itself, as a whole."""
    target = tmp_path / "folder"

    def write(process):
        monkeypatch.setattr(os, "getpid", lambda: process)
        with atomic(target) as temporary:
            temporary.mkdir()
            (temporary / "first").write_text(str(process))
            yield
            (temporary / "second").write_text(str(process))

    processes = (os.getpid(), os.getppid())
    jobs = [write(process) for process in processes]
    for job in jobs:
        next(job)
    for job, process in zip(jobs, processes, strict=True):
        assert list(job) == []
        assert {path.name: path.read_text() for path in target.iterdir()} == {
            "first": str(process),
            "second": str(process),
        }
    assert list(tmp_path.iterdir()) == [target]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_kept(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    here, names = socket.gethostname(), [f"{os.getppid()}", f"{killed.pid}", f"{killed.pid}.old"]
    left = [tmp_path / f".a.incomplete.{host}.{name}" for host in (here, "elsewhere") for name in names]
    old = tmp_path / ".a.incomplete.elsewhere.77"
    for path in (*left, old):
        path.mkdir()
    os.utime(old, (0, 0))
    with atomic(tmp_path / "a") as temporary:
        temporary.touch()
    assert set(tmp_path.iterdir()) == {tmp_path / "a", left[0], *left[3:]}


def test_what_one_job_continues_after_another_has_one_writer(tmp_path):
    with (
        held(tmp_path),
        pytest.raises(InputError, match=f"{tmp_path}: another job writes it"),
        held(tmp_path),
    ):
        pass
    with held(tmp_path):
        pass


def test_a_folder_that_is_held_stays_and_an_empty_one_goes(tmp_path):
    folder = tmp_path / "there" / "out" / ".work"
    (tmp_path / "there").mkdir()
    with making(folder):
        with pytest.raises(InputError, match=r"\.work: another job writes it"), making(folder):
            pass
        assert folder.exists()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with making(folder):
        (folder / "part").touch()
    assert (folder / "part").exists()


def test_a_link_to_the_same_file_is_written_again(tmp_path):
    """A rename onto another link to the same file does nothing, and would leave the temporary name."""
    (tmp_path / "source").write_text("1")
    for _ in range(2):
        with atomic(tmp_path / "target") as temporary:
            link_or_copy(tmp_path / "source", temporary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_error_of_a_full_disk_names_what_was_written(tmp_path):
    with (
        pytest.raises(OSError, match=re.escape(str(tmp_path / "a.pt"))),
        atomic(tmp_path / "a.pt"),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


@dataclass
class Content:
    values: NDArray[np.int64]


def test_arrays_come_back_and_an_incomplete_file_is_refused(tmp_path):
    path = tmp_path / "points.npz"
    write_npz(path, Content(np.arange(1000)))
    np.testing.assert_array_equal(read_npz(path, Content, "attention")["values"], np.arange(1000))
    whole = path.read_bytes()
    for share in (0.0, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"points\.npz: .*file of the attention rule; run that rule again"):
            read_npz(path, Content, "attention")
