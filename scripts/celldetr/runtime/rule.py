"""How a rule's script runs: output goes to the rule's log as well; a user's error is printed without a traceback."""

import contextlib
import errno
import faulthandler
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn, TextIO

from celldetr.runtime.errors import CellDETRError, InputError

AHEAD_SECONDS = 600.0
"""How much newer than now an input may be: less work than that is lost when Snakemake then removes the results."""
_STAMP = ".snakemake_timestamp"  # its time is that of the folder it lies in

_WRITING = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "your quota of this disk is used up; free some space and start again",
    errno.EFBIG: "the file grew larger than the system allows (see ulimit -f); raise that limit and start again",
    errno.EROFS: "the file system is read-only; make it writable, or run in another folder",
    errno.EACCES: "not permitted; change the permissions of the file and its folder, or run in another folder",
}
_LACKING = ("can't start new thread", "can't allocate lock", "can't allocate memory", "out of memory")
"""The words of Python, torch and CUDA."""
_MORE_MEMORY = "give the rule more mem_mb (--set-resources) and start again"
_MORE_GPU_MEMORY = (
    "set training.activation_checkpointing: true or a smaller inference.batch_size, or take a GPU with more memory, "
    "and start again"
)


class _Tee:
    """A text stream that writes to the terminal and to the log. A log that cannot be written is no reason to stop."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        self.terminal.write(text)
        self.terminal.flush()
        with contextlib.suppress(OSError):
            self.log.write(text)
            self.log.flush()
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.terminal.fileno()


def run_rule(main: Callable[[Any], None], snakemake: Any) -> None:
    """Run `main(snakemake)` with stdout and stderr copied to the rule's log.

    A `CellDETRError`, a full or read-only disk, a lack of memory and a killed worker process end the process with
    status 1 and a message alone; any other error keeps its traceback. A crash of a library leaves one in the log.

    Parameters
    ----------
    main
        The script's work.
    snakemake
        The object that Snakemake gives to a script (`input`, `output`, `params`, `log`, `threads`, `resources`).
    """
    if not snakemake.log:
        _run(main, snakemake, time.time())
        return
    path = Path(snakemake.log[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("w", encoding="utf-8")
    except OSError as error:
        _fail(error)
    terminal = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tee(terminal[0], log), _Tee(terminal[1], log)
    watched = faulthandler.is_enabled()
    if not watched:
        faulthandler.enable(log)
    try:
        _run(main, snakemake, path.stat().st_mtime)
    finally:
        sys.stdout, sys.stderr = terminal
        if not watched:
            faulthandler.disable()
        with contextlib.suppress(OSError):
            log.close()


def _run(main: Callable[[Any], None], snakemake: Any, now: float) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
        _check_times(getattr(snakemake, "input", ()), now)
        main(snakemake)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    message = explain(error)
    if message is None:
        traceback.print_exception(error)
    else:
        print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the message is for the user's terminal
    sys.exit(1)


def _check_times(inputs: Iterable[str], now: float) -> None:
    """Refuse inputs from the future: Snakemake throws away results that are older than what they were made from."""
    for path in map(Path, inputs):
        timed = path / _STAMP if (path / _STAMP).exists() else path
        if timed.exists() and timed.stat().st_mtime > now + AHEAD_SECONDS:
            raise InputError(
                f"{path}: was changed at {_when(timed.stat().st_mtime)}, and now it is {_when(now)}: a clock is wrong, "
                "or the time of the file. Results made now would count as older and be removed. Mend the clock, or "
                f"give the file the time of now: touch {timed}"
            )


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def explain(error: Exception) -> str | None:
    """Return what to tell a user instead of a traceback; None for an error that is not theirs to mend."""
    lack = _lack_of_memory(error)
    more = _MORE_GPU_MEMORY if lack is not None and lack.startswith("CUDA") else _MORE_MEMORY
    if isinstance(error, CellDETRError):
        return str(error) if lack is None else f"{error}\nOr it is whole, and memory was used up: {more}"
    if lack is not None:
        return f"out of memory ({lack}); {more}"
    if isinstance(error, BrokenProcessPool):
        return (
            "a worker process was killed, most likely because the memory was used up; give the rule more mem_mb "
            "(--set-resources), or fewer threads (--set-threads), and start again"
        )
    if isinstance(error, OSError) and error.errno in _WRITING:
        return f"{error.filename or error}: {_WRITING[error.errno]}"
    return None


def _lack_of_memory(error: BaseException | None) -> str | None:
    """Return the words of a lack of memory that an error is or comes from: readers take it for damage of their file."""
    while error is not None:
        text = str(error)
        if (
            isinstance(error, MemoryError)
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or (isinstance(error, RuntimeError) and any(words in text for words in _LACKING))
        ):
            return text.partition("\n")[0]
        error = error.__cause__
    return None
