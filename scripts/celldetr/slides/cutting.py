"""Cut patches out of a slide: several threads read, resample and compress them, and one writes them to a store."""

import logging
import math
import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celldetr.runtime.errors import InputError
from celldetr.slides.damage import log_damage
from celldetr.slides.grid import PatchGrid
from celldetr.slides.pyramid import Pyramid, open_pyramid
from celldetr.store import EncodedImage, StoreWriter, encode_image

log = logging.getLogger(__name__)

_BLOCK = 64  # patches that a thread reads at a time
_LOGGED = 2048  # patches between two messages
_SUPPORT = 2  # px that the bicubic filter reaches to either side
_TOGETHER, _WORTH = 32, 0.8  # patches that are read as one at most, and the share of their pixels that must remain
_ALIGNED = 1e-6  # px; patches that lie on the pixels of a level to within this are copied

T = TypeVar("T")


class Block(NamedTuple):
    """Patches that were read."""

    numbers: NDArray[np.int64]
    """(n,) their places in the grid."""
    pixels: NDArray[np.uint8]
    """(n, S, S, 3)."""
    damaged: dict[int, str]
    """Number -> error, of each patch that was left out."""


def cut_patches(
    image: str | os.PathLike[str],
    grid: PatchGrid,
    labels: NDArray[np.int8],
    out: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    source: str,
    group: str,
    tissue: str,
    attrs: Mapping[str, Any],
    complete: NDArray[np.bool_] | None = None,
    workers: int = 1,
    skip: bool = False,
) -> PatchGrid:
    """Write the patches of a grid to a store, and return the grid of what was written.

    `labels` (M,) are the classes of the slide's nuclei; for `classes` to `attrs` see `StoreWriter`: attributes
    `patches_passed_over` and damaged patches are added. `complete` (N,) are the patches of which all nuclei are known;
    None: all. With `skip`, patches that cannot be decoded are left out. Each
    of the `workers` (threads) holds a few blocks of patches and some tiles; the bytes do not depend on their number.

    Raises
    ------
    InputError
        A patch cannot be decoded and `skip` is false.
    """
    damaged: dict[int, str] = {}  # the threads fill it
    level0 = grid.level0
    names = {"source": source, "group": group, "tissue": tissue}
    complete = np.ones(len(grid), dtype=bool) if complete is None else complete

    def read(image: Pyramid, numbers: range) -> tuple[list[int], list[EncodedImage]]:
        lost = damaged if skip else None
        found = [(number, encode_image(patch)) for number, patch in _read(image, grid, numbers, lost)]
        return [number for number, _ in found], [patch for _, patch in found]

    with (
        StoreWriter(out, patch_size=grid.size, classes=classes, mpp=grid.mpp, attrs=attrs) as writer,
        closing(_in_order(image, grid, _BLOCK, workers, read)) as blocks,
    ):
        for numbers, images in blocks:
            members = [grid.boxes.of(patch) for patch in numbers]
            x, y = level0[numbers].T
            writer.append(
                images,
                [grid.boxes.boxes[chosen] for chosen in members],
                [labels[grid.boxes.nuclei[chosen]] for chosen in members],
                centroids=[grid.boxes.centroids[chosen] for chosen in members],
                patches={key: [name] * len(members) for key, name in names.items()}
                | {"x": x, "y": y, "complete": complete[numbers]},
            )
            if writer.n_patches % _LOGGED < len(members):
                log.info("%d of %d patches", writer.n_patches, len(grid))
        if damaged:
            grid = grid.without(damaged, "damaged")
            named = log_damage(source, [damaged[number] for number in sorted(damaged)])
            writer.attrs["damage"] = {**writer.attrs.get("damage", {}), "patches": named}
        writer.attrs["patches_passed_over"] = grid.passed_over
    return grid


def read_blocks(
    path: str | os.PathLike[str], grid: PatchGrid, *, size: int, workers: int, skip: bool = False
) -> Generator[Block, None, None]:
    """Yield the patches of a grid in order, `size` at a time; threads read a few blocks ahead. See `cut_patches`."""

    def read(image: Pyramid, numbers: range) -> Block:
        pixels = np.empty((len(numbers), grid.size, grid.size, 3), np.uint8)
        good: list[int] = []
        damaged: dict[int, str] = {}
        for number, patch in _read(image, grid, numbers, damaged if skip else None):
            pixels[len(good)] = patch
            good.append(number)
        return Block(np.array(good, dtype=np.int64), pixels[: len(good)], damaged)

    return _in_order(path, grid, size, workers, read)


def _in_order(
    path: str | os.PathLike[str], grid: PatchGrid, size: int, workers: int, read: Callable[[Pyramid, range], T]
) -> Generator[T, None, None]:
    """Yield what `read` makes of each `size` patches, in order; threads are a few blocks ahead."""
    idle: queue.SimpleQueue[Pyramid] = queue.SimpleQueue()

    def work(numbers: range) -> T:
        image = idle.get()
        try:
            return read(image, numbers)
        finally:
            idle.put(image)

    with ExitStack() as stack:
        for _ in range(workers):  # an image for each thread, as its cache holds the tiles of neighbouring patches
            idle.put(stack.enter_context(open_pyramid(path, grid.image_mpp)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        waiting: deque[Future[T]] = deque()
        try:
            for start in range(0, len(grid), size):
                waiting.append(pool.submit(work, range(start, min(start + size, len(grid)))))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(
    image: Pyramid, grid: PatchGrid, numbers: range, damaged: dict[int, str] | None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield patches (number, pixels (S, S, 3)) in order; with `damaged`, number -> error of those that are left out.

    Successive patches that overlap come from one area. They differ from what `read_patch` reads by the rounding of the
    filter.
    """
    corners = grid.corners[numbers.start : numbers.stop]
    groups = _groups(corners, grid.size)
    while groups:
        first, last = groups.pop()
        try:
            patches = _read_together(image, grid, corners[first:last])
        except InputError as error:
            if damaged is None:
                raise
            if last - first > 1:
                groups += [(place, place + 1) for place in reversed(range(first, last))]
            else:
                damaged[numbers[first]] = str(error)
        else:
            yield from zip(numbers[first:last], patches, strict=True)


def _groups(corners: NDArray[np.int64], size: int) -> list[tuple[int, int]]:
    """Divide successive patches (n, 2) into ranges that are read as one because they overlap; the last range first."""
    groups, waiting = [], [(0, len(corners))]
    while waiting:
        first, last = waiting.pop()
        low, high = corners[first:last].min(axis=0), corners[first:last].max(axis=0) + size
        count = last - first
        if count > 1 and (count > _TOGETHER or (high - low).prod() > _WORTH * count * size**2):
            waiting += [(first, first + count // 2), (first + count // 2, last)]
        else:
            groups.append((first, last))
    return groups


def _read_together(image: Pyramid, grid: PatchGrid, corners: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Read the area that holds the patches with these corners (n, 2), and return the patches (S, S, 3), parts of it."""
    low = corners.min(axis=0)
    width, height = (corners.max(axis=0) - low + grid.size).tolist()
    area = _read_area(image, grid, int(low[0]), int(low[1]), width, height)
    return [area[y : y + grid.size, x : x + grid.size] for x, y in (corners - low).tolist()]


def read_patch(image: Pyramid, grid: PatchGrid, x: int, y: int) -> NDArray[np.uint8]:
    """Read the patch (S, S, 3) whose first pixel is (x, y), px of the grid.

    It is resampled at exactly its place, so that neighbouring patches have no seam, from the coarsest level that is not
    coarser than the patch; the bicubic filter is wide enough to prevent aliasing.
    """
    return _read_area(image, grid, x, y, grid.size, grid.size)


def _read_area(image: Pyramid, grid: PatchGrid, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """Read an area (height, width, 3) whose first pixel is (x, y), px of the grid; see `read_patch`."""
    ratio = grid.mpp / grid.image_mpp
    level = image.level_for(ratio)
    scale = ratio / image.levels[level].downsample
    left, top, right, bottom = (value * scale for value in (x, y, x + width, y + height))
    if max(abs(value - round(value)) for value in (left, top, right, bottom, scale)) < _ALIGNED and round(scale) == 1:
        pixels: NDArray[np.uint8] = image.read(level, round(left), round(top), width, height)
        return pixels
    margin = math.ceil(_SUPPORT * max(1.0, scale)) + 1
    x0, y0 = math.floor(left) - margin, math.floor(top) - margin
    region = image.read(level, x0, y0, math.ceil(right) + margin - x0, math.ceil(bottom) + margin - y0)
    box = (left - x0, top - y0, right - x0, bottom - y0)
    return np.asarray(Image.fromarray(region).resize((width, height), Image.Resampling.BICUBIC, box=box))
