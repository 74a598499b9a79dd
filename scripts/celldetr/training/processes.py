"""Several processes that share a run, one per device, started and watched by the one that was asked for it."""

import json
import logging
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
from typing import TYPE_CHECKING, Any

import celldetr
from celldetr.config import Experiment
from celldetr.data.splits import read_split
from celldetr.errors import CellDETRError, ConfigError, InputError
from celldetr.store import open_store
from celldetr.training.errors import Interrupted, NonFinite, ProcessFailed

if TYPE_CHECKING:
    from celldetr.training.loop import Run

GRACE_SECONDS = 20.0
_ERRORS: Mapping[str, type[CellDETRError]] = {
    kind.__name__: kind for kind in (ConfigError, InputError, Interrupted, NonFinite)
}
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launch(run: "Run") -> None:
    """Run all processes of a run and wait for them.

    Signals that tell the run to stop are passed on. When one process fails, the others are ended.

    Raises
    ------
    CellDETRError
        The error of the process that failed first, of its own kind.
    """
    with tempfile.TemporaryDirectory(prefix="celldetr-") as folder:
        job = Path(folder) / "job.json"
        run.split.to_csv(Path(folder) / "split.tsv", sep="\t", index=False)
        job.write_text(json.dumps(_to_job(run, Path(folder))), encoding="utf-8")
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


def _to_job(run: "Run", folder: Path) -> dict[str, Any]:
    def text(path: Path | None) -> str | None:
        return None if path is None else str(Path(path).absolute())

    return {
        "experiment": run.experiment.to_dict(),
        "stores": [text(store.path) for store in run.stores],
        "split": str(folder / "split.tsv"),
        "run_dir": text(run.run_dir),
        "initial": text(run.initial),
        "backbone": text(run.backbone),
        "nucleus_threshold": run.nucleus_threshold,
        "radius": run.radius,
        "threads": run.threads,
        "accelerator": run.accelerator,
        "code": run.code,
    }


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
        [sys.executable, "-m", "celldetr.training.processes", str(job), str(rank)],
        env=environment,
        stdin=subprocess.DEVNULL,
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


def _error(folder: Path, rank: int, code: int) -> CellDETRError:
    report = folder / f"error{rank}.json"
    if report.is_file():
        found = json.loads(report.read_text(encoding="utf-8"))
        return _ERRORS.get(found["kind"], CellDETRError)(found["message"])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return ProcessFailed(f"process {rank} of the run {how}; what it said stands above. Start the run again to go on")


def main(job_path: str, rank: int) -> int:
    """Do the work of one process; an error for people goes into a file for the process that watches."""
    from celldetr.training.loop import Run, run_process

    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    path = Path(job_path)
    job = json.loads(path.read_text(encoding="utf-8"))
    try:
        run_process(
            Run(
                experiment=Experiment.from_dict(job["experiment"]),
                stores=[open_store(store, validate=False) for store in job["stores"]],
                split=read_split(job["split"]),
                run_dir=Path(job["run_dir"]),
                initial=Path(job["initial"]) if job["initial"] else None,
                backbone=Path(job["backbone"]) if job["backbone"] else None,
                nucleus_threshold=job["nucleus_threshold"],
                radius=job["radius"],
                threads=job["threads"],
                accelerator=job["accelerator"],
                code=job["code"],
                rank=rank,
            )
        )
    except CellDETRError as error:
        report = {"kind": type(error).__name__, "message": str(error)}
        (path.parent / f"error{rank}.json").write_text(json.dumps(report), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
