"""Which tiles of a slide are read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.cells.given import GivenCells
from celldetr.cells.given_tiles import GivenTiles
from celldetr.cells.table import NothingFound
from celldetr.cells.tiling import Tiles
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import centres_of
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.tissue import tissue_mask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Which tiles are read."""

    tiles: Tiles
    mm2: NDArray[np.float64]
    """Area (N,) that reading each tile adds: of its core in the region; without given cells, of the tissue there."""
    areas: Mapping[str, float]
    given: GivenTiles | None = None
    region: shapely.Geometry | None = None
    left_out: int = 0
    """Given cells outside of the region."""

    @property
    def expected(self) -> int | None:
        """How many rows there must be; None if that is not known."""
        return None if self.given is None else len(self.given.cells) - self.left_out


def plan_tiles(
    image: Pyramid,
    tiles: Tiles,
    slide: str,
    *,
    given: GivenCells | None = None,
    region: NDArray[Any] | None = None,
) -> Plan:
    """Choose from all tiles of a slide those with tissue, or with given cells, in the region.

    Parameters
    ----------
    image, tiles, slide
        The slide, its tiles, and its name in messages.
    given, region
        See `celldetr.cells.find.find_cells`.

    Raises
    ------
    InputError
        There is no tissue (`NothingFound`), or no given cell is on the slide.
    """
    width, height = tiles.image_size
    areas = {"slide_mm2": width * height * (tiles.image_mpp / 1000) ** 2}
    area = None if region is None else shapely.union_all(region)
    if area is not None:
        areas["region_mm2"] = area.area * (tiles.image_mpp / 1000) ** 2
    if given is not None:
        return _plan_given(slide, tiles, given, area, areas)
    tissue = tissue_mask(image, tiles.image_mpp)
    areas["tissue_mm2"] = float(tiles.tissue_mm2(tissue).sum())
    if area is not None:
        tiles = tiles.touching(area)
    mm2 = tiles.tissue_mm2(tissue, area)
    if not (mm2 > 0).any():
        where = "no tissue was found on it" if area is None else "no tissue was found in the region"
        raise NothingFound(f"{slide}: {image.path}: {where}; is it an H&E slide, and is its um per px right?")
    return Plan(tiles.select(mm2 > 0), mm2[mm2 > 0], areas, region=area)


def _plan_given(
    slide: str, tiles: Tiles, given: GivenCells, area: shapely.Geometry | None, areas: Mapping[str, float]
) -> Plan:
    boxes = given.boxes
    chosen = np.ones(len(given), dtype=bool)
    if area is not None:
        shapely.prepare(area)
        chosen = shapely.intersects_xy(area, *centres_of(boxes).T)
    placed = GivenTiles(given, tiles, chosen)
    if not len(placed.tiles):
        low, high = boxes[:, :2].min(axis=0, initial=np.inf), boxes[:, 2:].max(axis=0, initial=-np.inf)
        where = "the slide" if area is None else "the region"
        raise InputError(
            f"{slide}: got {len(given)} cells from {low} to {high} px of level 0, expected some on {where} (the "
            f"slide has {tiles.image_size} px); are they of this slide, and is their unit right (px of level 0 or um)?"
        )
    left_out = int((~chosen).sum())
    if left_out:
        log.warning("%s: %d of %d given cells lie outside of the region and are left out", slide, left_out, len(given))
    return Plan(placed.tiles, placed.tiles.mm2(area), areas, placed, area, left_out)
