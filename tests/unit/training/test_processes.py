"""One job at a time trains a model; several processes share a run and end with it."""

import contextlib
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
from functools import partial
from pathlib import Path

import pytest
from tiny_training import (
    assert_same_result,
    make_experiment,
    make_split,
    make_ssl_experiment,
    read_log,
    train,
)

from celldetr.model.weights import read_checkpoint
from celldetr.runtime.errors import NonFinite, Occupied, ProcessFailed
from celldetr.training import run_state

HELPERS = Path(__file__).parents[2] / "helpers"


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


def workers(job):
    """Process numbers of the training processes that a process has started (it may start others, short ones)."""
    found = []
    for child in Path(f"/proc/{job}/task/{job}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            if b"celldetr.training.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.fixture
def shared(store, tmp_path):
    """Start a run that two processes share, in a job of its own; wait for its first state."""
    job = start(f"""
        import sys
        from pathlib import Path
        from tiny_training import make_experiment, make_split, train
        from celldetr.store import open_store
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
    assert re.search(r"Interrupted: stopped by SIGUSR1 after step \d+[^\n]*\n$", errors), errors[-2000:]
    assert errors.count("Traceback") <= 2, "only of the job itself: an error and its cause"
    assert state.stat().st_mtime_ns > before
    assert not (state.parents[1] / "model.pt").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").exists(), reason="no /proc here")
def test_the_processes_of_a_killed_job_end_too(shared):
    job, state = shared
    processes = workers(job.pid)
    assert len(processes) == 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    until = time.monotonic() + 30
    while (left := [one for one in processes if Path(f"/proc/{one}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == [], "they outlived their job"
    assert read_checkpoint(state)["step"] > 0


def kill_a_worker():
    """SIGKILL the second of two training processes that this one starts, a moment later."""
    until = time.monotonic() + 60
    while len(workers(os.getpid())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2)
    os.kill(workers(os.getpid())[1], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").exists(), reason="no /proc here")
def test_one_of_two_processes_killed_ends_the_run_with_its_name(store, tmp_path):
    experiment = make_experiment(gpus=2, epochs=500)
    threading.Thread(target=kill_a_worker, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(ProcessFailed, match="process [01] of the run was ended by SIGKILL"):
        train(experiment, [store], make_split(store, 8, 4), tmp_path / "run", accelerator="cpu")
    assert time.monotonic() - start < 120
    assert not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("make", [partial(make_experiment, "parallel", noise={"share": 0.7}), make_ssl_experiment])
def test_two_processes_have_the_losses_of_one(store, slide, tmp_path, make):
    settings = {"model": {"dropout": 0.0}, "cache": "none", "workers": 0}
    store = slide if make is make_ssl_experiment else store
    split = make_split(store, 9, 5)
    train(make(**settings), [store], split, tmp_path / "one")
    train(make(gpus=2, **settings), [store], split, tmp_path / "two", accelerator="cpu")
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert two["train"] == (one["train"] and pytest.approx(one["train"], rel=1e-4))
        for name, value in one["val"].items():
            assert two["val"][name] == pytest.approx(value, rel=1e-3), name


STATISTICS = """
import sys, torch
from celldetr.training.processes import Group
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
norm = torch.nn.BatchNorm1d(2)
norm(torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10 * rank)
before = norm.running_mean.tolist()
Group(rank, 2).share_buffers(norm)
print(before, norm.running_mean.tolist())
"""


@pytest.mark.slow
def test_processes_validate_with_the_statistics_that_are_saved(tmp_path):
    command = (sys.executable, "-c", STATISTICS)
    jobs = [subprocess.Popen([*command, str(rank), tmp_path / "meet"], stdout=-1, text=True) for rank in (0, 1)]
    first, second = (job.communicate(timeout=120)[0].split("] ") for job in jobs)
    assert first[0] != second[0]
    assert first[1] == second[1] == f"{first[0]}]\n"


@pytest.mark.slow
def test_an_error_in_a_process_is_the_error_of_the_run(store, tmp_path):
    experiment = make_experiment(gpus=2, lr=1e30, backbone_lr=1e30, warmup_steps=0, gradient_clip=0.0)
    with pytest.raises(NonFinite, match="fold1:"):
        train(experiment, [store], make_split(store, 8, 4), tmp_path / "run", accelerator="cpu")
