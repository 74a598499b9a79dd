"""What the images show of a local distortion: shifts of small windows, and all nuclei of the H&E."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.affine import Floats, inverse, scaling
from celldetr.xenium.registration.distortion import WindowShifts
from celldetr.xenium.registration.maps import Grid, band, intensity, match_blocks, sample
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, clear_blobs, read_window

_SIDE, _STEP, _REACH = 100, 50, 14  # um of a window, between windows, and searched around one; a sample is 1 um
_TILE = 400  # um read at once
_MIN_NUCLEI = 8  # in a window
_MARGIN = 6.0  # um read around the nuclei of a tile
_FINE, _WIDE = 1.0, 8.0  # um; structures between these sizes are compared


def window_shifts(to_um: Floats, he: Pyramid, dapi: Pyramid, nuclei: DapiNuclei, pixel_size: float) -> WindowShifts:
    """Find windows of the DAPI image in the H&E seen through a matrix (3, 3), H&E level-0 px -> um."""
    rim = _SIDE // 2 + _REACH
    found = []
    for corner in _tiles(nuclei, _TILE):
        centres = corner + _STEP * np.stack(np.meshgrid(*(np.arange(_TILE // _STEP),) * 2), axis=-1).reshape(-1, 2)
        counts = nuclei.tree.query_ball_point(centres, _SIDE / 2, p=np.inf, return_length=True)
        centres = centres[counts >= _MIN_NUCLEI]
        if not len(centres):
            continue
        grid = Grid(corner[0] - rim, corner[1] - rim, 1.0, _TILE + 2 * rim, _TILE + 2 * rim)
        fixed = band(sample(dapi, grid, scaling(1 / pixel_size), intensity), _FINE, _WIDE)
        moving = band(sample(he, grid, inverse(to_um), hematoxylin), _FINE, _WIDE)
        places = (centres - corner).astype(int)
        shifts, score = match_blocks(
            np.stack([fixed[y + _REACH : y + _REACH + _SIDE, x + _REACH : x + _REACH + _SIDE] for x, y in places]),
            np.stack([moving[y : y + 2 * rim, x : x + 2 * rim] for x, y in places]),
        )
        found.append((centres, shifts, score))
    if not found:
        return WindowShifts(np.empty((0, 2)), np.empty((0, 2)), np.empty(0))
    centres, shifts, score = (np.concatenate(part) for part in zip(*found, strict=True))
    return WindowShifts(centres, shifts, score)


def he_nuclei(to_um: Floats, he: Pyramid, nuclei: DapiNuclei, settings: RegistrationSettings) -> Floats:
    """Find the H&E nuclei (m, 2), um, of the whole section."""
    side = settings.window
    windows = []
    for corner in _tiles(nuclei, side):
        region = Region(corner + side / 2, nuclei.outlines[:0])
        seen = read_window(he, to_um, region, settings, _MARGIN)
        windows.append(replace(seen, stain=seen.stain[:0]))  # a section's would not fit into memory
    return np.concatenate(clear_blobs(windows))


def _tiles(nuclei: DapiNuclei, side: float) -> Iterator[Floats]:
    """First corners (2,), um, of the squares of a grid that hold nuclei."""
    low = nuclei.centroids.min(axis=0)
    for column, row in np.unique(((nuclei.centroids - low) // side).astype(int), axis=0).tolist():
        yield low + side * np.array([column, row])
