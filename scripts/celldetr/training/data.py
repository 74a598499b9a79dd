"""Patches of a run: which of them make a batch, and their nuclei as padded tensors.

The order of an epoch depends on the seed and the epoch only, and a batch on its step only, so that a run can continue
at any step and with any number of processes. Every epoch has ceil(N / batch size) full batches: the last one is filled
with the first patches of the epoch's order.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from celldetr.config.experiment import TrainingSettings
from celldetr.model.boxes import NOISE_DRAWS, xyxy_to_cxcywh
from celldetr.model.device import padded_size, to_device
from celldetr.runtime.errors import InputError, ProcessFailed
from celldetr.store import PatchStore

ORDER, AUGMENTATION, NOISE, DROPOUT, VALIDATION = range(5)
"""Uses of random numbers; each has its own stream for a seed and a step."""

UNLABELLED = -1
"""Label of a nucleus without a label, and of padding."""

log = logging.getLogger(__name__)


def random_stream(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers that depend only on the seed, the step (or epoch, or patch) and the purpose."""
    return np.random.default_rng([seed, step, purpose])


@dataclass(frozen=True)
class Targets:
    """The nuclei of B images, padded to the same number of slots R."""

    boxes: Tensor  # (B, R, 4) float32, cxcywh in [0, 1]; the whole image at padding, so that no size is 0
    labels: Tensor  # (B, R) int64; -1 at padding and at nuclei without a label
    counts: Tensor  # nuclei of each image (B,) int64, on the CPU
    complete: Tensor  # (B,) bool, False where nuclei are visible that have no box: what else is found is no mistake

    @property
    def valid(self) -> Tensor:
        """(B, R) bool, False at padding."""
        counts = self.counts.to(self.labels.device, non_blocking=True)
        return torch.arange(self.labels.shape[1], device=self.labels.device) < counts[:, None]


@dataclass
class Batch:
    """One process' images of a batch."""

    images: Tensor  # (B, S, S, 3) uint8; `celldetr.training.prefetch.prepare` makes (B, 3, S, S) float32 of them
    targets: Targets
    patches: NDArray[np.int64]  # index of each image in its `PatchData` (B,)
    step: int  # of the run; -1 in validation
    rows: slice  # which images of the global batch these are
    # nuclei of each image of the global batch; no view of a tensor: a loader process moves the memory of tensors
    counts_global: NDArray[np.int64]
    instances: Tensor | None = None  # (B, S, S) int16: 0 background, k the k-th nucleus; if `PatchData` reads them

    @property
    def training(self) -> bool:
        """True in a training step, False in validation."""
        return self.step >= 0

    @property
    def boxes_global(self) -> int:
        """Nuclei in the global batch."""
        return int(self.counts_global.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Move images and nuclei to a device, in place."""
        targets = self.targets
        self.images = to_device(self.images, device)
        boxes, labels, complete = (
            to_device(values, device) for values in (targets.boxes, targets.labels, targets.complete)
        )
        self.targets = Targets(boxes, labels, targets.counts, complete)
        if self.instances is not None:
            self.instances = to_device(self.instances, device)
        return self


def noise_uniforms(batch: Batch, targets: Targets, seed: int) -> Tensor:
    """Random numbers (B, R, 9) for `celldetr.model.boxes.noise`, the same for a nucleus with any number of processes.

    They are 1 at padding, which therefore never gets noise.
    """
    drawn = random_stream(seed, batch.step, NOISE).random((batch.boxes_global, NOISE_DRAWS), dtype=np.float32)
    before = int(batch.counts_global[: batch.rows.start].sum())
    slots = targets.labels.shape[1]
    padded = torch.ones(len(targets.counts), slots, NOISE_DRAWS)
    mine = drawn[before : before + int(targets.counts.sum())]
    padded[torch.arange(slots) < targets.counts[:, None]] = torch.from_numpy(mine)
    return to_device(padded, targets.boxes.device)


class PatchData:
    """Patches of one part (train, val) of a split, from all stores, which `split` names by the stem of their folder.

    With cache ``gpu`` and ``ram`` all images are read at once, with ``none`` batch by batch; with ``gpu`` they are kept
    on `device`, if they fill at most half of its free memory. With `instances` the maps of the nuclei are read, too.

    Raises
    ------
    InputError
        The split names a store that is not given, stores have patches of different sizes, or one lacks instance maps
        that are to be read.
    """

    def __init__(
        self,
        stores: Sequence[PatchStore],
        split: pd.DataFrame,
        part: str,
        *,
        cache: str = "ram",
        device: str = "cpu",
        instances: bool = False,
    ) -> None:
        self.stores = list(stores)
        self.names = [store.path.stem for store in stores]
        rows = split[split["part"] == part]
        unknown = sorted(set(rows["store"]) - set(self.names))
        if unknown:
            raise InputError(f"split: part {part} names stores {unknown}, expected some of {self.names}")
        sizes = {store.path.stem: (store.patch_size, store.mpp) for store in stores if store.n_patches}
        if len(set(sizes.values())) > 1:
            raise InputError(
                f"stores: got sizes of patches (px) and of their pixels (um) {sizes}, expected the same of all; make "
                "all with the same patch.size and patch.mpp"
            )
        self.patch_size, self.mpp = next(iter(sizes.values()), (0, stores[0].mpp))
        self.store_of = np.array([self.names.index(name) for name in rows["store"]], dtype=np.int64)
        self.patch_of = rows["patch"].to_numpy(np.int64)
        found = [self.stores[store].boxes_of(patch) for store, patch in zip(self.store_of, self.patch_of, strict=True)]
        self.ptr = np.cumsum([0, *(len(labels) for _, labels in found)], dtype=np.int64)
        self.boxes = np.concatenate([np.empty((0, 4), np.float32), *(boxes for boxes, _ in found)])
        self.labels = np.concatenate([np.empty(0, np.int8), *(labels for _, labels in found)])
        self.tissues, self.complete = self._column("tissue", object), self._column("complete", bool)
        self._reads_instances = instances
        if instances:
            self._check_instances()
        self._images, self._instances = None, None
        if cache != "none":
            self._images, self._instances = self._read_all(device if cache == "gpu" else "cpu")

    def __len__(self) -> int:
        return len(self.patch_of)

    def _column(self, name: str, dtype: type) -> NDArray[Any]:
        """Values (N,) of a column of the stores."""
        columns = [store.patches[name].to_numpy() for store in self.stores]
        return np.array(
            [columns[store][patch] for store, patch in zip(self.store_of, self.patch_of, strict=True)], dtype=dtype
        )

    def read(self, patches: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Images (B, S, S, 3) uint8 of patches (B,), and their instance maps (B, S, S) int16 if they are read."""
        if self._images is None:
            return self._read_stores(patches)
        rows = to_device(torch.from_numpy(patches), self._images.device)
        return self._images[rows], None if self._instances is None else self._instances[rows]

    def _read_stores(self, patches: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        images, instances = self._empty(len(patches))
        for store in np.unique(self.store_of[patches]):
            slots, source = np.flatnonzero(self.store_of[patches] == store), self.stores[store]
            images[torch.from_numpy(slots)] = torch.from_numpy(source.images(self.patch_of[patches[slots]]))
            if instances is not None:
                found = source.instances(self.patch_of[patches[slots]]).astype(np.int16)
                instances[torch.from_numpy(slots)] = torch.from_numpy(found)
        return images, instances

    def _empty(self, count: int) -> tuple[Tensor, Tensor | None]:
        side = (count, self.patch_size, self.patch_size)
        instances = torch.empty(side, dtype=torch.int16) if self._reads_instances else None
        return torch.empty((*side, 3), dtype=torch.uint8), instances

    def _read_all(self, device: str) -> tuple[Tensor, Tensor | None]:
        images, instances = self._empty(len(self))
        order = np.lexsort((self.patch_of, self.store_of))  # neighbours are read in one go
        for start in range(0, len(order), 512):
            chunk = order[start : start + 512]
            rows, (pixels, ids) = torch.from_numpy(chunk), self._read_stores(chunk)
            images[rows] = pixels
            if instances is not None and ids is not None:
                instances[rows] = ids
        if device.startswith("cuda"):
            free, size = (
                torch.cuda.mem_get_info(device)[0],
                images.nbytes + (0 if instances is None else instances.nbytes),
            )
            if size <= free / 2:
                return images.to(device), None if instances is None else instances.to(device)
            log.info("the patches (%.1f GB) stay in RAM: %.1f GB are free on %s", size / 1e9, free / 1e9, device)
        return images, instances

    def _check_instances(self) -> None:
        """Refuse stores without instance maps, and nuclei without a label, which no map of classes can show."""
        for store in self.stores:
            store.instances([])
        if (self.labels == UNLABELLED).any():
            raise InputError(
                f"split: got {int((self.labels == UNLABELLED).sum())} nuclei without a label, expected a class for "
                "each in stage segmentation"
            )

    def targets(self, patches: NDArray[np.int64]) -> Targets:
        """Nuclei of patches (B,), padded to at least one slot, so that no tensor is empty."""
        counts = self.counts(patches)
        slots = padded_size(int(counts.max(initial=0)))
        boxes = np.tile(np.array([0, 0, self.patch_size, self.patch_size], np.float32), (len(patches), slots, 1))
        labels = np.full((len(patches), slots), UNLABELLED, dtype=np.int64)
        for row, (start, count) in enumerate(zip(self.ptr[patches], counts, strict=True)):
            boxes[row, :count] = self.boxes[start : start + count]
            labels[row, :count] = self.labels[start : start + count]
        return Targets(
            xyxy_to_cxcywh(torch.from_numpy(boxes) / max(self.patch_size, 1)),
            torch.from_numpy(labels),
            torch.from_numpy(counts.copy()),
            torch.from_numpy(self.complete[patches]),
        )

    def counts(self, patches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the nuclei of patches (B,)."""
        return self.ptr[patches + 1] - self.ptr[patches]

    def name(self, patch: int) -> str:
        """Store and index of a patch, for errors."""
        return f"{self.names[self.store_of[patch]]}:{self.patch_of[patch]}"


class TrainingBatches(Dataset[Batch]):
    """Batches of a run by step, as one of `world` processes gets them; `batch_size` is that of the global batch.

    With `weights` (N,) an epoch has as many patches, drawn with replacement in proportion to them.
    """

    def __init__(
        self,
        data: PatchData,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        self.data, self.batch_size, self.seed, self._weights = data, batch_size, seed, weights
        size = batch_size // world
        self.rows = slice(rank * size, (rank + 1) * size)
        self.steps_per_epoch = math.ceil(len(data) / batch_size)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Order of the patches in an epoch, filled up to full batches."""
        if self._order is None or self._order[0] != epoch:
            random, size = random_stream(self.seed, epoch, ORDER), self.steps_per_epoch * self.batch_size
            if self._weights is None:
                order = np.resize(random.permutation(len(self.data)), size)
            else:
                order = random.choice(len(self.data), size, p=self._weights / self._weights.sum())
            self._order = epoch, order
        return self._order[1]

    def steps_of_sizes(self, epochs: int) -> list[int]:
        """First step of each size of tensors that is met in the first epochs of the run."""
        found: dict[tuple[int, int], int] = {}
        for step in range(epochs * self.steps_per_epoch):
            counts = self.data.counts(self._patches(step))
            found.setdefault((padded_size(counts[self.rows].max()), padded_size(counts.max())), step)
        return list(found.values())

    def _patches(self, step: int) -> NDArray[np.int64]:
        """Patches of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> Batch:
        everyone = self._patches(step)
        mine = everyone[self.rows]
        images, instances = self.data.read(mine)
        targets, counts = self.data.targets(mine), self.data.counts(everyone)
        return Batch(images, targets, mine, step, self.rows, counts, instances)


class ValidationBatches(Dataset[Batch]):
    """All patches in order, in batches; each of several processes takes every world-th patch."""

    def __init__(self, data: PatchData, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.data = data
        mine = np.arange(rank, len(data), world)
        self.batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def numbers_of_sizes(self) -> list[int]:
        """First full batch of each size of tensors."""
        found: dict[int, int] = {}
        for number, patches in enumerate(self.batches):
            if len(patches) == len(self.batches[0]):
                found.setdefault(padded_size(self.data.counts(patches).max()), number)
        return list(found.values())

    def __getitem__(self, index: int) -> Batch:
        patches, data = self.batches[index], self.data
        (images, instances), everything = data.read(patches), slice(0, len(patches))
        return Batch(images, data.targets(patches), patches, -1, everything, data.counts(patches), instances)


def load_batches(
    batches: TrainingBatches | ValidationBatches, order: range, settings: TrainingSettings
) -> Iterator[Batch]:
    """Yield batches in the given order; with ``cache: none`` loader processes read them ahead.

    Raises
    ------
    ProcessFailed
        A loader process was killed.
    """
    if settings.cache != "none" or not settings.workers:
        yield from (batches[index] for index in order)
        return
    try:
        yield from DataLoader(batches, batch_size=None, sampler=order, num_workers=settings.workers, collate_fn=_as_is)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ProcessFailed(
            f"a process that loads patches was killed ({str(error).splitlines()[0]}), most likely out of memory; give "
            "the rule more mem_mb (--set-resources) or set fewer training.workers, then start again to continue"
        ) from error


def _as_is(batch: Any) -> Any:
    return batch
