"""Cut the patches of a plan out of a slide and write them to a patch store."""

import logging
import math
import os
import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celldetr.slides.grid import Nuclei, Plan
from celldetr.slides.pyramid import Pyramid, open_pyramid
from celldetr.store import StoreWriter

log = logging.getLogger(__name__)

_BLOCK = 64  # patches that a thread cuts at a time
_SUPPORT = 2  # px that the bicubic filter reaches to either side
_ALIGNED = 1e-6  # px; patches that are off the grid of the level by less are copied


def extract(
    image: str | os.PathLike[str],
    plan: Plan,
    nuclei: Nuclei,
    out: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    source: str,
    group: str,
    tissue: str,
    attrs: Mapping[str, Any],
    workers: int = 1,
) -> None:
    """Write the patches of a plan to a store; the same bytes for any number of workers.

    Memory holds a few blocks of patches and a cache of tiles for each worker, whatever the size of the slide.

    Parameters
    ----------
    image
        The slide, colour.
    plan
        Patches and their nuclei.
    nuclei
        Nuclei of the slide, px of the plan.
    out
        Store to write.
    classes
        Names of the labels.
    source, group, tissue
        What the store says about each patch.
    attrs
        More attributes of the store.
    workers
        Threads; decoding and resampling need no Python lock.

    Raises
    ------
    InputError
        A tile of the slide is damaged.
    """
    with StoreWriter(out, patch_size=plan.size, classes=classes, mpp=plan.mpp, attrs=attrs) as writer:
        for block, pixels in _cut(image, plan, workers):
            members = [plan.nuclei[plan.ptr[patch] : plan.ptr[patch + 1]] for patch in block]
            placed = [
                _place(nuclei, chosen, plan.corners[patch], plan.size)
                for patch, chosen in zip(block, members, strict=True)
            ]
            x, y = plan.level0[block].T
            writer.append(
                pixels,
                [boxes for boxes, _ in placed],
                [nuclei.labels[chosen] for chosen in members],
                centroids=[centroids for _, centroids in placed],
                patches={
                    "source": [source] * len(block),
                    "group": [group] * len(block),
                    "tissue": [tissue] * len(block),
                    "x": x,
                    "y": y,
                },
            )
            if block[-1] // 2048 != (block[0] - 1) // 2048:
                log.info("%d of %d patches", block[-1] + 1, len(plan))


def _cut(
    path: str | os.PathLike[str], plan: Plan, workers: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Yield blocks of patches (their numbers, and pixels (n, S, S, 3)) in order; threads work ahead."""
    blocks = [np.arange(start, min(start + _BLOCK, len(plan))) for start in range(0, len(plan), _BLOCK)]
    with ExitStack() as stack:
        idle: queue.SimpleQueue[Pyramid] = queue.SimpleQueue()
        for _ in range(workers):  # each with tiles of its own in mind
            idle.put(stack.enter_context(open_pyramid(path, plan.image_mpp)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))

        def cut(block: NDArray[np.int64]) -> NDArray[np.uint8]:
            image = idle.get()
            try:
                return np.stack([read_patch(image, plan, *plan.corners[patch].tolist()) for patch in block])
            finally:
                idle.put(image)

        waiting: deque[tuple[NDArray[np.int64], Future[NDArray[np.uint8]]]] = deque()
        try:
            for block in blocks:
                waiting.append((block, pool.submit(cut, block)))
                if len(waiting) > 2 * workers:
                    done, result = waiting.popleft()
                    yield done, result.result()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_patch(image: Pyramid, plan: Plan, x: int, y: int) -> NDArray[np.uint8]:
    """Read the patch (S, S, 3) whose first pixel is (x, y) px of `plan.mpp` um.

    It is resampled (bicubic, wide enough to hold no more detail than its pixels can show) from the coarsest level that
    is not coarser than it, at exactly its place; neighbouring patches fit together without a seam.
    """
    ratio = plan.mpp / plan.image_mpp
    level = image.level_for(ratio)
    scale = ratio / image.levels[level].downsample
    left, top, side = x * scale, y * scale, plan.size * scale
    if max(abs(value - round(value)) for value in (left, top, side, scale)) < _ALIGNED and round(scale) == 1:
        pixels: NDArray[np.uint8] = image.read(level, round(left), round(top), plan.size, plan.size)
        return pixels
    margin = math.ceil(_SUPPORT * max(1.0, scale)) + 1
    x0, y0 = math.floor(left) - margin, math.floor(top) - margin
    width, height = (math.ceil(start + side) + margin - first for start, first in ((left, x0), (top, y0)))
    region = image.read(level, x0, y0, width, height)
    box = (left - x0, top - y0, left - x0 + side, top - y0 + side)
    return np.asarray(Image.fromarray(region).resize((plan.size, plan.size), Image.Resampling.BICUBIC, box=box))


def _place(
    nuclei: Nuclei, chosen: NDArray[np.int64], corner: NDArray[np.int64], size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (n, 4) and centroids (n, 2) in a patch, clipped to it."""
    boxes = np.clip(nuclei.boxes[chosen] - np.tile(corner, 2), 0, size).astype(np.float32)
    centroids = (nuclei.centroids[chosen] - corner).astype(np.float32)
    return boxes, np.clip(centroids, boxes[:, :2], boxes[:, 2:])
