"""Write patch stores: patch by patch, or by selecting patches of other stores; `celldetr.store` states the format."""

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pandas as pd
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import TransposeCodec, ZstdCodec

import celldetr
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.store.reader import (
    COLUMNS,
    FORMAT,
    NO_LABEL,
    NUMBER_COLUMNS,
    PATCHES_PER_SHARD,
    TEXT_COLUMNS,
    ZSTD,
    PatchStore,
    class_counts,
    content_digest,
    shard_path,
)

_THREADS = 4  # that encode images for callers that do not
# all chunks are written, those of zeros too: a missing file is then an error
_STORED: Any = {"compressors": ZstdCodec(level=1, checksum=True), "config": {"write_empty_chunks": True}}
_PLANAR: Any = TransposeCodec(order=(0, 3, 1, 2))  # red, then green, then blue: smaller, and sooner compressed


class EncodedImage(NamedTuple):
    """An image as a store holds it; see `encode_image`."""

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
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return EncodedImage(image.shape, ZSTD.encode(planes), hashlib.sha256(image.data).digest())


class StoreWriter:
    """Append patches; the store appears under its name when the ``with`` block ends without an error.

    Memory holds all boxes; images go to the disk as they come.

    Parameters
    ----------
    path
        Folder to write; an existing store is replaced.
    patch_size, mpp
        Side S of a patch in px, and size of a pixel in um.
    classes
        Class names in the order of the labels.
    attrs
        More JSON values to keep, e.g. ``provenance`` and ``dropped``; may be changed until the block ends.

    Raises
    ------
    InputError
        At the end of the block: a box or a centroid does not fit its patch, or a label is of no class.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        patch_size: int,
        classes: Sequence[str],
        mpp: float,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.patch_size, self.classes, self.mpp = patch_size, tuple(classes), float(mpp)
        self.attrs = dict(attrs or {})
        self.n_patches = 0
        self._stack = contextlib.ExitStack()
        self._shard: IO[bytes] = io.BytesIO()  # none yet
        self._lengths: list[int] = []  # of the chunks of the shard that is open
        self._images_hash = hashlib.sha256()
        self._nuclei = [(np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty((0, 2), np.float32))]
        self._rows: list[list[Any]] = []

    def __enter__(self) -> Self:
        self._temporary = self._stack.enter_context(atomic(self.path))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(_THREADS))
        self._stack.callback(lambda: self._shard.close())
        self._stack.push(lambda kind, error, trace: None if error else self._finish())
        return self

    def append(
        self,
        images: NDArray[np.uint8] | Sequence[EncodedImage],
        boxes: Sequence[ArrayLike],
        labels: Sequence[ArrayLike],
        *,
        centroids: Sequence[ArrayLike] | None = None,
        patches: Mapping[str, Any] | pd.DataFrame,
    ) -> None:
        """Append B patches.

        Parameters
        ----------
        images
            (B, S, S, 3) uint8, or what `encode_image` made of each.
        boxes, labels, centroids
            Of each patch: boxes (n, 4) xyxy px, labels (n,), and centroids (n, 2) px if they are known.
        patches
            ``source``, ``group``, ``tissue``, ``x``, ``y``: B values each.

        Raises
        ------
        ValueError
            Lengths or shapes do not agree.
        """
        if centroids is None:
            centroids = [np.full((np.size(row), 2), np.nan) for row in labels]
        encoded = self._pool.map(encode_image, images) if isinstance(images, np.ndarray) else images
        columns = [patches[name] for name in COLUMNS]
        for image, box, label, centroid, *row in zip(encoded, boxes, labels, centroids, *columns, strict=True):
            if image.shape != (self.patch_size, self.patch_size, 3):
                raise ValueError(f"images: got uint8 {image.shape}, expected sides of {self.patch_size} px")
            count = np.size(label)
            self._nuclei.append(
                (
                    np.asarray(box, np.float32).reshape(count, 4),
                    np.asarray(label, np.int64).reshape(count),
                    np.asarray(centroid, np.float32).reshape(count, 2),
                )
            )
            self._rows.append(row)
            self._write(image)

    def _write(self, image: EncodedImage) -> None:
        """Write shards as Zarr would, which takes longer: chunks, their places, a checksum of these."""
        if not self._lengths:
            path = shard_path(self._temporary, self.n_patches // PATCHES_PER_SHARD)
            path.parent.mkdir(parents=True)
            self._shard = path.open("wb")
        self._shard.write(image.chunk)
        self._images_hash.update(image.digest)
        self._lengths.append(len(image.chunk))
        self.n_patches += 1
        if len(self._lengths) == PATCHES_PER_SHARD:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._lengths:
            places = np.full((PATCHES_PER_SHARD, 2), 2**64 - 1, "<u8")  # all ones: no such chunk
            starts = np.cumsum([0, *self._lengths[:-1]])
            places[: len(starts)] = np.stack([starts, self._lengths], axis=1)
            with self._shard:
                self._shard.write(CRC32C(location="end").encode(places))
            self._lengths.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        self._close_shard()
        boxes, labels, centroids = (np.concatenate(parts) for parts in zip(*self._nuclei, strict=True))
        ptr = np.cumsum([len(labels) for _, labels, _ in self._nuclei], dtype=np.int64)
        self._check_nuclei(boxes, labels, centroids, ptr)
        arrays = {"boxes": boxes, "labels": labels.astype(np.int8), "centroids": centroids, "box_ptr": ptr}
        table = pd.DataFrame(self._rows, columns=list(COLUMNS))
        arrays |= {f"patches/{name}": table[name].to_numpy(np.int64) for name in NUMBER_COLUMNS}
        group = zarr.open_group(self._temporary, mode="a", zarr_format=3)
        for name, array in arrays.items():
            group.create_array(name, data=array, **_STORED)
        for name in TEXT_COLUMNS:
            text = np.asarray([str(value) for value in table[name]], dtype=np.dtypes.StringDType())
            group.create_array(f"patches/{name}", shape=text.shape, dtype="string", **_STORED)[...] = text
            arrays[f"patches/{name}"] = text
        image = (self.patch_size, self.patch_size, 3)
        chunks, shards, shape = ((count, *image) for count in (1, PATCHES_PER_SHARD, self.n_patches))
        group.create_array(
            "images", shape=shape, chunks=chunks, shards=shards, dtype="uint8", filters=_PLANAR, **_STORED
        )
        attrs: dict[str, Any] = {
            **self.attrs,
            "format": FORMAT,
            "classes": list(self.classes),
            "mpp": self.mpp,
            "counts": class_counts(labels, self.classes),
            "version": celldetr.__version__,
            "images_digest": self._images_hash.hexdigest(),
        }
        group.attrs.update({**attrs, "digest": content_digest(shape, arrays, attrs)})

    def _check_nuclei(
        self,
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
        centroids: NDArray[np.float32],
        ptr: NDArray[np.int64],
    ) -> None:
        low, high, last = boxes[:, :2], boxes[:, 2:], len(self.classes) - 1
        with np.errstate(invalid="ignore"):
            inside = (low >= 0) & (high <= self.patch_size) & (low < high)
            central = np.isnan(centroids) | ((low <= centroids) & (centroids <= high))
        rules: dict[str, NDArray[Any]] = {
            f"boxes must lie in 0 to {self.patch_size} px and not be empty": np.all(inside, axis=1),
            "centroids must lie in their box": np.all(central, axis=1),
            f"labels must be {NO_LABEL} to {last}": (labels >= NO_LABEL) & (labels <= last),
        }
        for rule, good in rules.items():
            if not good.all():
                first = int(good.argmin())
                patch = int(np.searchsorted(ptr, first, side="right")) - 1
                raise InputError(
                    f"{self.path}: {rule}, but {(~good).sum()} of {len(good)} are not, the first is nucleus {first} of "
                    f"patch {patch}: box {boxes[first].tolist()}, centroid {centroids[first].tolist()}, label "
                    f"{labels[first]}"
                )


def select(
    chosen: Sequence[tuple[PatchStore, ArrayLike]],
    out: str | os.PathLike[str],
    *,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write patches of several stores, one store after another, to a new store.

    Parameters
    ----------
    chosen
        Stores and the indices (B,) of their patches, in the order to write.
    out, attrs
        Store to write, and its attributes.

    Raises
    ------
    InputError
        No stores, or stores that differ in classes, patch size or pixel size.
    """
    if not chosen:
        raise InputError(f"{out}: got no stores to take patches from, expected at least one")
    first = chosen[0][0]
    for store, _ in chosen[1:]:
        for key in ("classes", "patch_size", "mpp"):
            if getattr(store, key) != getattr(first, key):
                raise InputError(
                    f"{store.path}: {key}: got {getattr(store, key)}, expected {getattr(first, key)} as in {first.path}"
                )
    with StoreWriter(out, patch_size=first.patch_size, classes=first.classes, mpp=first.mpp, attrs=attrs) as writer:
        for store, patches in chosen:
            wanted = np.asarray(patches, dtype=np.int64)
            for start in range(0, len(wanted), PATCHES_PER_SHARD):
                indices = wanted[start : start + PATCHES_PER_SHARD]
                nuclei = [slice(store.box_ptr[i], store.box_ptr[i + 1]) for i in indices]
                writer.append(
                    store.images(indices),
                    [store.boxes[part] for part in nuclei],
                    [store.labels[part] for part in nuclei],
                    centroids=[store.centroids[part] for part in nuclei],
                    patches=store.patches.iloc[indices],
                )
