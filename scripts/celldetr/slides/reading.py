"""Slides whose bytes may be damaged: what cannot be decoded is named, and either stops the work or is left out."""

import logging
import os
import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.slides.cutting import read_patch
from celldetr.slides.grid import Plan
from celldetr.slides.pyramid import Pyramid, open_pyramid

log = logging.getLogger(__name__)

_PIECE = (64.0, 16)  # um, and px at least; a region as small as this is given up as a whole
_TOLD = 10  # damaged places that are named in the log and the store


class DamagedSlide(InputError):
    """A slide that is there but cannot be opened."""


def open_slide(path: str | os.PathLike[str], mpp: float | None, slide: str) -> Pyramid:
    """Open a slide whose pixel size is known.

    Parameters
    ----------
    path
        File.
    mpp
        Size of a level-0 pixel in um, instead of what the file says.
    slide
        Name of the slide, for messages.

    Raises
    ------
    DamagedSlide
        The file cannot be opened.
    InputError
        There is no such file, it is not colour, or nobody says how large a pixel is.
    """
    if not Path(path).is_file():
        raise InputError(f"{slide}: {path}: no such file")
    try:
        image = open_pyramid(path, mpp)
    except InputError as error:
        raise DamagedSlide(f"{slide}: {error}") from error
    try:
        _check(image, slide)
    except InputError:
        image.close()
        raise
    return image


def _check(image: Pyramid, slide: str) -> None:
    if image.channels != 3:
        raise InputError(f"{slide}: {image.path}: got an image of one channel, expected colour (H&E)")
    if image.mpp is None:
        raise InputError(
            f"{slide}: {image.path}: the file does not say how large a pixel is, and nothing is guessed; give um per "
            "px in column mpp of the slides sheet (about 0.25 for a 40x objective, 0.5 for 20x; whoever provides the "
            "slide has the exact value)"
        )


class TolerantPyramid(Pyramid):
    """A pyramid whose regions that cannot be decoded read as background.

    Parameters
    ----------
    path, mpp
        As in `open_pyramid`.

    """

    def __init__(self, path: str | os.PathLike[str], mpp: float | None) -> None:
        self._lost: dict[int, list[tuple[int, int, int, int]]] = {}
        self._reason = ""
        self._open = lambda: open_pyramid(path, mpp)
        self._image = self._open()
        self.path, self.levels, self.mpp = self._image.path, self._image.levels, self._image.mpp
        self.channels, self.dtype, self.background = self._image.channels, self._image.dtype, self._image.background

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Read a region (height, width, 3) of a level; pieces that cannot be decoded are background."""
        try:
            return self._image.read(level, x, y, width, height)
        except InputError as error:
            self._image.close()
            self._image = self._open()  # OpenSlide reads nothing any more after an error
            if max(width, height) <= self._piece(level):
                self._lost.setdefault(level, []).append((x, y, x + width, y + height))
                self._reason = self._reason or str(error)
                shape = (height, width, 3) if self.channels == 3 else (height, width)
                return np.full(shape, self.background, dtype=self.dtype)
        if width >= height:
            half = width // 2
            left = self.read(level, x, y, half, height)
            return np.concatenate([left, self.read(level, x + half, y, width - half, height)], axis=1)
        half = height // 2
        top = self.read(level, x, y, width, half)
        return np.concatenate([top, self.read(level, x, y + half, width, height - half)])

    def damage(self) -> list[str]:
        """Name each region that could not be decoded; pieces that touch are one."""
        messages = []
        for level, boxes in self._lost.items():
            regions = shapely.get_parts(shapely.union_all(shapely.box(*np.array(boxes, dtype=float).T)))
            for x0, y0, x1, y1 in shapely.bounds(regions).astype(int).tolist():
                messages.append(
                    f"{self.path}: level {level}, {x0},{y0} to {x1},{y1} px; the first error: {self._reason}"
                )
        return messages

    def _piece(self, level: int) -> int:
        um, smallest = _PIECE
        return max(smallest, round(um / ((self.mpp or 1.0) * self.levels[level].downsample)))

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        x0, y0, x1, y1 = box
        out[...] = self.read(level, x0, y0, x1 - x0, y1 - y0)

    def close(self) -> None:
        """Close the file."""
        self._image.close()


def open_overview(path: str | os.PathLike[str], mpp: float, *, skip: bool) -> Pyramid:
    """Open a slide for its overview; with `skip`, what cannot be decoded reads as glass."""
    return TolerantPyramid(path, mpp) if skip else open_pyramid(path, mpp)


class Block(NamedTuple):
    """Patches that were read: their numbers (n,), pixels (n, S, S, 3), and a message for each that was left out."""

    numbers: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    damaged: dict[int, str]


def read_blocks(path: str | os.PathLike[str], plan: Plan, *, size: int, workers: int, skip: bool) -> Iterator[Block]:
    """Read the patches of a plan in order, `size` at a time; threads work ahead, memory holds a few blocks.

    Parameters
    ----------
    path
        Slide.
    plan
        Patches.
    size
        Patches in a block.
    workers
        Threads.
    skip
        Leave out what cannot be decoded, instead of stopping.

    Raises
    ------
    InputError
        A patch cannot be decoded and `skip` is false.
    """
    idle: queue.SimpleQueue[Pyramid] = queue.SimpleQueue()
    for _ in range(workers):  # each with tiles of its own in mind
        idle.put(open_pyramid(path, plan.image_mpp))

    def read(numbers: NDArray[np.int64]) -> Block:
        image = idle.get()
        pixels, damaged = [], {}
        try:
            for number in numbers.tolist():
                try:
                    pixels.append(read_patch(image, plan, *plan.corners[number].tolist()))
                except InputError as error:
                    if not skip:
                        raise
                    damaged[number] = str(error)
                    image.close()
                    image = open_pyramid(path, plan.image_mpp)
        finally:
            idle.put(image)
        good = np.array([number for number in numbers.tolist() if number not in damaged], dtype=np.int64)
        shape = (len(pixels), plan.size, plan.size, 3)
        return Block(good, np.stack(pixels) if pixels else np.empty(shape, np.uint8), damaged)

    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Block]] = deque()
    try:
        for start in range(0, len(plan), size):
            waiting.append(pool.submit(read, np.arange(start, min(start + size, len(plan)))))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        while not idle.empty():
            idle.get().close()


def told(slide: str, messages: list[str]) -> list[str]:
    """Log what is damaged; return the first few messages."""
    for message in messages[:_TOLD]:
        log.warning("%s: left out: %s", slide, message)
    if len(messages) > _TOLD:
        log.warning("%s: and %d more", slide, len(messages) - _TOLD)
    return messages[:_TOLD]
