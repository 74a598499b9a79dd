"""Outputs appear under their name only when they are complete."""

import contextlib
import errno
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""What reading a damaged zip archive raises, beside OSError."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it on success, remove it on error.

    The caller writes a file or makes a folder at the temporary path. The name depends on `path` alone, so that what a
    killed process left behind is removed by the next try and never accumulates.

    Parameters
    ----------
    path
        Final name. An existing file is replaced in one step; an existing folder is removed just before the rename.

    Raises
    ------
    OSError
        It cannot be written; the error of a full disk names `path`.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.incomplete")
    remove(temporary)
    try:
        with naming(final):
            yield temporary
        if final.is_dir():
            remove(final)
        os.replace(temporary, final)
    finally:
        remove(temporary)  # after an error, or if both names link to one file, which a rename leaves as it is


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a full disk name what was to be written: that of an open file does not tell which."""
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
    """Remove a file or a folder with all it holds; nothing happens when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
