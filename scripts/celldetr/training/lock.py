"""One job at a time trains a model: one that outlived the Snakemake that started it may still be at work."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from celldetr.training.errors import Occupied

WAIT_SECONDS = 120.0
"""How long a job waits for another one to end: Slurm gives a cancelled job 30 s, and the next may start before."""
_HELD = (errno.EACCES, errno.EAGAIN)

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run; it ends with the process, however that ends.

    Two jobs that write the same checkpoints would damage them. On a file system without locks nothing is checked.

    Raises
    ------
    Occupied
        Another job holds the lock, and did not end while this one waited.
    """
    path = run_dir / "checkpoints" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait(file, run_dir)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.ftruncate(file, 0)
            os.pwrite(file, _self().encode(), 0)
        yield
    finally:
        os.close(file)


def _wait(file: int, run_dir: Path) -> None:
    until, told = time.monotonic() + WAIT_SECONDS, False
    while not _taken(file):
        holder = os.pread(file, 1000, 0).decode(errors="replace")
        if time.monotonic() > until:
            raise Occupied(
                f"{run_dir}: another job trains this model ({holder}), most likely started by a Snakemake that was "
                "killed. Wait until it has ended, or end it (kill, scancel), and start again to go on where it stopped"
            )
        if not told:
            log.info("waiting for another job that trains this model (%s) to end", holder)
            told = True
        time.sleep(0.5)


def _taken(file: int) -> bool:
    """Take the lock if it is free. It is of the process alone: those that load patches do not share it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        log.warning("no locks here (%s): see to it that no other job trains this model", error)
    return True


def _self() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
