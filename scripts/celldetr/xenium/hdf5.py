"""A check of HDF5 files for the damage that its library does not survive."""

import mmap
import os
import struct
from pathlib import Path

from celldetr.runtime.errors import InputError

_HEAP = b"GCOL\x01\0\0\0"  # signature, version 1 and reserved bytes of a global heap: where texts are kept
_OBJECT = struct.Struct("<H6xQ")  # number and size of an object of it (HDF5 file format 3.0, III.E)
_LEAST = 4096  # bytes of the smallest heap


def check_heaps(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose heaps of texts were overwritten with zeros, as by a copy that broke off.

    HDF5 looks for the next object behind one of size 0 forever, and no limit of time can stop it from Python.

    Parameters
    ----------
    path
        File to look through, once and from end to end. A missing or empty one, or none of HDF5, is left to its reader.

    Raises
    ------
    InputError
        A heap holds an object without a size.
    """
    if not Path(path).is_file() or not os.path.getsize(path):
        return
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_HEAP)
        while start >= 0:
            end = start + int.from_bytes(data[start + 8 : start + 16], "little")
            place = start + 16
            while start + _LEAST <= end <= len(data) and place + _OBJECT.size <= end:
                number, size = _OBJECT.unpack_from(data, place)
                if not number and not size:
                    raise InputError(
                        f"{path}: is damaged: a heap of texts ends in zeros at byte {place}; get or make it again"
                    )
                place += _OBJECT.size + -(-size // 8) * 8 if number else size
            start = data.find(_HEAP, start + len(_HEAP))
