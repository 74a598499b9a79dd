"""Pixels that are decoded once and kept in a temporary file, for images that cannot be decoded in small pieces."""

import functools
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MOST_PIXELS = 2**31
"""Pixels of the largest image, 6 GiB decoded; a file of a few kB can hold many more."""


def on_disk(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array in a temporary file that ends with the array; on a full disk `OSError`, here and not in use."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


class DecodedStrips:
    """Strips of `rows` rows of an image (H, W, samples); each is decoded by the first thread that needs it."""

    def __init__(self, shape: tuple[int, int, int], dtype: DTypeLike, rows: int) -> None:
        self._pixels, self._rows = on_disk(shape, dtype), rows
        count = -(-shape[0] // rows)
        self._locks = [threading.Lock() for _ in range(count)]
        self._sizes: list[tuple[int, ...] | None] = [None] * count  # of what was decoded; 0 rows: not in the file

    def strip(self, row: int, decode: Callable[[], NDArray[Any] | None]) -> NDArray[Any] | None:
        """Return a strip (rows, W, samples), or None if the file lacks it; errors of `decode` come through."""
        own = self._pixels[row * self._rows : (row + 1) * self._rows]
        with self._locks[row]:
            size = self._sizes[row]
            if size is None:
                found = decode()
                size = (0, 0) if found is None else found.shape[:2]
                if found is not None:
                    own[: size[0], : size[1]] = found
                self._sizes[row] = size
        return own[: size[0], : size[1]] if size[0] else None


def strips_of(
    path: Path, page: tuple[int, ...], shape: tuple[int, int, int], dtype: DTypeLike, rows: int
) -> DecodedStrips | None:
    """Return the strips of a page, known by its numbers, for all that read it; None if they are too large for the disk.

    Those of one file are kept at a time, also when it is closed: threads and steps open it again and again.
    """
    if shape[0] * shape[1] > MOST_PIXELS:
        return None
    state = path.stat()
    with _lock:
        pages = _pages(path, state.st_mtime_ns, state.st_size)
        if page not in pages:
            try:
                pages[page] = DecodedStrips(shape, dtype, rows)
            except OSError:  # the disk is full
                pages[page] = None
        return pages[page]


_lock = threading.Lock()


@functools.lru_cache(maxsize=1)
def _pages(path: Path, time: int, size: int) -> dict[tuple[int, ...], DecodedStrips | None]:
    return {}
