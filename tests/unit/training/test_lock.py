"""One job at a time trains a model, and none of its processes outlives it."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from tiny_training import assert_same_result, make_experiment, make_split, make_store

from celldetr.model.weights import read_checkpoint
from celldetr.runtime.errors import Occupied
from celldetr.training import run_state
from celldetr.training.loop import train

HELPERS = Path(__file__).parents[2] / "helpers"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "fold1.zarr", 12)


def start(code):
    """Run Python in a process of its own until it says something."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HELPERS,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def other(tmp_path):
    """Return a process that trains in the folder of the run, as far as the lock is concerned."""
    process = start(f"""
        import time
        from pathlib import Path
        from celldetr.training.run_state import run_lock
        with run_lock(Path({str(tmp_path / "run")!r})):
            print("ready", flush=True)
            time.sleep(600)
    """)
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_and_changes_nothing(store, tmp_path, other, monkeypatch):
    monkeypatch.setattr(run_state, "WAIT_SECONDS", 1.0)
    with pytest.raises(Occupied, match=rf"another job trains this model \(process {other.pid} on "):
        train(make_experiment(), [store], make_split(store, 8, 4), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints", "lock"]


def test_a_job_waits_for_one_that_is_about_to_end(store, tmp_path, other):
    train(make_experiment(), [store], make_split(store, 8, 4), tmp_path / "whole")
    threading.Timer(2, other.kill).start()
    started = time.monotonic()
    train(make_experiment(), [store], make_split(store, 8, 4), tmp_path / "run")
    assert time.monotonic() - started > 2
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_no_locks_are_no_reason_to_stop(tmp_path, other, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with run_state.run_lock(tmp_path / "run"):
        assert "no file locks here" in caplog.text


@pytest.fixture
def shared(store, tmp_path):
    """Start a run that two processes share, in a job of its own; wait for its first state."""
    job = start(f"""
        import sys
        from pathlib import Path
        from tiny_training import make_experiment, make_split
        from celldetr.store import open_store
        from celldetr.training.loop import train
        store = open_store({str(store.path)!r})
        print("ready", flush=True)
        train(make_experiment(gpus=2, epochs=5000), [store], make_split(store, 8, 4),
              Path({str(tmp_path / "run")!r}), accelerator="cpu")
    """)
    state, until = tmp_path / "run" / "checkpoints" / "last.ckpt", time.monotonic() + 120
    while not state.exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    yield job, state
    job.kill()
    job.wait()


@pytest.mark.slow
def test_a_signal_stops_all_processes_of_a_run(shared):
    job, state = shared
    before = state.stat().st_mtime_ns
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert re.search(r"Interrupted: stopped by SIGUSR1[^\n]*\n$", errors), errors[-2000:]
    assert errors.count("Traceback") <= 2, "only of the job itself: an error and its cause"
    assert state.stat().st_mtime_ns > before
    assert not (state.parents[1] / "model.pt").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").exists(), reason="no /proc here")
def test_the_processes_of_a_killed_job_end_too(shared):
    job, state = shared
    processes = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(processes) == 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    until = time.monotonic() + 30
    while (left := [one for one in processes if Path(f"/proc/{one}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        os.kill(int(process), signal.SIGKILL)
    assert left == [], "they outlived their job"
    assert read_checkpoint(state)["step"] > 0
