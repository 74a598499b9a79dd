"""Reading, checking and splitting patch stores; the format is stated in `celldetr.store`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import ArrayLike, NDArray

from celldetr.runtime.errors import InputError
from celldetr.store.shards import ShardedImages

FORMAT = 2
TEXT_COLUMNS = ("source", "group", "tissue")
NUMBER_COLUMNS = ("x", "y")
COLUMNS = (*TEXT_COLUMNS, *NUMBER_COLUMNS)
ARRAYS = {
    "images": ("uint8", 4),
    "boxes": ("float32", 2),
    "labels": ("int8", 1),
    "centroids": ("float32", 2),
    "box_ptr": ("int64", 1),
}
ATTRIBUTES: dict[str, tuple[Any, str]] = {
    "classes": (list, "a list of names"),
    "mpp": (int | float, "a number"),
    "counts": (dict, "a number of nuclei per class"),
}
NO_LABEL = -1


@dataclass(frozen=True)
class Patch:
    """One patch: image (S, S, 3) uint8, boxes (n, 4) xyxy px, labels (n,)."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int8]


class PatchStore:
    """A patch store that is open for reading; all but the images is in memory. Made by `open_store`.

    Attributes
    ----------
    path
        Folder of the store.
    classes
        Class names in the order of the labels.
    mpp
        Size of a pixel in um.
    boxes, labels, centroids, box_ptr
        Arrays as stated in `celldetr.store`.
    attrs
        All attributes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        group = _open(self.path)
        self.attrs: dict[str, Any] = dict(group.attrs)
        self.classes: tuple[str, ...] = tuple(self.attrs["classes"])
        self.mpp = float(self.attrs["mpp"])
        _array(self.path, group, "images")
        self._images = ShardedImages(self.path / "images")
        self.boxes: NDArray[np.float32] = _read(self.path, group, "boxes")
        self.labels: NDArray[np.int8] = _read(self.path, group, "labels")
        self.centroids: NDArray[np.float32] = _read(self.path, group, "centroids")
        self.box_ptr: NDArray[np.int64] = _read(self.path, group, "box_ptr")
        self._group = group

    def __len__(self) -> int:
        return self.n_patches

    @property
    def n_patches(self) -> int:
        """Number of patches N."""
        return int(self._images.shape[0])

    @property
    def patch_size(self) -> int:
        """Side S of a patch in px."""
        return int(self._images.shape[1])

    @cached_property
    def patches(self) -> pd.DataFrame:
        """One row per patch: `COLUMNS`."""
        columns: dict[str, Any] = {}
        for name in TEXT_COLUMNS:
            columns[name] = _read(self.path, self._group, f"patches/{name}").astype(object)
        for name in NUMBER_COLUMNS:
            columns[name] = _read(self.path, self._group, f"patches/{name}")
        return pd.DataFrame(columns)

    def read(self, index: int) -> Patch:
        """Read one patch."""
        boxes, labels = self.boxes_of(index)
        return Patch(self.images([index])[0], boxes, labels)

    def boxes_of(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Boxes (n, 4) and labels (n,) of one patch."""
        nuclei = slice(self.box_ptr[index], self.box_ptr[index + 1])
        return self.boxes[nuclei], self.labels[nuclei]

    def images(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Read the images (B, S, S, 3) at indices (B,), in their order.

        Raises
        ------
        InputError
            An image is damaged; names the store and the patch.
        IndexError
            There is no such patch.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n_patches):
            raise IndexError(f"{self.path}: patches {wanted.min()} to {wanted.max()}, there are {self.n_patches}")
        return self._images.read(wanted)

    def all_images(self) -> NDArray[np.uint8]:
        """Read all images (N, S, S, 3)."""
        return self.images(np.arange(self.n_patches))

    def spans(self, count: int = 512) -> Iterator[NDArray[np.int64]]:
        """Yield the indices of all patches, `count` at a time."""
        for start in range(0, self.n_patches, count):
            yield np.arange(start, min(start + count, self.n_patches))


def open_store(path: str | os.PathLike[str], *, validate: bool = True) -> PatchStore:
    """Open a store and, unless told otherwise, check all of it but the pixels.

    Raises
    ------
    InputError
        No store, or not a valid one; names the store and the entry.
    """
    store = PatchStore(path)
    if validate:
        check(store)
    return store


def validate(path: str | os.PathLike[str]) -> None:
    """Check everything in a store, reading every pixel once.

    Raises
    ------
    InputError
        Names the store and the first entry that is wrong.
    """
    store = open_store(path)
    for indices in store.spans():
        store.images(indices)


def check(store: PatchStore) -> None:
    """Check all of an open store but the pixels.

    Raises
    ------
    InputError
        Names the store and the first entry that is wrong.
    """
    path, count, size = store.path, store.n_patches, store.patch_size
    nuclei = len(store.labels)
    expected = {
        "images": (store._images.shape, (count, size, size, 3)),
        "box_ptr": (store.box_ptr.shape, (count + 1,)),
        "boxes": (store.boxes.shape, (nuclei, 4)),
        "centroids": (store.centroids.shape, (nuclei, 2)),
        "patches": (store.patches.shape, (count, len(COLUMNS))),
    }
    for name, (got, want) in expected.items():
        if got != want:
            raise InputError(f"{path}: {name}: got shape {got}, expected {want}")
    ptr = store.box_ptr
    if ptr[0] != 0 or ptr[-1] != nuclei or (np.diff(ptr) < 0).any():
        raise InputError(f"{path}: box_ptr: got {ptr[0]} to {ptr[-1]}, expected offsets that rise from 0 to {nuclei}")
    _check_entries(store)
    counts = store.attrs["counts"]
    if counts != class_counts(store.labels, store.classes):
        raise InputError(f"{path}: attribute counts: got {counts}, but the labels are others; the store is damaged")


def _check_entries(store: PatchStore) -> None:
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


def class_counts(labels: NDArray[np.integer], classes: Sequence[str]) -> dict[str, int]:
    """Count nuclei per class name; those without a label under ``unlabelled``."""
    counts = {name: int((labels == index).sum()) for index, name in enumerate(classes)}
    return {**counts, "unlabelled": int((labels == NO_LABEL).sum())}


def split_groups(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Split patches so that no group is in two parts, as close to the shares as whole groups allow.

    Groups are shuffled; the largest go first, each to the part that lacks most.

    Parameters
    ----------
    groups
        Group (slide, block) of each patch (N,).
    shares
        Part -> share of the patches; they sum to 1.
    seed
        Seed of the shuffle.

    Returns
    -------
    dict
        Part -> sorted indices of its patches.

    Raises
    ------
    InputError
        Shares do not sum to 1, or there are fewer groups than parts.
    """
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) < 0:
        raise InputError(f"shares: got {dict(shares)}, expected numbers from 0 that sum to 1")
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    wanted = [part for part, share in shares.items() if share > 0]
    if 0 < len(names) < len(wanted):
        raise InputError(f"groups: got {len(names)} ({', '.join(names[:5])}), expected one for each of {wanted}")
    size = np.bincount(member, minlength=len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-size[order], kind="stable")]
    lacking = {part: shares[part] * len(member) for part in wanted}
    chosen: dict[str, list[int]] = {part: [] for part in shares}
    for group in order:
        part = max(lacking, key=lambda name: (not chosen[name], lacking[name]))
        chosen[part].append(int(group))
        lacking[part] -= size[group]
    return {part: np.flatnonzero(np.isin(member, ids)) for part, ids in chosen.items()}


def _open(path: Path) -> zarr.Group:
    if not path.is_dir():
        raise InputError(f"{path}: got no such folder, expected a patch store; run the rule that makes it")
    try:
        group = zarr.open_group(path, mode="r")
    except Exception as error:
        raise InputError(f"{path}: is no Zarr group ({error}); expected a patch store: make it again") from error
    found = group.attrs.get("format")
    if found != FORMAT:
        raise InputError(f"{path}: attribute format: got {found!r}, expected {FORMAT}; make the store again")
    for key, (kind, words) in ATTRIBUTES.items():
        got = group.attrs.get(key)
        if not isinstance(got, kind) or (key == "classes" and not all(isinstance(name, str) for name in got)):
            raise InputError(f"{path}: attribute {key}: got {got!r}, expected {words}; make the store again")
    return group


def _array(path: Path, group: zarr.Group, name: str) -> zarr.Array:
    try:
        found = group.get(name)
    except Exception as error:  # Zarr has many kinds of error for damaged metadata
        raise InputError(f"{path}: {name}: cannot be opened ({error}); the store is damaged: make it again") from error
    if not isinstance(found, zarr.Array):
        raise InputError(f"{path}: {name}: got no such array; make the store again")
    dtype, dimensions = ARRAYS.get(name, (None, 1))
    if (dtype is not None and found.dtype != np.dtype(dtype)) or found.ndim != dimensions:
        raise InputError(
            f"{path}: {name}: got {found.dtype} with {found.ndim} dimensions, expected {dtype} with {dimensions}"
        )
    return found


def _read(path: Path, group: zarr.Group, name: str) -> Any:
    array = _array(path, group, name)
    chunks = sum(file.is_file() for file in (path / name / "c").rglob("*"))
    if array.size and chunks != array.nchunks:  # Zarr would fill in zeros
        raise InputError(
            f"{path}: {name}: got {chunks} of {array.nchunks} chunks; the store is damaged: delete it and make it again"
        )
    try:
        return np.asarray(array[...])
    except Exception as error:  # each codec has its own kind of error for damaged bytes
        raise InputError(f"{path}: {name}: cannot be read ({error}); the store is damaged: make it again") from error
