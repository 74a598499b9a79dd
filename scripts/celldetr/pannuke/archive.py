"""Arrays in zip archives, read item by item without unpacking: memory holds one item at a time."""

import io
import math
import os
import sys
import zipfile
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError

_MOST = 1 << 28  # bytes read at once: damaged or hostile headers ask for more
_HEADER = 10_000  # bytes of a header, as in NumPy


def open_zip(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """Open an archive for reading.

    Raises
    ------
    InputError
        Not a zip archive, or an incomplete one.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: cannot be read as a zip archive ({error}); get it again") from error


class NpyMember:
    """An .npy file in a zip archive, read along its first axis in order.

    Each member has its own file handle, so that several threads can read several members.

    Raises
    ------
    InputError
        Not an array, or one of Python objects or in Fortran order; names the archive and the member.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.label = f"{path}: {name}"
        self._archive = open_zip(path)
        try:
            self._stream: IO[bytes] = self._archive.open(name)
            self.shape, fortran, self.dtype = _header(self._stream)
        except Exception as error:  # zipfile, zlib and NumPy raise errors of many kinds for damaged bytes
            raise InputError(f"{self.label}: cannot be read as an array ({error}); get the archive again") from error
        if not self.dtype.itemsize or not all(0 <= length <= sys.maxsize for length in self.shape):
            raise InputError(f"{self.label}: got {self.dtype} of shape {self.shape}; get the archive again")
        if self.dtype.hasobject:
            raise InputError(
                f"{self.label}: got Python objects (a pickle), expected numbers or text; save text after .astype(str)"
            )
        if fortran and len(self.shape) > 1:
            raise InputError(f"{self.label}: got Fortran order, expected C order; save it with numpy.ascontiguousarray")

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
            The data is damaged or ends early, or the items are too large for the memory.
        """
        wanted = count * math.prod(self.shape[1:]) * self.dtype.itemsize
        if wanted > _MOST:
            raise InputError(
                f"{self.label}: got {self.dtype} of shape {self.shape}: {wanted >> 20} MiB at once, expected at most "
                f"{_MOST >> 20} MiB; is it the right file?"
            )
        data = self._read(wanted)
        if len(data) < wanted:
            raise InputError(f"{self.label}: the data ends early; get the archive again")
        return np.frombuffer(data, dtype=self.dtype).reshape(count, *self.shape[1:])

    def finish(self) -> None:
        """Check that no data follows the last item; reading to the end also makes zipfile check the checksum.

        Raises
        ------
        InputError
            More data, or a wrong checksum.
        """
        if self._read(1):
            raise InputError(f"{self.label}: more data than its header says; get the archive again")

    def _read(self, count: int) -> bytes:
        try:
            return self._stream.read(count)
        except Exception as error:  # see above
            raise InputError(f"{self.label}: the data is damaged ({error}); get the archive again") from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    if length > _HEADER:
        raise ValueError(f"a header of {length} bytes")
    text = stream.read(length)
    if version == (3, 0):  # as 2.0, but in UTF-8
        text = text.decode("utf-8").encode("latin1")
    return np.lib.format.read_array_header_2_0(io.BytesIO(len(text).to_bytes(4, "little") + text))
