"""Write patch stores: patch by patch, or by selecting patches of other stores; `celldetr.store` states the format."""

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import ZstdCodec

import celldetr
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.store.reader import (
    COLUMNS,
    FORMAT,
    NO_LABEL,
    NUMBER_COLUMNS,
    TEXT_COLUMNS,
    PatchStore,
    class_counts,
    content_digest,
)

PATCHES_PER_SHARD = 256
# A checksum turns a changed bit into an error. All chunks are written, black ones too: a missing file is then an error.
_STORED: Any = {"compressors": ZstdCodec(level=1, checksum=True), "config": {"write_empty_chunks": True}}


class StoreWriter:
    """Append patches; the store appears under its name when the ``with`` block ends without an error.

    Memory holds one shard of images and all boxes.

    Parameters
    ----------
    path
        Folder to write; an existing store is replaced.
    patch_size
        Side S of a patch in px.
    classes
        Class names in the order of the labels.
    mpp
        Pixel size in um.
    attrs
        More JSON values to keep, e.g. ``provenance`` and ``dropped``; may be changed until the block ends.
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
        self._waiting: list[NDArray[np.uint8]] = []
        self._written = 0
        self._images_hash = hashlib.sha256()
        self._counts: list[int] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int8]] = []
        self._centroids: list[NDArray[np.float32]] = []
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def __enter__(self) -> Self:
        temporary = self._stack.enter_context(atomic(self.path))
        self._stack.push(lambda kind, error, trace: None if error else self._finish())
        self._group = zarr.open_group(temporary, mode="w", zarr_format=3)
        self._images = self._group.create_array(
            "images",
            shape=(0, self.patch_size, self.patch_size, 3),
            chunks=(1, self.patch_size, self.patch_size, 3),
            shards=(PATCHES_PER_SHARD, self.patch_size, self.patch_size, 3),
            dtype="uint8",
            **_STORED,
        )
        return self

    def append(
        self,
        images: NDArray[np.uint8],
        boxes: Sequence[ArrayLike],
        labels: Sequence[ArrayLike],
        *,
        centroids: Sequence[ArrayLike] | None = None,
        patches: Mapping[str, Sequence[Any] | NDArray[Any]],
    ) -> None:
        """Append B patches.

        Parameters
        ----------
        images
            (B, S, S, 3) uint8.
        boxes, labels
            Boxes (n, 4) xyxy px and labels (n,) of each patch.
        centroids
            Centroids (n, 2) of each patch; None if unknown.
        patches
            ``source``, ``group``, ``tissue``, ``x``, ``y``: B values each.

        Raises
        ------
        ValueError
            Lengths or shapes do not agree, or a label is of no class.
        """
        count = len(images)
        if images.shape[1:] != (self.patch_size, self.patch_size, 3) or images.dtype != np.uint8:
            raise ValueError(f"images: got {images.dtype} {images.shape}, expected uint8 (B, S, S, 3)")
        if centroids is None:
            centroids = [np.full((np.size(row), 2), np.nan) for row in labels]
        lengths = {"boxes": len(boxes), "labels": len(labels), "centroids": len(centroids)}
        lengths |= {name: len(patches[name]) for name in self._columns}
        if set(lengths.values()) != {count}:
            raise ValueError(f"got {lengths}, expected {count} of each")
        for box, label, centroid in zip(boxes, labels, centroids, strict=True):
            flat = np.asarray(label).reshape(-1)
            if flat.size and not NO_LABEL <= flat.min() <= flat.max() < len(self.classes):
                raise ValueError(
                    f"labels: got {flat.min()} to {flat.max()}, expected {NO_LABEL} to {len(self.classes) - 1}"
                )
            self._counts.append(len(flat))
            self._labels.append(flat.astype(np.int8))
            self._boxes.append(np.asarray(box, dtype=np.float32).reshape(len(flat), 4))
            self._centroids.append(np.asarray(centroid, dtype=np.float32).reshape(len(flat), 2))
        for name, column in self._columns.items():
            column.extend(np.asarray(patches[name]).tolist())
        for image in images:
            self._images_hash.update(hashlib.sha256(image.tobytes()).digest())
            self._waiting.append(image)
        self.n_patches += count
        while len(self._waiting) >= PATCHES_PER_SHARD:
            self._flush(PATCHES_PER_SHARD)

    def _flush(self, count: int) -> None:
        """Write the first waiting images: a whole shard, or at the end of the store the rest."""
        if count:
            stop = self._written + count
            self._images.resize((stop, *self._images.shape[1:]))
            self._images[self._written : stop] = np.stack(self._waiting[:count])
            self._written = stop
            del self._waiting[:count]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        self._flush(len(self._waiting))
        labels = np.concatenate([np.empty(0, np.int8), *self._labels])
        arrays: dict[str, NDArray[Any]] = {
            "boxes": np.concatenate([np.empty((0, 4), np.float32), *self._boxes]),
            "labels": labels,
            "centroids": np.concatenate([np.empty((0, 2), np.float32), *self._centroids]),
            "box_ptr": np.concatenate([[0], np.cumsum(self._counts, dtype=np.int64)]).astype(np.int64),
        }
        for name in NUMBER_COLUMNS:
            arrays[f"patches/{name}"] = np.asarray(self._columns[name], dtype=np.int64)
        for name, array in arrays.items():
            self._group.create_array(name, data=array, **_STORED)
        for name in TEXT_COLUMNS:
            text = np.asarray([str(value) for value in self._columns[name]], dtype=np.dtypes.StringDType())
            self._group.create_array(f"patches/{name}", shape=text.shape, dtype="string", **_STORED)[...] = text
            arrays[f"patches/{name}"] = text
        own: dict[str, Any] = {
            "format": FORMAT,
            "classes": list(self.classes),
            "mpp": self.mpp,
            "counts": class_counts(labels, self.classes),
            "version": celldetr.__version__,
            "images_digest": self._images_hash.hexdigest(),
        }
        own["digest"] = content_digest(arrays, {**self.attrs, **own})
        self._group.attrs.update({**self.attrs, **own})


def select(
    chosen: Sequence[tuple[PatchStore, ArrayLike]],
    out: str | os.PathLike[str],
    *,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write selected patches of several stores, one store after another, to a new store.

    Parameters
    ----------
    chosen
        Stores and the indices (B,) of their patches, in the order to write.
    out
        Store to write.
    attrs
        Its attributes.

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
                    patches={str(name): store.patches[name].iloc[indices].to_numpy() for name in store.patches},
                )
