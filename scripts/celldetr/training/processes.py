"""Several processes that share a run, one per device, started and watched by the one that was asked for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import celldetr
from celldetr.runtime.errors import CellDETRError, ConfigError, InputError
from celldetr.training.errors import Interrupted, NonFinite, ProcessFailed
from celldetr.training.run import Run

GRACE_SECONDS = 20.0
_ERRORS: Mapping[str, type[CellDETRError]] = {
    kind.__name__: kind for kind in (ConfigError, InputError, Interrupted, NonFinite)
}
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launch(run: Run) -> None:
    """Run all processes of a run and wait for them.

    Signals that tell the run to stop are passed on. When one process fails, the others are ended.

    Raises
    ------
    CellDETRError
        The error of the process that failed first, of its own kind.
    """
    with tempfile.TemporaryDirectory(prefix="celldetr-") as folder:
        job = run.write(Path(folder))
        processes = [
            _start(job, rank, run.experiment.training.gpus, port)
            for port in [_free_port()]
            for rank in range(run.experiment.training.gpus)
        ]
        pumps = [threading.Thread(target=_pump, args=(process,), daemon=True) for process in processes]
        for pump in pumps:
            pump.start()
        try:
            with _forwarding(processes):
                failed = _wait(processes)
        finally:
            _end(processes)
            for pump in pumps:
                pump.join(timeout=5)
        if failed is not None:
            raise _error(Path(folder), failed, processes[failed].returncode)


def _start(job: Path, rank: int, world: int, port: int) -> "subprocess.Popen[str]":
    library = str(Path(celldetr.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (library, os.environ.get("PYTHONPATH")))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "celldetr.training.child", str(job), str(rank)],
        env=environment,
        stdin=subprocess.PIPE,  # nothing is written: that it ends tells the process that this one is no more
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _pump(process: "subprocess.Popen[str]") -> None:
    """Copy what a process says to our own stderr, whatever that is by now."""
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)


@contextmanager
def _forwarding(processes: "list[subprocess.Popen[str]]") -> Iterator[None]:
    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: "list[subprocess.Popen[str]]") -> int | None:
    """Wait for all; the rank that failed first, or none."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def _end(processes: "list[subprocess.Popen[str]]") -> None:
    """End those that still run: they wait for one that is no more."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        # one that was stopped by the same signal is about to end by itself
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _error(folder: Path, rank: int, code: int) -> CellDETRError:
    report = folder / f"error{rank}.json"
    if report.is_file():
        found = json.loads(report.read_text(encoding="utf-8"))
        return _ERRORS.get(found["kind"], CellDETRError)(found["message"])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return ProcessFailed(f"process {rank} of the run {how}; what it said stands above. Start the run again to go on")
