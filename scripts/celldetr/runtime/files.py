"""Files of results: they appear under their name only when complete; JSON, and data classes of arrays as NPZ files."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celldetr.runtime.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = "NA"
"""Undefined value in a table."""
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""Errors besides OSError that reading a damaged zip archive raises."""
_OLD_SECONDS = 7 * 86_400  # longer than any job runs
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it on success, remove it on error.

    The caller writes a file or makes a folder at the temporary path. Each process has one of its own, so that two jobs
    with one output do not mix; what killed processes of this machine left, and what is a week old, is removed.

    Parameters
    ----------
    path
        Final name. An existing file or folder is replaced.

    Raises
    ------
    OSError
        It cannot be written; if the disk is full, the error names `path`.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.incomplete."
    _remove_leftovers(final.parent, prefix)
    temporary = final.with_name(f"{prefix}{socket.gethostname()}.{os.getpid()}")
    replaced = temporary.with_name(f"{temporary.name}.old")
    remove(temporary)
    try:
        with naming(final):
            yield temporary
        if final.is_dir():  # a folder cannot take the name of one that holds files
            os.replace(final, replaced)
        os.replace(temporary, final)
    finally:
        remove(temporary)  # after an error, or if both names are hard links to one file, which are not renamed
        remove(replaced)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        if path.name.startswith(prefix):
            host, _, process = path.name.removeprefix(prefix).removesuffix(".old").rpartition(".")
            with contextlib.suppress(OSError):  # another job removes it, too
                old = time.time() - path.lstat().st_mtime > _OLD_SECONDS
                if old or (host == socket.gethostname() and not _runs(int(process))):
                    remove(path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that one job continues after another; released when the process exits.

    Raises
    ------
    InputError
        Another job holds it.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise InputError(
            f"{path}: another job writes it, most likely started by a Snakemake that was killed. Wait until it has "
            "ended, or end it (kill, scancel), then start again"
        ) from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder with those around it, and hold it (`held`); at the end remove what was made and is empty."""
    made = [path for path in folder.parents if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder):
            try:
                yield
            finally:
                _remove_empty([folder])  # while it is held: another job has a folder of its own, or is refused
    finally:
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # one that is not empty; neither are those around it
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in the error of a full disk, which does not say which open file could not be written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            error.filename = str(path)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where links are not possible (another file system)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON values."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tsv(path: str | os.PathLike[str], frame: "DataFrame", *, float_format: str | None = None) -> None:
    """Write a table as TSV without its index; undefined values are `MISSING`."""
    with atomic(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False, na_rep=MISSING, float_format=float_format)


def write_npz(path: str | os.PathLike[str], content: Any) -> None:
    """Write the fields of a data class of arrays."""
    import numpy as np  # not at the top: the workflow itself uses this module without NumPy

    arrays = {item.name: np.asarray(getattr(content, item.name)) for item in dataclasses.fields(content)}
    with atomic(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def read_npz(path: str | os.PathLike[str], kind: Any, rule: str) -> dict[str, Any]:
    """Read the fields of the data class `kind` that `write_npz` wrote in the rule `rule`.

    Raises
    ------
    InputError
        Not such a file, or an incomplete one.
    """
    import numpy as np

    try:
        with np.load(Path(path), allow_pickle=False) as file:
            return {item.name: file[item.name] for item in dataclasses.fields(kind)}
    except (OSError, KeyError, ValueError, SyntaxError, *BROKEN_ZIP) as error:
        raise InputError(f"{path}: got {error}, expected a file of the {rule} rule; run that rule again") from error
