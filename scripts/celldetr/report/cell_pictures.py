"""Cells enlarged: squares of the slide as pictures, with the outlines of cells above them, which a reader can hide."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image

from celldetr.cells.table import CellFile
from celldetr.report.cell_maps import DrawnCells, Field
from celldetr.report.pages import embed
from celldetr.report.slide_pictures import Square, length_text, read_squares, round_length
from celldetr.slides.pyramid import Pyramid

_FIELD_PX, _CROP_PX = 840, 192
_CROP_UM = 24.0  # side of a crop, at least
_UNSEEN_PX = 0.5  # how far an outline may be drawn from its place
_SHOWN = 8  # most certain cells of a type, and as many least certain ones


class Shape(NamedTuple):
    """An outline above a picture."""

    path: str
    """SVG path, px of the picture."""
    group: int
    """Index of its group in `DrawnCells`."""
    text: str
    """What the reader is told under the mouse."""


class Picture(NamedTuple):
    """A square of the slide."""

    data: str
    """JPEG, see `celldetr.report.pages.embed`."""
    size: int
    """px."""
    shapes: list[Shape]
    caption: str
    bar: tuple[float, str] = (0.0, "")
    """Length, px, and words of its scale bar."""


class Ranked(NamedTuple):
    """Cells of a group, the first first: the most certain, or the least certain ones."""

    group: int
    words: str
    members: NDArray[np.int64]


def rank(cells: DrawnCells) -> list[Ranked]:
    """Rank the cells of each group by certainty; a cell is not among both the most and the least certain ones."""
    found = []
    for group in range(len(cells.names)):
        members = np.flatnonzero((cells.groups == group) & np.isfinite(cells.certainty))
        order = members[np.argsort(-cells.certainty[members], kind="stable")]
        rows = (("most certain", order[:_SHOWN]), ("least certain", order[_SHOWN:][-_SHOWN:][::-1]))
        found += [Ranked(group, words, row) for words, row in rows if len(row)]
    return found


def crop_side(cells: DrawnCells) -> float:
    """Side of the crops, um: more than that of nearly all cells."""
    return max(_CROP_UM, 8.0 * np.ceil(1.5 / 8 * np.percentile(cells.sizes, 95))) if len(cells) else _CROP_UM


class CellPictures:
    """Makes pictures; holds ids and outlines of the cells in these fields and rankings."""

    def __init__(
        self, image: Pyramid, file: CellFile, cells: DrawnCells, fields: Sequence[Field], ranked: Sequence[Ranked]
    ) -> None:
        self._image, self._mpp, self._cells = image, file.info.mpp, cells
        members = [one.members for one in fields] + [one.members for one in ranked]
        self._shown = np.unique(np.concatenate([np.empty(0, np.int64), *members]))
        table = file.take(cells.numbers[self._shown], ["cell_id", "geometry"])
        self._ids = table["cell_id"].to_pylist()
        self._outlines = shapely.from_wkb(table["geometry"].to_numpy())

    def field(self, field: Field) -> Picture:
        """Return a field with all of its cells."""
        names, bar = self._cells.names, round_length(field.side / 4)
        counts = np.bincount(self._cells.groups[field.members], minlength=len(names))
        words = ", ".join(
            f"{counts[group]:,} {names[group]}" for group in np.argsort(-counts, kind="stable") if counts[group]
        )
        [square] = read_squares(self._image, (field.corner + field.side / 2)[None], field.side, _FIELD_PX)
        return self._picture(
            square, field.members, f"{field.letter}: {field.why}. {words}", (bar / square.mpp, length_text(bar))
        )

    def crops(self, ranked: Ranked, side: float) -> list[Picture]:
        """Return crops with a cell in the middle, and its score."""
        squares = read_squares(self._image, self._cells.centres[ranked.members], side, _CROP_PX)
        return [
            self._picture(square, [cell], f"{self._cells.certainty[cell]:.2f}")
            for square, cell in zip(squares, ranked.members, strict=True)
        ]

    def _picture(
        self, square: Square, members: Iterable[int], caption: str, bar: tuple[float, str] = (0.0, "")
    ) -> Picture:
        shapes = [self._shape(square, int(cell)) for cell in members]
        caption += " (part cannot be decoded)" if square.damaged else ""
        return Picture(embed(Image.fromarray(square.pixels), lines=False), len(square.pixels), shapes, caption, bar)

    def _shape(self, square: Square, cell: int) -> Shape:
        place, cells = int(np.searchsorted(self._shown, cell)), self._cells
        scores = {"score": cells.certainty[cell], "nucleus score": cells.nucleus_score[cell]}
        if cells.groups[cell] == len(cells.names) - 1:
            del scores["score"]
        text = f"cell {self._ids[place]}, {cells.names[cells.groups[cell]]}"
        text += "".join(f", {name} {score:.2f}" for name, score in scores.items() if np.isfinite(score))
        path = ""
        # a polygon along the pixels of a mask has many more corners than can be seen
        outline = shapely.simplify(self._outlines[place], _UNSEEN_PX * square.mpp / self._mpp)
        for ring in shapely.get_rings(outline):
            corners = (shapely.get_coordinates(ring)[:-1] * self._mpp - square.corner) / square.mpp
            path += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "Z"
        return Shape(path, int(cells.groups[cell]), text)
