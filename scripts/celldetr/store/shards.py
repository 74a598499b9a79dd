"""Files of the arrays with one chunk per patch (images, instance maps): those that Zarr would write, but sooner."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numcodecs.checksum32 import CRC32C
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

PATCHES_PER_SHARD = 256
ZSTD = Zstd(level=1, checksum=True)  # a checksum turns a changed bit into an error


class EncodedImage(NamedTuple):
    """An image, or an instance map, as a store holds it; see `encode_image`."""

    shape: tuple[int, ...]
    chunk: bytes
    digest: bytes


def encode_image(image: NDArray[np.uint8]) -> EncodedImage:
    """Compress and hash an image (S, S, 3); most of a store's work, so threads that have the pixels do it themselves.

    Raises
    ------
    ValueError
        It is not of type uint8.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"images: got {image.dtype} {image.shape}, expected uint8 (S, S, 3)")
    image = np.ascontiguousarray(image)
    return _encode(image, np.ascontiguousarray(image.transpose(2, 0, 1)))


def encode_instances(instances: NDArray[np.uint16]) -> EncodedImage:
    """Compress and hash an instance map (S, S).

    Raises
    ------
    ValueError
        It is not of type uint16.
    """
    if instances.dtype != np.uint16:
        raise ValueError(f"instances: got {instances.dtype} {instances.shape}, expected uint16 (S, S)")
    instances = np.ascontiguousarray(instances, dtype="<u2")
    return _encode(instances, instances)


def _encode(content: NDArray[Any], stored: NDArray[Any]) -> EncodedImage:
    return EncodedImage(content.shape, ZSTD.encode(stored), hashlib.sha256(content.data).digest())


def shard_path(array: Path, ndim: int, shard: int) -> Path:
    """File of a shard of an array (N, ...) of `ndim` axes that is cut along the first."""
    return array.joinpath("c", str(shard), *["0"] * (ndim - 1))


def read_chunks(path: Path, chunks: NDArray[np.int64]) -> Iterator[bytes]:
    """Read chunks (n,) of a shard, still compressed; zarr takes several times as long for a patch."""
    with path.open("rb") as file:
        file.seek(-16 * PATCHES_PER_SHARD - 4, os.SEEK_END)  # offset and length of each chunk, and their checksum
        places = np.frombuffer(CRC32C(location="end").decode(file.read()), "<u8").reshape(-1, 2)
        for offset, length in places[chunks].tolist():
            yield os.pread(file.fileno(), length, offset)


class ShardWriter:
    """Write chunks to the shards of an array one after another: chunks, their places, a checksum of these.

    `array` is the folder of the array, of `ndim` axes. Close it to end the last shard.
    """

    def __init__(self, array: Path, ndim: int) -> None:
        self._array, self._ndim = array, ndim
        self._shard: IO[bytes] = io.BytesIO()  # none yet
        self._shards = 0
        self._lengths: list[int] = []  # of the chunks of the shard that is open
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 over the SHA-256 of what each chunk holds."""
        return self._hash.hexdigest()

    def append(self, image: EncodedImage) -> None:
        """Write the next chunk."""
        if not self._lengths:
            path = shard_path(self._array, self._ndim, self._shards)
            path.parent.mkdir(parents=True)
            self._shard = path.open("wb")
            self._shards += 1
        self._shard.write(image.chunk)
        self._hash.update(image.digest)
        self._lengths.append(len(image.chunk))
        if len(self._lengths) == PATCHES_PER_SHARD:
            self.close()

    def close(self) -> None:
        """End the shard that is open; unless it is full, no chunk may follow."""
        with contextlib.closing(self._shard):
            if self._lengths:
                places = np.full((PATCHES_PER_SHARD, 2), 2**64 - 1, "<u8")  # all ones: no such chunk
                starts = np.cumsum([0, *self._lengths[:-1]])
                places[: len(starts)] = np.stack([starts, self._lengths], axis=1)
                self._shard.write(CRC32C(location="end").encode(places))
                self._lengths.clear()
