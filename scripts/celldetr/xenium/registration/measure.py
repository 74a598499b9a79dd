"""What the images show of a local distortion: shifts of small windows, and all nuclei of the H&E."""

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

import numpy as np

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid, open_pyramid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.affine import Floats, inverse, scaling
from celldetr.xenium.registration.distortion import WindowShifts
from celldetr.xenium.registration.maps import Grid, band, intensity, match_blocks, sample
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, StainWindow, clear_blobs, read_window

T = TypeVar("T")
_SIDE, _STEP, _REACH = 100, 50, 14  # um of a window, between windows, and searched around one; a sample is 1 um
_TILE = 400  # um read at once
_MIN_NUCLEI = 8  # in a window
_MARGIN = 6.0  # um read around the nuclei of a tile
_FINE, _WIDE = 1.0, 8.0  # um; structures between these sizes are compared


def window_shifts(
    to_um: Floats, he: Pyramid, dapi: Pyramid, nuclei: DapiNuclei, pixel_size: float, workers: int = 1
) -> WindowShifts:
    """Find windows of the DAPI image in the H&E seen through a matrix (3, 3), H&E level-0 px -> um.

    `workers` are threads; the result does not depend on their number.
    """
    rim = _SIDE // 2 + _REACH

    def find(images: Sequence[Pyramid], corner: Floats) -> WindowShifts | None:
        centres = corner + _STEP * np.stack(np.meshgrid(*(np.arange(_TILE // _STEP),) * 2), axis=-1).reshape(-1, 2)
        counts = nuclei.tree.query_ball_point(centres, _SIDE / 2, p=np.inf, return_length=True)
        centres = centres[counts >= _MIN_NUCLEI]
        if not len(centres):
            return None
        grid = Grid(corner[0] - rim, corner[1] - rim, 1.0, _TILE + 2 * rim, _TILE + 2 * rim)
        moving = band(sample(images[0], grid, inverse(to_um), hematoxylin), _FINE, _WIDE)
        fixed = band(sample(images[1], grid, scaling(1 / pixel_size), intensity), _FINE, _WIDE)
        places = (centres - corner).astype(int)
        shifts, score = match_blocks(
            np.stack([fixed[y + _REACH : y + _REACH + _SIDE, x + _REACH : x + _REACH + _SIDE] for x, y in places]),
            np.stack([moving[y : y + 2 * rim, x : x + 2 * rim] for x, y in places]),
        )
        return WindowShifts(centres, shifts, score)

    found = [part for part in _at_each(_tiles(nuclei, _TILE), find, (he, dapi), workers) if part]
    if not found:
        return WindowShifts(np.empty((0, 2)), np.empty((0, 2)), np.empty(0))
    parts = ([getattr(part, name) for part in found] for name in ("centres", "shifts", "score"))
    return WindowShifts(*map(np.concatenate, parts))


def he_nuclei(
    to_um: Floats, he: Pyramid, nuclei: DapiNuclei, settings: RegistrationSettings, workers: int = 1
) -> Floats:
    """Find the H&E nuclei (m, 2), um, of the whole section; `workers` as of `window_shifts`."""
    side = settings.window

    def find(images: Sequence[Pyramid], corner: Floats) -> StainWindow:
        region = Region(corner + side / 2, nuclei.outlines[:0])
        seen = read_window(images[0], to_um, region, settings, _MARGIN)
        return replace(seen, stain=seen.stain[:0])  # a section's would not fit into memory

    return np.concatenate(clear_blobs(_at_each(_tiles(nuclei, side), find, (he,), workers)))


def _at_each(
    corners: Iterable[Floats],
    work: Callable[[Sequence[Pyramid], Floats], T],
    images: Sequence[Pyramid],
    workers: int,
) -> list[T]:
    """Give what `work` makes of images at each corner, in order; several threads, each with open images of its own."""
    idle: queue.SimpleQueue[Sequence[Pyramid]] = queue.SimpleQueue()
    idle.put(images)

    def run(corner: Floats) -> T:
        own = idle.get()
        try:
            return work(own, corner)
        finally:
            idle.put(own)

    with ExitStack() as stack:
        for _ in range(workers - 1):
            again = (open_pyramid(one.path, one.mpp, plane=0 if one.channels == 1 else None) for one in images)
            idle.put([stack.enter_context(image) for image in again])
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        return list(pool.map(run, corners))


def _tiles(nuclei: DapiNuclei, side: float) -> Iterator[Floats]:
    """First corners (2,), um, of the squares of a grid that hold nuclei."""
    low = nuclei.centroids.min(axis=0)
    for column, row in np.unique(((nuclei.centroids - low) // side).astype(int), axis=0).tolist():
        yield low + side * np.array([column, row])
