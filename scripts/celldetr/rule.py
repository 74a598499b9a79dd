"""How a rule's script runs: output goes to the rule's log as well; a user's error is printed without a traceback."""

import errno
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from celldetr.errors import CellDETRError

_WRITING = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "your quota of this disk is used up; free some space and start again",
    errno.EFBIG: "the file grew larger than the system allows (see ulimit -f); raise that limit and start again",
    errno.EROFS: "the file system is read-only; make it writable, or run in another folder",
    errno.EACCES: "not permitted; change the permissions of the file and its folder, or run in another folder",
}


class _Tee:
    """A text stream that writes to the terminal and to the log."""

    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.streams[0].fileno()


def run_rule(main: Callable[[Any], None], snakemake: Any) -> None:
    """Run `main(snakemake)` with stdout and stderr copied to the rule's log.

    A `CellDETRError`, a full or read-only disk and a lack of memory end the process with status 1 and a message alone;
    any other error keeps its traceback.

    Parameters
    ----------
    main
        The script's work.
    snakemake
        The object that Snakemake gives to a script (`input`, `output`, `params`, `log`, `threads`, `resources`).
    """
    if not snakemake.log:
        _run(main, snakemake)
        return
    path = Path(snakemake.log[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as log:
        terminal = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(terminal[0], log), _Tee(terminal[1], log)
        try:
            _run(main, snakemake)
        finally:
            sys.stdout, sys.stderr = terminal


def _run(main: Callable[[Any], None], snakemake: Any) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
        main(snakemake)
    except Exception as error:
        message = _message(error)
        if message is None:
            traceback.print_exc()
        else:
            print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the message is for the user's terminal
        sys.exit(1)


def _message(error: Exception) -> str | None:
    """Return what to tell a user instead of a traceback; None for an error that is not theirs to mend."""
    if isinstance(error, CellDETRError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); give the rule more mem_mb (--set-resources) and start again"
    if isinstance(error, OSError) and error.errno in _WRITING:
        return f"{error.filename or error}: {_WRITING[error.errno]}"
    return None
