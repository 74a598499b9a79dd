"""How a slide is divided into tiles.

The slide is divided into squares (cores). A tile is a core with a margin around it, which shows the model the
surroundings. Positions are px of the tiles, counted from the slide's corner, if nothing else is said.
"""

from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import ConfigError
from celldetr.slides.grid import PatchGrid, stripe_order
from celldetr.slides.tissue import Raster

_ROUNDING = 1e-6  # of a core: what is left by rounding is no tile


@dataclass(frozen=True)
class Tiling:
    """Size of tiles."""

    size: int
    """Side of a tile, px."""
    mpp: float
    """Size of a pixel of the tiles, um: that of the model."""
    margin: int
    """Width of the margin around a core, px."""

    @classmethod
    def of(cls, size: int, mpp: float, margin_um: float) -> "Tiling":
        """Tiling with a margin given in um; `ConfigError` if the margins leave no core."""
        margin = round(margin_um / mpp)
        if 2 * margin >= size:
            raise ConfigError(
                f"margin_um: got {margin_um} um ({margin} px), expected less than half a tile ({size / 2 * mpp:g} um)"
            )
        return cls(size, mpp, margin)

    @property
    def core(self) -> int:
        """Side of a core, px."""
        return self.size - 2 * self.margin

    @property
    def margin_um(self) -> float:
        """Width of the margin, um."""
        return self.margin * self.mpp


@dataclass(frozen=True)
class Tiles:
    """Tiles (N) of a slide, in stripes, so that each tile of the file is decoded once."""

    tiling: Tiling
    image_size: tuple[int, int]
    """Width and height of the slide, px of level 0."""
    image_mpp: float
    """um per px of level 0."""
    cores: NDArray[np.int64]
    """First pixels of the cores (N, 2)."""

    @classmethod
    def over(cls, tiling: Tiling, image_size: tuple[int, int], image_mpp: float) -> "Tiles":
        """All tiles of a slide."""
        tiles = cls(tiling, image_size, image_mpp, np.empty((0, 2), np.int64))
        columns, rows = np.meshgrid(*(np.arange(count) for count in tiles.across_down))
        cores = np.stack([columns.ravel(), rows.ravel()], axis=1) * tiling.core
        return replace(tiles, cores=cores[stripe_order(cores, tiling.core)])

    def __len__(self) -> int:
        return len(self.cores)

    @property
    def ratio(self) -> float:
        """Level-0 px per px."""
        return self.tiling.mpp / self.image_mpp

    @property
    def limit(self) -> NDArray[np.float64]:
        """Width and height of the slide (2,), px."""
        return np.asarray(self.image_size, np.float64) / self.ratio

    @property
    def corners(self) -> NDArray[np.int64]:
        """First pixels of the tiles (N, 2); those at the rim begin outside of the slide."""
        return self.cores - self.tiling.margin

    @property
    def across_down(self) -> tuple[int, int]:
        """Columns and rows of the cores of the whole slide."""
        whole = np.ceil(self.limit / self.tiling.core - _ROUNDING)
        across, down = np.maximum(1, whole).astype(int).tolist()
        return across, down

    def select(self, chosen: NDArray[np.bool_]) -> "Tiles":
        """Keep tiles where `chosen` (N,)."""
        return replace(self, cores=self.cores[chosen])

    def touching(self, area: shapely.Geometry) -> "Tiles":
        """Keep tiles whose core touches an area, px of level 0."""
        low = self.cores * self.ratio
        shapely.prepare(area)
        return self.select(shapely.intersects(area, shapely.box(*low.T, *(low + self.tiling.core * self.ratio).T)))

    def tissue_mm2(self, tissue: Raster, area: shapely.Geometry | None = None) -> NDArray[np.float64]:
        """Area of the tissue in each core (N,), mm2; with an `area`, px of level 0, its share of the core's tissue."""
        found = tissue.share(self.cores * self.ratio, self.tiling.core * self.ratio)
        found *= (self.tiling.core * self.tiling.mpp / 1000) ** 2
        whole = self.mm2()
        return np.minimum(found / whole, 1) * (whole if area is None else self.mm2(area))  # its map ends in whole cells

    def mm2(self, area: shapely.Geometry | None = None) -> NDArray[np.float64]:
        """Area of each core (N,) on the slide, and in an `area`, px of level 0, if there is one; mm2."""
        low = self.cores * self.ratio
        high = np.minimum(low + self.tiling.core * self.ratio, self.image_size)
        px = (high - low).prod(axis=1)
        if area is not None:
            squares = shapely.box(*low.T, *high.T)
            shapely.prepare(area)
            cut = ~shapely.covers(area, squares)
            px[cut] = shapely.area(shapely.intersection(squares[cut], area))
        return np.asarray(px * (self.image_mpp / 1000) ** 2)

    def numbers_at(self, points: NDArray[np.floating]) -> NDArray[np.int64]:
        """Return the number (M,) of the tile whose core holds each point (M, 2), -1 if it is not among these.

        Cores are half-open; those at the rim hold what lies beyond.
        """
        across, down = self.across_down
        places = np.clip(np.floor(points / self.tiling.core), 0, (across - 1, down - 1)).astype(np.int64)
        number_of = np.full(across * down, -1, np.int64)
        own = self.cores // self.tiling.core
        number_of[own[:, 1] * across + own[:, 0]] = np.arange(len(self))
        return number_of[places[:, 1] * across + places[:, 0]]

    def grid(self, start: int, stop: int) -> PatchGrid:
        """Tiles from `start` to `stop` as patches to be read."""
        return PatchGrid.bare(self.tiling.size, self.tiling.mpp, self.image_mpp, self.corners[start:stop])
