"""Read and validate patch stores; `celldetr.store` states the format."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import ArrayLike, NDArray

from celldetr.runtime.errors import InputError

FORMAT = 3
NO_LABEL = -1
TEXT_COLUMNS = ("source", "group", "tissue")
NUMBER_COLUMNS = ("x", "y")
COLUMNS = (*TEXT_COLUMNS, *NUMBER_COLUMNS)
ARRAYS = ("images", "boxes", "labels", "centroids", "box_ptr", *(f"patches/{name}" for name in COLUMNS))

_IDENTITY = ("images_digest", "classes", "mpp", "image")  # attributes that the digest covers


@dataclass(frozen=True)
class Patch:
    """One patch: image (S, S, 3) uint8, boxes (n, 4) xyxy px, labels (n,)."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int8]


class PatchStore:
    """A patch store that is open for reading; all but the images is in memory. Use `open_store` to make one.

    Attributes
    ----------
    path
        Folder of the store.
    classes
        Class names in the order of the labels.
    mpp
        Pixel size in um.
    boxes, labels, centroids, box_ptr
        Arrays as stated in `celldetr.store`.
    attrs
        All attributes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._arrays, self.attrs = _open(self.path)
        self.classes: tuple[str, ...] = tuple(self.attrs["classes"])
        self.mpp = float(self.attrs["mpp"])
        self.boxes: NDArray[np.float32] = self._load("boxes")
        self.labels: NDArray[np.int8] = self._load("labels")
        self.centroids: NDArray[np.float32] = self._load("centroids")
        self.box_ptr: NDArray[np.int64] = self._load("box_ptr")

    def __len__(self) -> int:
        return self.n_patches

    @property
    def n_patches(self) -> int:
        """Number of patches N."""
        return int(self._arrays["images"].shape[0])

    @property
    def patch_size(self) -> int:
        """Side S of a patch in px."""
        return int(self._arrays["images"].shape[1])

    @cached_property
    def patches(self) -> pd.DataFrame:
        """One row per patch: `COLUMNS`."""
        columns = {name: self._load(f"patches/{name}") for name in COLUMNS}
        return pd.DataFrame(columns).astype(dict.fromkeys(TEXT_COLUMNS, object))

    @cached_property
    def digest(self) -> str:
        """Identity of the content, see `content_digest`.

        Raises
        ------
        InputError
            Boxes, labels, the table of patches or the pixel size are not those that were written. (Checksums of the
            chunks protect the images.)
        """
        found = content_digest({name: self._load(name) for name in ARRAYS[1:]}, self.attrs)
        if found != self.attrs.get("digest"):
            raise InputError(
                f"{self.path}: digest: got {found} of the content, expected {self.attrs.get('digest')}; nuclei, places "
                "or attributes were changed after the store was written: delete it and make it again"
            )
        return found

    def read(self, index: int) -> Patch:
        """Read one patch."""
        boxes, labels = self.boxes_of(index)
        return Patch(self.images([index])[0], boxes, labels)

    def boxes_of(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Boxes (n, 4) and labels (n,) of one patch."""
        nuclei = slice(self.box_ptr[index], self.box_ptr[index + 1])
        return self.boxes[nuclei], self.labels[nuclei]

    def images(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Read the images (B, S, S, 3) at indices (B,), in their order; neighbours are read in one go.

        Raises
        ------
        InputError
            An image is damaged; names the store and the patches.
        IndexError
            The store has no such patch.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n_patches):
            raise IndexError(f"{self.path}: patches {wanted.min()} to {wanted.max()}, there are {self.n_patches}")
        patches, place = np.unique(wanted, return_inverse=True)
        pixels = np.empty((len(patches), *self._arrays["images"].shape[1:]), np.uint8)
        starts = np.flatnonzero(np.diff(patches, prepend=-2) != 1)
        for start, stop in zip(starts, np.append(starts[1:], len(patches)), strict=False):
            pixels[start:stop] = self._load("images", slice(int(patches[start]), int(patches[stop - 1]) + 1))
        return pixels[place]

    def _load(self, name: str, rows: slice = slice(None)) -> Any:
        try:
            return np.asarray(self._arrays[name][rows])
        except Exception as error:  # each codec has its own kind of error for damaged bytes
            where = "" if rows == slice(None) else f" of patches {rows.start} to {rows.stop - 1}"
            raise InputError(
                f"{self.path}: {name}{where}: cannot be read ({error}); the store is damaged: delete and make it again"
            ) from error


def open_store(path: str | os.PathLike[str], *, validate: bool = True) -> PatchStore:
    """Open a store and, by default, validate all of it but the pixels.

    Raises
    ------
    InputError
        No store, an incomplete or an invalid one; names the store and the entry.
    """
    store = PatchStore(path)
    if validate:
        _validate(store)
    return store


def content_digest(arrays: Mapping[str, ArrayLike], attrs: Mapping[str, Any]) -> str:
    """SHA-256 of what a store holds; it depends neither on compression nor on how the store was written.

    Parameters
    ----------
    arrays
        All arrays but the images, by name.
    attrs
        `images_digest` (SHA-256 over the SHA-256 of each image), `classes`, `mpp`, and `image` if there is one.
    """
    found = hashlib.sha256(json.dumps([attrs.get(key) for key in _IDENTITY], sort_keys=True).encode())
    for name in ARRAYS[1:]:
        array = np.asarray(arrays[name])
        found.update(f"{name} {array.shape}".encode())
        found.update(array.tobytes() if array.dtype.kind in "if" else json.dumps(array.tolist()).encode())
    return found.hexdigest()


def class_counts(labels: NDArray[np.integer], classes: Sequence[str]) -> dict[str, int]:
    """Count nuclei per class name; those without a label under ``unlabelled``."""
    counts = {name: int((labels == index).sum()) for index, name in enumerate(classes)}
    return {**counts, "unlabelled": int((labels == NO_LABEL).sum())}


def _open(path: Path) -> tuple[dict[str, zarr.Array], dict[str, Any]]:
    """Open the arrays and attributes of a store; an array that lacks a file is refused, as Zarr would read zeros."""
    if not path.is_dir():
        raise InputError(f"{path}: got no such folder, expected a patch store; run the rule that makes it")
    try:
        group = zarr.open_group(path, mode="r")
        found = group.attrs.get("format")
        if found != FORMAT:
            raise InputError(f"{path}: attribute format: got {found!r}, expected {FORMAT}; make the store again")
        arrays: dict[str, Any] = {name: group[name] for name in ARRAYS}
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
    return arrays, dict(group.attrs)


def _validate(store: PatchStore) -> None:
    count, size, nuclei = store.n_patches, store.patch_size, len(store.labels)
    expected = {
        "images": (store._arrays["images"].shape, (count, size, size, 3)),
        "box_ptr": (store.box_ptr.shape, (count + 1,)),
        "boxes": (store.boxes.shape, (nuclei, 4)),
        "centroids": (store.centroids.shape, (nuclei, 2)),
        "patches": (store.patches.shape, (count, len(COLUMNS))),
    }
    for name, (got, want) in expected.items():
        if got != want:
            raise InputError(f"{store.path}: {name}: got shape {got}, expected {want}")
    ptr = store.box_ptr
    if ptr[0] != 0 or ptr[-1] != nuclei or (np.diff(ptr) < 0).any():
        raise InputError(
            f"{store.path}: box_ptr: got {ptr[0]} to {ptr[-1]}, expected offsets that rise from 0 to {nuclei}"
        )
    _validate_nuclei(store)
    _ = store.digest  # raises if something was changed


def _validate_nuclei(store: PatchStore) -> None:
    boxes, centroids = store.boxes, store.centroids
    with np.errstate(invalid="ignore"):
        rules: dict[str, Any] = {
            "boxes must be finite": np.isfinite(boxes).all(axis=1),
            f"boxes must lie in 0 to {store.patch_size} px": (boxes >= 0).all(axis=1)
            & (boxes <= store.patch_size).all(axis=1),
            "boxes must not be empty": (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]),
            f"labels must be -1 to {len(store.classes) - 1}": (store.labels >= NO_LABEL)
            & (store.labels < len(store.classes)),
            "centroids must lie in their box": np.isnan(centroids).all(axis=1)
            | ((centroids >= boxes[:, :2]) & (centroids <= boxes[:, 2:])).all(axis=1),
        }
    for rule, good in rules.items():
        bad = np.flatnonzero(~good)
        if bad.size:
            patch = int(np.searchsorted(store.box_ptr, bad[0], side="right")) - 1
            raise InputError(
                f"{store.path}: {rule}, but {bad.size} of {len(good)} are not, the first is nucleus {bad[0]} "
                f"of patch {patch}: box {boxes[bad[0]].tolist()}, label {store.labels[bad[0]]}"
            )
