"""Arrays inside zip archives, read item by item without unpacking: memory holds one item."""

import io
import math
import os
import sys
import tokenize
import zipfile
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import BROKEN_ZIP

_NO_HEADER = (SyntaxError, tokenize.TokenError, MemoryError, RecursionError, TypeError)
_BROKEN = (*BROKEN_ZIP, OSError, ValueError)


def open_zip(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """Open an archive for reading.

    Raises
    ------
    InputError
        No zip archive, or one that ends early.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: cannot be read as a zip archive ({error}); get it again") from error


class NpyMember:
    """An .npy file in a zip, read along its first axis in order.

    Each member has a file handle of its own, so that several can be read by several threads.

    Parameters
    ----------
    path
        Archive.
    name
        Member.

    Raises
    ------
    InputError
        Not an array, one of Python objects, or one in Fortran order; names archive and member.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.label = f"{path}: {name}"
        self._archive = open_zip(path)
        try:
            self._stream: IO[bytes] = self._archive.open(name)
            self.shape, fortran, self.dtype = _header(self._stream)
        except (*_BROKEN, *_NO_HEADER, KeyError, RuntimeError) as error:
            self._archive.close()
            raise InputError(f"{self.label}: cannot be read as an array ({error}); get the archive again") from error
        if not self.dtype.itemsize or not all(0 <= length <= sys.maxsize for length in self.shape):
            self._archive.close()
            raise InputError(
                f"{self.label}: got {self.dtype} of shape {self.shape}, which no array has; get the archive again"
            )
        if self.dtype.hasobject:
            raise InputError(f"{self.label}: got Python objects (a pickle), expected numbers or text; it is not read")
        if fortran and len(self.shape) > 1:
            raise InputError(f"{self.label}: got Fortran order, expected C order; save it with numpy.ascontiguousarray")
        self._item_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._archive.close()

    def __len__(self) -> int:
        return int(self.shape[0]) if self.shape else 0

    def read(self, count: int = 1) -> NDArray[Any]:
        """Read the next `count` items (count, ...).

        Raises
        ------
        InputError
            The data is damaged or ends early.
        """
        wanted = count * self._item_bytes
        try:
            data = self._stream.read(wanted)
        except (*_BROKEN, OverflowError, MemoryError) as error:
            raise InputError(f"{self.label}: the data is damaged ({error}); get the archive again") from error
        if len(data) < wanted:
            raise InputError(f"{self.label}: the data ends early; get the archive again")
        return np.frombuffer(data, dtype=self.dtype).reshape(count, *self.shape[1:])

    def finish(self) -> None:
        """Check that nothing follows the last item; reading to the end also checks the member's checksum.

        Raises
        ------
        InputError
            More data, or a wrong checksum.
        """
        try:
            rest = self._stream.read(1)
        except _BROKEN as error:
            raise InputError(f"{self.label}: the data is damaged ({error}); get the archive again") from error
        if rest:
            raise InputError(f"{self.label}: more data than its header says; get the archive again")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version in read:
        return read[version](stream)
    length = int.from_bytes(stream.read(4), "little")  # version 3.0 is 2.0 in UTF-8
    text = stream.read(length).decode("utf-8").encode("latin1")
    return np.lib.format.read_array_header_2_0(io.BytesIO(len(text).to_bytes(4, "little") + text))
