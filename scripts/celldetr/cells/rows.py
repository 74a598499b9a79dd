"""Rows of the file of cells from what the model says about a batch of tiles."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from celldetr.cells.given import GivenCells
from celldetr.cells.stitching import repeated, rim_um
from celldetr.cells.table import STATUSES, CellsInfo, Floats, cell_schema, embedding_column, named
from celldetr.cells.tiling import Tiles
from celldetr.inference.batch import FoundNuclei, GivenNuclei
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import centres_of

_TOUCHES = 1.0  # px; a box that ends this close to the edge of its tile is cut by it
READ, OUTSIDE, DAMAGED = range(len(STATUSES))


@dataclass(frozen=True)
class _Positions:
    """Boxes (n, 4) in px of the tiles, counted from the corner of the slide, and where they lie in their tiles (n,)."""

    boxes: NDArray[np.float64]
    edge: NDArray[np.float64]
    """Distance of the centre from the nearest edge of the tile, px."""
    on_slide: NDArray[np.bool_]
    """Whether the centre lies on the slide."""
    inside: NDArray[np.bool_]
    """Whether it also lies in the core, which is half-open."""
    border: NDArray[np.bool_]


def _place(tiles: Tiles, numbers: NDArray[np.int64], boxes: NDArray[np.floating]) -> _Positions:
    """Place boxes (n, 4), px from the corner of each one's tile."""
    local, tiling = np.asarray(boxes, np.float64), tiles.tiling
    centres, world = centres_of(local), local + np.tile(tiles.corners[numbers], 2)
    middle = centres_of(world)
    in_core = np.asarray(((centres >= tiling.margin) & (centres < tiling.size - tiling.margin)).all(axis=1))
    on_slide = np.asarray(((middle >= 0) & (middle < tiles.limit)).all(axis=1))
    edge = np.minimum(centres, tiling.size - centres).min(axis=1)
    border = (local[:, :2] <= _TOUCHES).any(axis=1) | (local[:, 2:] >= tiling.size - _TOUCHES).any(axis=1)
    return _Positions(world, edge, on_slide, in_core & on_slide, np.asarray(border))


@dataclass(frozen=True)
class Rows:
    """Makes tables with the columns of a file of cells."""

    tiles: Tiles
    info: CellsInfo
    dtype: Floats
    region: shapely.Geometry | None = None

    @property
    def schema(self) -> pa.Schema:
        """Columns of the tables."""
        return cell_schema(self.info, self.dtype)

    def found(self, tile: NDArray[np.int64], nuclei: FoundNuclei) -> tuple[pa.Table, Counter[str]]:
        """Rows of what was found in the tiles with these numbers (B,): in the core, and in the rim around it; counts.

        Of a nucleus that a tile has found twice there is one row.
        """
        tiling, numbers = self.tiles.tiling, tile[nuclei.image]
        at = _place(self.tiles, numbers, nuclei.boxes)
        boxes = np.clip(at.boxes, 0, np.tile(self.tiles.limit, 2))
        near = at.edge * tiling.mpp > tiling.margin_um - rim_um(tiling.margin_um)
        wanted = (at.inside | near & at.on_slide) & self._in_region(boxes)
        twice = repeated(at.boxes, nuclei.nucleus_score, numbers)
        keep = wanted & ~twice
        edge_um = at.edge * tiling.mpp
        # never rounded to the other side of the border of the core
        beyond = np.nextafter(tiling.margin_um, -np.inf)
        edge_um = np.where(at.inside, np.maximum(edge_um, tiling.margin_um), np.minimum(edge_um, beyond))
        boxes = boxes[keep]
        table = self._table(
            pa.nulls(len(boxes), pa.string()),
            shapely.box(*(boxes * self.tiles.ratio).T),
            boxes,
            nucleus_score=nuclei.nucleus_score[keep],
            scores=nuclei.class_scores[keep],
            embeddings=nuclei.embeddings[keep],
            tile=numbers[keep],
            edge_um=edge_um[keep],
            border=at.border[keep],
        )
        return table, Counter({"findings repeated in a tile": int((wanted & twice).sum())})

    def detections(self, tile: NDArray[np.int64], nuclei: FoundNuclei) -> NDArray[np.bool_]:
        """Which of the nuclei (N,) that were found count for their tile: those in the core, in the region."""
        at = _place(self.tiles, tile[nuclei.image], nuclei.boxes)
        return at.inside & self._in_region(np.clip(at.boxes, 0, np.tile(self.tiles.limit, 2)))

    def given(
        self,
        cells: GivenCells,
        index: NDArray[np.int64],
        tile: NDArray[np.int64],
        status: int,
        nuclei: GivenNuclei | None = None,
        nucleus_score: NDArray[np.floating] | None = None,
    ) -> pa.Table:
        """Rows of the given cells with these indices (n,), in the tiles with these numbers (n,).

        `nuclei` (n) is what the model says about them, `nucleus_score` (n,) is NaN where no detection agrees. Without
        `nuclei` they have no scores and no embedding. A cell outside of the slide has tile -1 and no distance.
        """
        outlines, count = cells.outlines[index], len(index)
        world = shapely.bounds(outlines) / self.tiles.ratio
        edge, border = np.full(count, np.nan), np.zeros(count, bool)
        if status != OUTSIDE:
            at = _place(self.tiles, tile, world - np.tile(self.tiles.corners[tile], 2))
            edge, border = at.edge, at.border
        scores = np.full((count, len(self.info.classes)), np.nan, np.float32)
        embeddings = np.zeros((count, self.info.width), np.float32)
        if nuclei is not None:
            scores, embeddings = nuclei.class_scores, nuclei.embeddings
        return self._table(
            pa.array(cells.ids[index].tolist(), pa.string()),
            outlines,
            world,
            nucleus_score=np.full(count, np.nan) if nucleus_score is None else nucleus_score,
            scores=scores,
            embeddings=embeddings,
            tile=tile,
            edge_um=edge * self.tiles.tiling.mpp,
            border=border,
            status=status,
        )

    def _in_region(self, boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether the centres of boxes (n, 4), px of the tiles, lie in the region."""
        if self.region is None:
            return np.ones(len(boxes), dtype=bool)
        return np.asarray(shapely.intersects_xy(self.region, *(centres_of(boxes) * self.tiles.ratio).T))

    def _table(
        self,
        ids: pa.Array,
        outlines: NDArray[np.object_],
        boxes: NDArray[np.float64],
        *,
        nucleus_score: NDArray[np.floating],
        scores: NDArray[np.floating],
        embeddings: NDArray[np.floating],
        tile: NDArray[np.int64],
        edge_um: NDArray[np.float64],
        border: NDArray[np.bool_],
        status: int = READ,
    ) -> pa.Table:
        um = boxes * self.tiles.tiling.mpp
        centres, sides = centres_of(um), um[:, 2:] - um[:, :2]
        columns: dict[str, Any] = {
            "cell_id": ids,
            "geometry": pa.array(shapely.to_wkb(outlines), pa.binary()),
            **dict(zip(("x_um", "y_um", "width_um", "height_um"), (*centres.T, *sides.T), strict=True)),
            "nucleus_score": _floats(nucleus_score),
            "tile": tile.astype(np.int32),
            "edge_um": pa.array(edge_um, from_pandas=True),
            "border": border,
            "status": named(np.full(len(boxes), status), STATUSES),
        }
        if self.info.classes:
            columns["type"] = pa.nulls(len(boxes), self.schema.field("type").type)  # see `celldetr.cells.join`
            columns |= {f"score_{name}": _floats(scores[:, k]) for k, name in enumerate(self.info.classes)}
        if self.info.width:
            missing = np.full(len(boxes), status != READ)
            columns["embedding"] = embedding_column(self._stored(embeddings), missing)
        return pa.table({name: columns[name] for name in self.schema.names}, self.schema)

    def _stored(self, embeddings: NDArray[np.floating]) -> NDArray[np.floating]:
        """Embeddings (n, C) in the type of the file; `InputError` if it cannot hold them."""
        with np.errstate(over="ignore"):
            stored = embeddings.astype(self.dtype, copy=False)
        if not np.isfinite(stored).all():
            raise InputError(
                f"{self.info.slide}: got embeddings with values up to {np.abs(embeddings).max():.3g}, which "
                f"{self.dtype} cannot hold; set embeddings to float32"
            )
        return stored


def _floats(values: NDArray[np.floating]) -> pa.Array:
    """Column of float32, null where NaN."""
    return pa.array(np.asarray(values, np.float32), from_pandas=True)
