"""How the script of a rule runs: its output is copied to the rule's log, and a user's error has no traceback."""

import contextlib
import errno
import faulthandler
import hashlib
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from celldetr.runtime.errors import CellDETRError, InputError, masked

AHEAD_SECONDS = 600.0
"""How far in the future an input may be dated: Snakemake deletes results that are older than their inputs."""
LOG_VARIABLE = "CELLDETR_LOG"
"""Environment variable that tells further processes of a rule where its log is."""
RUN_VARIABLE = "CELLDETR_RUN"
"""Environment variable that tells the jobs of one start of Snakemake from those of others."""
_STAMP = ".snakemake_timestamp"  # its modification time is that of the store it lies in

_WRITING = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "your quota of this disk is used up; free some space and start again",
    errno.EFBIG: "the file is larger than the system allows (see ulimit -f); raise that limit and start again",
    errno.ENOTDIR: "a file lies where a folder is needed; remove it, or name another folder",
    errno.EROFS: "the file system is read-only; make it writable, or run in another folder",
    errno.EACCES: "not permitted; change the permissions of the file and its folder, or run in another folder",
}
_LACKING = ("can't start new thread", "can't allocate lock", "can't allocate memory", "out of memory")
"""Out-of-memory messages of Python, torch and CUDA."""
_MORE_MEMORY = "give the rule more mem_mb (--set-resources) and start again"
_MORE_GPU_MEMORY = (
    "set training.activation_checkpointing: true or a smaller batch_size (inference, cells), or take a GPU "
    "with more memory, and start again"
)


@dataclass(frozen=True)
class _Name:
    """What the user calls an input, and where."""

    path: str
    place: str


_NAMES = dict[str, _Name]()
"""Paths of inputs of the running rule -> names."""


class _Tee(io.TextIOBase):
    """A text stream that writes to the terminal and to the log, without the credentials of URLs.

    Files are called what the user calls them. A log on a full disk does not stop the rule.
    """

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        shown = masked(user_named(text))
        self.terminal.write(shown)
        self.terminal.flush()
        with contextlib.suppress(OSError):
            self.log.write(shown)
            self.log.flush()
        return len(text)

    def fileno(self) -> int:
        return self.terminal.fileno()


def run_rule(main: Callable[[Any], None], snakemake: Any) -> None:
    """Run `main(snakemake)` with stdout and stderr copied to the rule's log.

    A `CellDETRError`, a full or read-only disk, a lack of memory and a killed worker process end the process with
    status 1 and a message; any other error also prints its traceback. The crash of a library leaves one in the log.
    What was refused for its inputs is refused again at once by the next attempts in the same run of Snakemake
    (`RUN_VARIABLE`), unless an input or a parameter has changed.

    Parameters
    ----------
    main
        The work of the script.
    snakemake
        The object that Snakemake gives to a script (`input`, `output`, `params`, `log`, `threads`, `resources`). With
        params.given (name of an input, or of an output that is a copy -> ``path``, as the user wrote it, or null if it
        is no local file, and ``place``, where they wrote it) the log and the message have that path, and a message says
        where it is from: the places of the files that it names, or of all if it names no input.
    """
    path = Path(snakemake.log[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        log = path.open("a", encoding="utf-8")  # the processes of a training run append to it, too
    except OSError as error:
        _tell(error)
        sys.exit(1)
    os.environ[LOG_VARIABLE] = str(path.absolute())
    watched = faulthandler.is_enabled()
    if not watched:
        faulthandler.enable(log)
    try:
        with contextlib.redirect_stdout(_Tee(sys.stdout, log)), contextlib.redirect_stderr(_Tee(sys.stderr, log)):
            logging.basicConfig(
                stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
            )
            try:
                kept = _refusal(snakemake)  # of the inputs as they are now: they may change while this works
                _check_times(getattr(snakemake, "input", ()), path.stat().st_mtime)
                _NAMES.update(_given_names(snakemake))
                _repeat_refusal(*kept)
                main(snakemake)
            except Exception as error:
                text = _tell(error, getattr(snakemake, "input", ()))
                if _is_refusal(error):
                    _keep_refusal(*kept, text)
                sys.exit(1)
    finally:
        _NAMES.clear()
        del os.environ[LOG_VARIABLE]
        if not watched:
            faulthandler.disable()
        with contextlib.suppress(OSError):
            log.close()


def user_named(text: str) -> str:
    """Return a text with the user's names of the running rule's inputs for their paths, or for the last part of one."""
    for path, name in _NAMES.items():
        if path != name.path:
            whole = str(Path(path).absolute())  # readers may name it so
            text = name.path if text == Path(path).name else text.replace(whole, name.path).replace(path, name.path)
    return text


def _given_names(snakemake: Any) -> dict[str, _Name]:
    """Return the paths of inputs and outputs that are the user's files -> names."""
    found = {}
    for key, given in getattr(getattr(snakemake, "params", None), "given", {}).items():
        paths: Any = snakemake.input.get(key) or getattr(snakemake, "output", {}).get(key) or ()
        for path in [paths] if isinstance(paths, str) else paths:
            found[path] = _Name(given["path"] or path, given["place"])
    return found


def _tell(error: Exception, inputs: Iterable[str] = ()) -> str:
    """Print the message for the user, with where they named the files (all if it names no input), or the traceback.

    Returns the message, or an empty text.
    """
    message = explain(error)
    if message is None:
        traceback.print_exception(error)
        return ""
    unnamed = isinstance(error, InputError) and not any(path in message for path in (*inputs, *_NAMES))
    origin = "; ".join(f"{name.path}: {name.place}" for path, name in _NAMES.items() if unnamed or path in message)
    shown = f"error: {message} ({origin})" if origin else f"error: {message}"
    print(shown, file=sys.stderr)  # noqa: T201 - the message is for the user's terminal
    return shown


def _is_refusal(error: Exception) -> bool:
    """Whether another attempt would end in the same way: inputs are wrong, and nothing failed around them.

    Libraries report damaged files by an OSError, too, but without the number that those of the system have. A
    `ConfigError` of a job may be one of the machine alone, which has fewer GPUs.
    """
    failed = any(
        isinstance(cause, BrokenProcessPool) or getattr(cause, "errno", None) is not None for cause in _behind(error)
    )
    return isinstance(error, InputError) and not failed and _lack_of_memory(error) is None


def _refusal(snakemake: Any) -> tuple[Path, str]:
    """Return the file beside the log that keeps a refusal, and the line with which one of these inputs begins.

    The line is of the run of Snakemake, the parameters and the state of the inputs. It is empty outside a run, and for
    a job without input files: what a server does not send now, it may send later.
    """
    path = Path(snakemake.log[0])
    path, run = path.with_name(f".{path.name}.refused"), os.environ.get(RUN_VARIABLE)
    found = [_timed(name) for name in getattr(snakemake, "input", ())]
    if not run or not found or not all(file.exists() for file in found):
        return path, ""
    stats = [file.stat() for file in found]
    states = [(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for stat in stats]
    return path, hashlib.sha256(f"{run} {snakemake.params!r} {states}".encode()).hexdigest() + "\n"


def _keep_refusal(path: Path, line: str, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk
        if line:
            path.write_text(line + masked(user_named(text)), encoding="utf-8")


def _repeat_refusal(path: Path, line: str) -> None:
    """End with what an earlier attempt was refused for with the same inputs, and forget other refusals."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace")
        if line and text.startswith(line):
            print(text.removeprefix(line), file=sys.stderr)  # noqa: T201 - as `_tell`
            sys.exit("Refused by an earlier attempt in this run of Snakemake; no input has changed since.")
        path.unlink()


def _timed(path: str) -> Path:
    """Return the file that carries the time of an input."""
    stamp = Path(path) / _STAMP
    return stamp if stamp.exists() else Path(path)


def _check_times(inputs: Iterable[str], now: float) -> None:
    """Refuse inputs from the future: Snakemake would remove the results, because they are older than the inputs."""
    for path in inputs:
        timed = _timed(path)
        if timed.exists() and timed.stat().st_mtime > now + AHEAD_SECONDS:
            changed, at = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) for t in (timed.stat().st_mtime, now))
            raise InputError(
                f"{path}: was changed at {changed}, but it is {at} now: a clock or the time of the file is wrong. "
                "Snakemake would remove the results of this job, because they would be older. Correct the clock, or "
                f"give the file the current time: touch {timed}"
            )


def explain(error: Exception) -> str | None:
    """Return the message for the user in place of a traceback; None for an error that the user cannot correct."""
    lack = _lack_of_memory(error)
    more = _MORE_GPU_MEMORY if lack is not None and lack.startswith("CUDA") else _MORE_MEMORY
    if isinstance(error, CellDETRError):
        return str(error) if lack is None else f"{error}\nOr the file is good and memory was used up: {more}"
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


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _lack_of_memory(error: BaseException) -> str | None:
    """First line of the out-of-memory error behind `error`, or None.

    Readers report a failed allocation as a damaged file; therefore the errors behind an error are searched too.
    """
    for cause in _behind(error):
        text = str(cause)
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or (isinstance(cause, RuntimeError) and any(words in text for words in _LACKING))
        ):
            return text.partition("\n")[0]
    return None
