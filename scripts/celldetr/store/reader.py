"""Read patch stores; `celldetr.store` states the format."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import ArrayLike, NDArray

from celldetr.runtime.errors import InputError
from celldetr.store.shards import PATCHES_PER_SHARD, ZSTD, read_chunks, shard_path

FORMAT = 4
NO_LABEL = -1
TEXT_COLUMNS = ("source", "group", "tissue")
NUMBER_COLUMNS = ("x", "y")
COLUMNS = (*TEXT_COLUMNS, *NUMBER_COLUMNS)
ARRAYS = ("boxes", "labels", "centroids", "box_ptr", *(f"patches/{name}" for name in COLUMNS))
"""All but the images and the instance maps, and what is optional."""
COMPLETE = "complete"
"""Optional column: whether all nuclei that a patch shows have a box; a store without it has complete patches alone."""
_OPTIONAL = f"patches/{COMPLETE}"
INSTANCES = "instances_digest"
"""Attribute that a store with instance maps has, and no other."""
_IDENTITY = ("images_digest", "classes", "mpp", "counts", "image", "settings")  # attributes that the digest covers


@dataclass(frozen=True)
class Patch:
    """One patch: image (S, S, 3) uint8, boxes (n, 4) xyxy px, labels (n,)."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int8]


@dataclass(frozen=True)
class PatchStore:
    """A patch store that is open for reading; all but its pixels is in memory. Use `open_store` to make one."""

    path: Path
    attrs: dict[str, Any]
    digest: str
    """Identity of the content, see `content_digest`."""
    classes: tuple[str, ...]
    mpp: float
    """Pixel size in um."""
    n_patches: int
    patch_size: int
    """Side S of a patch in px."""
    boxes: NDArray[np.float32]
    labels: NDArray[np.int8]
    centroids: NDArray[np.float32]
    box_ptr: NDArray[np.int64]
    patches: pd.DataFrame
    """One row per patch: `COLUMNS` and `COMPLETE`."""

    def __len__(self) -> int:
        return self.n_patches

    def read(self, index: int) -> Patch:
        """Read one patch."""
        return Patch(self.images([index])[0], *self.boxes_of(index))

    def boxes_of(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Boxes (n, 4) and labels (n,) of one patch."""
        nuclei = slice(self.box_ptr[index], self.box_ptr[index + 1])
        return self.boxes[nuclei], self.labels[nuclei]

    def images(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Read the images (B, S, S, 3) at indices (B,), in their order.

        Raises
        ------
        InputError
            An image is damaged; names the store and the patches.
        IndexError
            The store has no such patch.
        """
        wanted = self._checked(indices)
        images = np.empty((len(wanted), self.patch_size, self.patch_size, 3), np.uint8)
        planes = np.empty((3, self.patch_size, self.patch_size), np.uint8)

        def take(row: int, chunk: bytes) -> None:
            ZSTD.decode(chunk, out=planes.reshape(-1))
            for channel in range(3):  # numpy copies slowly along an axis of length three
                images[row, ..., channel] = planes[channel]

        self._each_chunk("images", 4, wanted, take)
        return images

    @property
    def has_instances(self) -> bool:
        """Whether the store has instance maps of its patches, if there are any."""
        return self.n_patches == 0 or INSTANCES in self.attrs

    def instances(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """Read the instance maps (B, S, S) at indices (B,): 0 background, k the k-th box of the patch (from 1).

        Raises
        ------
        InputError
            The store has none, or one is damaged or of other patches; names the store and the patches.
        IndexError
            The store has no such patch.
        """
        if not self.has_instances:
            raise InputError(
                f"{self.path}: instances: got none, expected an instance map per patch, as rule convert_pannuke writes "
                "it; delete an older store of PanNuke and make it again; other data has no instance maps"
            )
        wanted = self._checked(indices)
        found = np.empty((len(wanted), self.patch_size, self.patch_size), "<u2")
        self._each_chunk("instances", 3, wanted, lambda row, chunk: ZSTD.decode(chunk, out=found[row].reshape(-1)))
        wrong = np.flatnonzero(found.max(axis=(1, 2), initial=0) > np.diff(self.box_ptr)[wanted])
        if wrong.size:
            raise InputError(
                f"{self.path}: instances of patch {wanted[wrong[0]]}: got numbers above those of its boxes; they are "
                "of another store: delete the store and make it again"
            )
        return found

    def _checked(self, indices: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n_patches):
            raise IndexError(f"{self.path}: patches {wanted.min()} to {wanted.max()}, there are {self.n_patches}")
        return wanted

    def _each_chunk(
        self, array: str, ndim: int, patches: NDArray[np.int64], take: Callable[[int, bytes], object]
    ) -> None:
        """Call ``take(row, chunk)`` with each row of `patches` (B,) and the compressed chunk of its patch."""
        shards = patches // PATCHES_PER_SHARD
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            chosen = patches[rows]
            with _naming_damage(self.path, f"{array} of patches {chosen.min()} to {chosen.max()}"):
                chunks = read_chunks(shard_path(self.path / array, ndim, shard), chosen % PATCHES_PER_SHARD)
                for row, chunk in zip(rows.tolist(), chunks, strict=True):
                    take(row, chunk)


@contextlib.contextmanager
def _naming_damage(store: Path, entry: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each codec has its own kind of error for damaged bytes
        raise InputError(
            f"{store}: {entry}: cannot be read ({error}); the store is damaged: delete and make it again"
        ) from error


def open_store(path: str | os.PathLike[str]) -> PatchStore:
    """Open a store, and check that all but its pixels is what was written; the pixels are checked when they are read.

    Raises
    ------
    InputError
        No store, or an incomplete, damaged or changed one; names the store and the entry.
    """
    path = Path(path)
    images, arrays, attrs = _open(path)
    content: dict[str, Any] = {}
    for name, array in arrays.items():
        with _naming_damage(path, name):
            content[name] = np.asarray(array[...])
    digest = content_digest(images.shape, content, attrs)
    if digest != attrs["digest"]:
        raise InputError(
            f"{path}: digest: got {digest} of the content, expected {attrs['digest']}; nuclei, table or attributes "
            "were changed after the store was written: delete it and make it again"
        )
    table = pd.DataFrame({name: content.pop(f"patches/{name}") for name in COLUMNS})
    table[COMPLETE] = content.pop(f"patches/{COMPLETE}", np.ones(len(table), dtype=bool))
    return PatchStore(
        path=path,
        attrs=attrs,
        digest=digest,
        classes=tuple(attrs["classes"]),
        mpp=float(attrs["mpp"]),
        n_patches=images.shape[0],
        patch_size=images.shape[1],
        patches=table.astype(dict.fromkeys(TEXT_COLUMNS, object)),
        **content,
    )


def content_digest(images: Sequence[int], arrays: Mapping[str, NDArray[Any]], attrs: Mapping[str, Any]) -> str:
    """SHA-256 of what a store holds; it depends neither on compression nor on how the store was written.

    Parameters
    ----------
    images
        Shape of the images.
    arrays
        `ARRAYS`, and `COMPLETE` of a store that has it, by name.
    attrs
        All; those are covered that are read later, and `images_digest` and, if there are instance maps,
        `instances_digest`: the SHA-256 over the SHA-256 of each image and map.
    """
    identity = {key: attrs.get(key) for key in _IDENTITY}
    if INSTANCES in attrs:
        identity[INSTANCES] = attrs[INSTANCES]
    head = [list(images), identity]
    found = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in [*ARRAYS, *([_OPTIONAL] if _OPTIONAL in arrays else [])]:
        array = arrays[name]
        found.update(f"{name} {array.shape}".encode())
        found.update(array.tobytes() if array.dtype.kind in "ifb" else json.dumps(array.tolist()).encode())
    return found.hexdigest()


def class_counts(labels: NDArray[np.integer], classes: Sequence[str]) -> dict[str, int]:
    """Count nuclei per class name; those without a label under ``unlabelled``."""
    counts = {name: int((labels == index).sum()) for index, name in enumerate(classes)}
    return {**counts, "unlabelled": int((labels == NO_LABEL).sum())}


def _open(path: Path) -> tuple[zarr.Array, dict[str, zarr.Array], dict[str, Any]]:
    """Images, arrays to read whole, and attributes; an array that lacks a file is refused: Zarr would read zeros."""
    if not path.is_dir():
        raise InputError(f"{path}: got no such folder, expected a patch store; run the rule that makes it")
    try:
        group = zarr.open_group(path, mode="r")
        found = group.attrs.get("format")
        if found != FORMAT:
            raise InputError(f"{path}: attribute format: got {found!r}, expected {FORMAT}; make the store again")
        by_patch = ("images", "instances") if INSTANCES in group.attrs else ("images",)
        whole = [*ARRAYS, *([_OPTIONAL] if _OPTIONAL in group else [])]
        arrays: dict[str, Any] = {name: group[name] for name in (*by_patch, *whole)}
    except (KeyError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened as a patch store ({error!r}); make it again") from error
    for name, array in arrays.items():
        sides = array.shards or array.chunks
        expected = math.prod(-(-length // side) for length, side in zip(array.shape, sides, strict=True))
        files = sum(file.is_file() for file in (path / name / "c").rglob("*"))
        if files != expected:
            raise InputError(
                f"{path}: {name}: got {files} of {expected} files; the store is incomplete: delete it and make it again"
            )
    return arrays["images"], {name: arrays[name] for name in whole}, dict(group.attrs)
