"""Write patch stores: patch by patch, or by selecting patches of other stores; `celldetr.store` states the format."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import TransposeCodec, ZstdCodec

import celldetr
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.store.reader import (
    COLUMNS,
    COMPLETE,
    FORMAT,
    INSTANCES,
    NO_LABEL,
    NUMBER_COLUMNS,
    TEXT_COLUMNS,
    PatchStore,
    class_counts,
    content_digest,
)
from celldetr.store.shards import PATCHES_PER_SHARD, EncodedImage, ShardWriter, encode_image, encode_instances

_THREADS = 4  # that encode pixels for callers that do not
# all chunks are written, those of zeros too: a missing file is then an error
_STORED: Any = {"compressors": ZstdCodec(level=1, checksum=True), "config": {"write_empty_chunks": True}}
_PLANAR: Any = TransposeCodec(order=(0, 3, 1, 2))  # red, then green, then blue: smaller, and sooner compressed
_MOST_INSTANCES = np.iinfo(np.uint16).max


class StoreWriter:
    """Append patches; the store appears under its name when the ``with`` block ends without an error.

    Memory holds all boxes; images and instance maps go to the disk as they come.

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
        A nucleus of an instance map does not fit its box. At the end of the block: a box or a centroid does not fit its
        patch, or a label is of no class.
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
        self._mapped = False  # whether the patches have instance maps
        self._without_pixels = 0  # nuclei
        self._nuclei = [(np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty((0, 2), np.float32))]
        self._rows: list[list[Any]] = []

    def __enter__(self) -> Self:
        self._temporary = self._stack.enter_context(atomic(self.path))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(_THREADS))
        self._images, self._instances = (
            self._stack.enter_context(contextlib.closing(ShardWriter(self._temporary / name, ndim)))
            for name, ndim in (("images", 4), ("instances", 3))
        )
        self._stack.push(lambda kind, error, trace: None if error else self._finish())
        return self

    def append(
        self,
        images: NDArray[np.uint8] | Sequence[EncodedImage],
        boxes: Sequence[ArrayLike],
        labels: Sequence[ArrayLike],
        *,
        centroids: Sequence[ArrayLike] | None = None,
        instances: NDArray[np.uint16] | Sequence[NDArray[np.uint16]] | None = None,
        patches: Mapping[str, Any] | pd.DataFrame,
    ) -> None:
        """Append B patches.

        Parameters
        ----------
        images
            (B, S, S, 3) uint8, or what `encode_image` made of each.
        boxes, labels, centroids
            Of each patch: boxes (n, 4) xyxy px, labels (n,), and centroids (n, 2) px if they are known.
        instances
            (B, S, S) uint16: 0 background, k the k-th box of the patch (from 1). For all patches of a store or none.
            A nucleus that others cover may have no pixel; attribute `nuclei_without_pixels` counts these.
        patches
            ``source``, ``group``, ``tissue``, ``x``, ``y``: B values each; ``complete``, if some patches show nuclei
            that have no box.

        Raises
        ------
        ValueError
            Lengths, types or shapes do not agree, or some patches have instance maps and others have none.
        InputError
            A pixel of an instance map is of no box, or does not lie in its box.
        """
        if self.n_patches and (instances is not None) != self._mapped:
            got, had = ("none", "some") if instances is None else ("some", "none")
            raise ValueError(
                f"instances: got {got} for patch {self.n_patches}, {had} for those before, expected all or none"
            )
        self._mapped = instances is not None
        if centroids is None:
            centroids = [np.full((np.size(row), 2), np.nan) for row in labels]
        encoded = self._pool.map(encode_image, images) if isinstance(images, np.ndarray) else images
        maps = (
            [None] * len(boxes)
            if instances is None
            else zip(instances, self._pool.map(encode_instances, instances), strict=True)
        )
        columns = [patches[name] for name in COLUMNS]
        columns.append(patches[COMPLETE] if COMPLETE in patches else [True] * len(boxes))
        for image, box, label, centroid, given, *row in zip(
            encoded, boxes, labels, centroids, maps, *columns, strict=True
        ):
            self._check_side("images", image, 3)
            count = np.size(label)
            nuclei = (
                np.asarray(box, np.float32).reshape(count, 4),
                np.asarray(label, np.int64).reshape(count),
                np.asarray(centroid, np.float32).reshape(count, 2),
            )
            if given:
                self._check_side("instances", given[1])
                self._check_instances(given[0], nuclei[0])
                self._instances.append(given[1])
            self._images.append(image)
            self._nuclei.append(nuclei)
            self._rows.append(row)
            self.n_patches += 1

    def _check_side(self, name: str, image: EncodedImage, *channels: int) -> None:
        if image.shape != (self.patch_size, self.patch_size, *channels):
            raise ValueError(f"{name}: got shape {image.shape}, expected sides of {self.patch_size} px")

    def _check_instances(self, instances: NDArray[np.uint16], boxes: NDArray[np.float32]) -> None:
        """Check an instance map (S, S) against the boxes (n, 4) of its patch, and count the nuclei without a pixel."""
        where = f"{self.path}: instances of patch {self.n_patches}"
        if len(boxes) > _MOST_INSTANCES:
            raise InputError(f"{where}: got {len(boxes)} nuclei, expected at most {_MOST_INSTANCES}")
        pixel = np.flatnonzero(instances)
        number = instances.reshape(-1)[pixel].astype(np.int64) - 1
        if number.size and number.max() >= len(boxes):
            raise InputError(f"{where}: got the number {number.max() + 1}, expected 0 to {len(boxes)}: its boxes")
        y, x = np.divmod(pixel, self.patch_size)
        (x0, y0), (x1, y1) = np.floor(boxes[:, :2]).T, np.ceil(boxes[:, 2:]).T

        def inside(nuclei: Any) -> NDArray[np.bool_]:
            """Which pixels lie in the box of a nucleus, or each in that of its own."""
            found: NDArray[np.bool_] = (x >= x0[nuclei]) & (x < x1[nuclei]) & (y >= y0[nuclei]) & (y < y1[nuclei])
            return found

        own = inside(number)
        if not own.all():
            first = int(own.argmin())
            raise InputError(
                f"{where}: {(~own).sum()} of {len(own)} pixels lie outside of the box of their nucleus, the first at "
                f"x {x[first]}, y {y[first]}: number {number[first] + 1}, box {boxes[number[first]].tolist()}"
            )
        without = np.flatnonzero(np.bincount(number, minlength=len(boxes)) == 0)
        for index in without:
            if not inside(index).any():
                raise InputError(
                    f"{where}: number {index + 1} has no pixel, and no other nucleus covers its box "
                    f"{boxes[index].tolist()}; expected all {len(boxes)} nuclei of the patch"
                )
        self._without_pixels += len(without)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        self._images.close()
        self._instances.close()
        boxes, labels, centroids = (np.concatenate(parts) for parts in zip(*self._nuclei, strict=True))
        ptr = np.cumsum([len(labels) for _, labels, _ in self._nuclei], dtype=np.int64)
        self._check_nuclei(boxes, labels, centroids, ptr)
        arrays = {"boxes": boxes, "labels": labels.astype(np.int8), "centroids": centroids, "box_ptr": ptr}
        table = pd.DataFrame(self._rows, columns=[*COLUMNS, COMPLETE]).astype({COMPLETE: bool})
        arrays |= {f"patches/{name}": table[name].to_numpy(np.int64) for name in NUMBER_COLUMNS}
        if not table[COMPLETE].all():
            arrays[f"patches/{COMPLETE}"] = table[COMPLETE].to_numpy()
        group = zarr.open_group(self._temporary, mode="a", zarr_format=3)
        for name, array in arrays.items():
            group.create_array(name, data=array, **_STORED)
        for name in TEXT_COLUMNS:
            text = np.asarray([str(value) for value in table[name]], dtype=np.dtypes.StringDType())
            group.create_array(f"patches/{name}", shape=text.shape, dtype="string", **_STORED)[...] = text
            arrays[f"patches/{name}"] = text
        shape = (self.n_patches, self.patch_size, self.patch_size)
        _declare(group, "images", (*shape, 3), "uint8", filters=_PLANAR)
        attrs: dict[str, Any] = {
            **self.attrs,
            "format": FORMAT,
            "classes": list(self.classes),
            "mpp": self.mpp,
            "counts": class_counts(labels, self.classes),
            "version": celldetr.__version__,
            "images_digest": self._images.digest,
        }
        attrs.pop(INSTANCES, None)  # of another store
        if self._mapped:
            _declare(group, "instances", shape, "uint16")
            attrs |= {INSTANCES: self._instances.digest, "nuclei_without_pixels": self._without_pixels}
        group.attrs.update({**attrs, "digest": content_digest((*shape, 3), arrays, attrs)})

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


def _declare(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str, **options: Any) -> None:
    """Make the array whose shards are written already."""
    chunks, shards = ((count, *shape[1:]) for count in (1, PATCHES_PER_SHARD))
    group.create_array(name, shape=shape, chunks=chunks, shards=shards, dtype=dtype, **options, **_STORED)


def select(
    chosen: Sequence[tuple[PatchStore, ArrayLike]],
    out: str | os.PathLike[str],
    *,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write patches of several stores, one store after another, to a new store.

    It has instance maps if all stores have them.

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
    mapped = all(store.has_instances for store, _ in chosen)
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
                    instances=store.instances(indices) if mapped else None,
                    patches=store.patches.iloc[indices],
                )
