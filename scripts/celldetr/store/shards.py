"""The images of a store, read straight from its shard files and written straight to them.

zarr-python takes 46 ms a patch for patches in no regular order, gives black pixels for a shard that is missing, and its
event loop does not outlive a fork; it writes a patch in twice the time that compressing it takes. A shard is simple:
compressed chunks, then for each chunk its offset and length (little-endian uint64, all ones = no such chunk), then the
CRC-32C of that index (Zarr v3, ``sharding_indexed``).
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from numcodecs.checksum32 import CRC32C  # type: ignore[import-untyped]
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError

_NONE = np.uint64(2**64 - 1)
_ENTRY, _CRC = 16, 4  # bytes
_PER_THREAD = 64  # patches that are worth a thread
_AGAIN = "the store is damaged: delete it and make it again"


class ShardedImages:
    """Images (N, S, S, 3) uint8 with one chunk per patch; keeps where each lies, no open file, so it can be pickled.

    Parameters
    ----------
    folder
        Folder of the array in its store.

    Raises
    ------
    InputError
        The array is stored in another way, a shard is missing or ends early, or a patch is not in its shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shape, self.per_shard = self._layout(json.loads((folder / "zarr.json").read_text(encoding="utf-8")))
        shards = range(-(-self.shape[0] // self.per_shard))
        places = [np.empty((0, 2), np.uint64), *(self._index(shard) for shard in shards)]
        self._places = np.concatenate(places)[: self.shape[0]]
        absent = np.flatnonzero(self._places[:, 0] == _NONE)
        if absent.size:
            raise InputError(
                f"{folder.parent}: images: patch {absent[0]} and {absent.size - 1} others are not in their shard "
                f"{self._file(int(absent[0]) // self.per_shard)}; {_AGAIN}"
            )

    def read(self, patches: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read images (B, S, S, 3) in the order asked for.

        Raises
        ------
        InputError
            An image is damaged; names the patch.
        """
        out = np.empty((len(patches), *self.shape[1:]), np.uint8)
        blocks = np.array_split(np.argsort(patches, kind="stable"), max(1, len(patches) // _PER_THREAD))
        if len(blocks) == 1:
            self._read_block(blocks[0], patches, out)
        else:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                list(pool.map(lambda block: self._read_block(block, patches, out), blocks))
        return out

    def _read_block(self, rows: NDArray[np.int64], patches: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Fill some rows of `out`, which come in the order of their patches: each shard is opened once."""
        codec = Zstd()
        shards = patches[rows] // self.per_shard
        for shard in np.unique(shards):
            path = self._file(int(shard))
            try:
                with path.open("rb") as handle:
                    for row in rows[shards == shard]:
                        self._read_one(handle, codec, int(patches[row]), out[row])
            except OSError as error:
                raise InputError(f"{self.folder.parent}: images: {path} cannot be read ({error})") from error

    def _read_one(self, handle: IO[bytes], codec: Zstd, patch: int, out: NDArray[np.uint8]) -> None:
        offset, length = (int(value) for value in self._places[patch])
        handle.seek(offset)
        try:
            codec.decode(handle.read(length), out=out.reshape(-1))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.folder.parent}: images: patch {patch} cannot be read from {handle.name} ({error}); {_AGAIN}"
            ) from error

    def _file(self, shard: int) -> Path:
        return self.folder / "c" / str(shard) / "0" / "0" / "0"

    def _layout(self, meta: dict[str, Any]) -> tuple[tuple[int, ...], int]:
        """Shape, and patches per shard; refuses an array that is not stored as `StoreWriter` does it."""
        try:
            shape = tuple(int(length) for length in meta["shape"])
            (codec,) = meta["codecs"]
            settings = codec["configuration"]
            inner = [step["name"] for step in settings["codecs"]]
            per_shard, *chunk = meta["chunk_grid"]["configuration"]["chunk_shape"]
            index = [step["name"] for step in settings["index_codecs"]]
            fits = (
                (codec["name"], settings["index_location"], index) == ("sharding_indexed", "end", ["bytes", "crc32c"])
                and chunk == list(shape[1:])
                and per_shard >= 1
                and settings["chunk_shape"] == [1, *chunk]
                and inner == ["bytes", "zstd"]
            )
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise InputError(
                f"{self.folder.parent}: images: got an array without shards of one zstd chunk per patch; "
                "write the store with celldetr.store.StoreWriter"
            )
        return shape, int(per_shard)

    def _index(self, shard: int) -> NDArray[np.uint64]:
        """Offset and length (P, 2) of each patch in a shard."""
        path, length = self._file(shard), self.per_shard * _ENTRY + _CRC
        try:
            total = path.stat().st_size
            with path.open("rb") as handle:
                handle.seek(max(0, total - length))
                raw = handle.read(self.per_shard * _ENTRY)
        except OSError as error:
            raise InputError(f"{self.folder.parent}: images: {path}: {error.strerror}; {_AGAIN}") from error
        places = np.frombuffer(raw[: len(raw) // _ENTRY * _ENTRY], "<u8").reshape(-1, 2).astype(np.uint64)
        # As floats: in a damaged index the sum of two integers may wrap around.
        ends = places[places[:, 0] != _NONE].astype(np.float64).sum(axis=1)
        if len(places) != self.per_shard or (ends > total - length).any():
            raise InputError(f"{self.folder.parent}: images: {path} is damaged or ends early ({total} bytes); {_AGAIN}")
        return places


class ShardWriter:
    """Writes shard files as Zarr does, all cores compressing.

    Parameters
    ----------
    folder
        Folder of the array in its store.
    per_shard
        Patches per shard.
    level
        Level of the compression.
    """

    def __init__(self, folder: Path, per_shard: int, level: int) -> None:
        self.folder, self.per_shard = folder, per_shard
        self._level = level

    def write(self, shard: int, images: Sequence[NDArray[np.uint8]]) -> None:
        """Write a shard: images (S, S, 3), at most `per_shard`; only the last shard may have fewer."""

        def encode(image: NDArray[np.uint8]) -> bytes:
            return bytes(Zstd(level=self._level, checksum=True).encode(np.ascontiguousarray(image)))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            chunks = list(pool.map(encode, images))
        places = np.full((self.per_shard, 2), _NONE, "<u8")
        lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
        places[: len(chunks), 0] = np.cumsum(lengths) - lengths
        places[: len(chunks), 1] = lengths
        path = self.folder / "c" / str(shard) / "0" / "0" / "0"
        path.parent.mkdir(parents=True)
        with path.open("wb") as handle:
            handle.writelines(chunks)
            handle.write(bytes(CRC32C().encode(np.frombuffer(places.tobytes(), np.uint8))))
