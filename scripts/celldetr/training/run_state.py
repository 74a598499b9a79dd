"""The state of a run on disk: from it the run continues at its very next step. One job at a time may train a run.

A state is copied to the host between two steps and written by a thread while training goes on.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celldetr.model.weights import read_checkpoint, write_checkpoint
from celldetr.runtime.errors import InputError, Occupied

FORMAT = 6
WAIT_SECONDS = 120.0
"""How long a job waits for another one to end: Slurm gives a cancelled job 30 s, and its successor may start before."""
_HELD = (errno.EACCES, errno.EAGAIN)

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Context with a thread that writes files, one job at a time; its end waits for the job under way."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._job: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the one before has ended; raises the error of that one."""
        self.check(wait=True)
        self._job = self._thread.submit(job)

    def check(self, *, wait: bool = False) -> None:
        """Raise the error of a job that has ended; with `wait` once it has."""
        if self._job is not None and (wait or self._job.done()):
            job, self._job = self._job, None
            job.result()


def snapshot(values: Any) -> Any:
    """Copy nested mappings and lists, with their tensors on the host; from a GPU into pinned memory, waiting once."""
    copied = _on_host(values)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value


def write_state(path: Path, identity: Mapping[str, Any], **state: Any) -> None:
    """Write the state of a run; the file before it stays until this one is complete.

    Beside its identity: ``record`` (of where and on what it started), ``step``, ``model`` and ``optimizer`` (state
    dicts), ``sums`` and ``seconds`` (losses and training time of the unfinished epoch), ``history`` (lines of the log),
    ``best`` (epoch and score of the best epoch, or None).
    """
    write_checkpoint(path, {"training_format": FORMAT, "identity": dict(identity), **state})


def read_state(path: Path, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read the state that a run left; None if there is none, or if its identity changed.

    `celldetr.training.run.identified` makes the identity.

    From the state of a finished run its results are written again without training, as they may have been lost with an
    aborted job.

    Raises
    ------
    InputError
        The file is damaged.
    """
    if not path.exists():
        return None
    try:
        state = read_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}\nDelete {path} to train from the start") from error
    if state.get("training_format") != FORMAT:
        log.warning("%s is of another version of celldetr: training from the start", path)
        return None
    if changed := _differences(state["identity"], identity):
        log.warning("training from the start, because this changed since %s:\n  %s", path, "\n  ".join(changed))
        return None
    log.info("continuing from %s at step %d", path, state["step"])
    return state


def _differences(was: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        names = [*was, *(name for name in now if name not in was)]
        return [
            line
            for name in names
            for line in _differences(was.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if was == now else [f"{key}: was {was!r}, now {now!r}"]


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run; it is released when the process exits, however it exits.

    Two jobs that write the same checkpoints would damage them: one that outlived its Snakemake may still be running.
    On a file system without locks nothing is checked.

    Raises
    ------
    Occupied
        Another job holds the lock and did not end within `WAIT_SECONDS`.
    """
    path = run_dir / "checkpoints" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for_lock(file, run_dir)
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its holder's name
            os.ftruncate(file, 0)
            os.pwrite(file, holder.encode(), 0)
        yield
    finally:
        os.close(file)


def _wait_for_lock(file: int, run_dir: Path) -> None:
    deadline, announced = time.monotonic() + WAIT_SECONDS, False
    while not _try_lock(file):
        holder = os.pread(file, 1000, 0).decode(errors="replace")
        if time.monotonic() > deadline:
            raise Occupied(
                f"{run_dir}: another job trains this model ({holder}), most likely started by a Snakemake that was "
                "killed. Wait until it has ended, or end it (kill, scancel), then start again to continue its run"
            )
        if not announced:
            log.info("waiting for another job that trains this model (%s) to end", holder)
            announced = True
        time.sleep(0.5)


def _try_lock(file: int) -> bool:
    """Take the lock if it is free. It belongs to this process alone; loader processes do not share it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        log.warning("no file locks here (%s): make sure that no other job trains this model", error)
    return True
