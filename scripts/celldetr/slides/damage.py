"""Slides with damaged regions: what cannot be decoded is named, and either stops the work or is left out."""

import logging
import math
import os
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid, open_pyramid

log = logging.getLogger(__name__)

_PIECE_UM, _PIECE_PX = 64.0, 16  # a damaged region as small as either is given up as a whole
_OTHER = 0.03  # relative difference of pixel sizes that is no rounding
_UM_OF_1X = 10.0  # um per px times magnification: 0.25 um at 40x, 0.5 um at 20x; scanners differ by 10 %
_NOT_OF_OBJECTIVE = 1.5  # factor between a pixel size and that of its objective which no scanner explains
_NAMED = 10  # damaged places that are named in the log and in the store


def open_slide(path: str | os.PathLike[str], mpp: float | None, slide: str, *, skip: bool = False) -> Pyramid:
    """Open a colour slide with a known pixel size, see `open_pyramid`; errors name `slide`.

    With `skip`, regions that cannot be decoded are read as background, and `Pyramid.damage` names them.

    Raises
    ------
    DamagedSlide
        The file cannot be read as an image.
    InputError
        See `open_pyramid`; or the image is not in colour, or its pixel size is unknown.
    """
    try:
        image = open_pyramid(path, mpp)
    except InputError as error:
        raise type(error)(f"{slide}: {error}") from error
    problem = ""
    if image.channels != 3:
        problem = "got an image with one channel, expected colour (H&E)"
    elif image.mpp is None:
        problem = (
            "the file does not state its pixel size, and no value is guessed; give um per px in column mpp of its "
            "sheet (command line: --mpp): about 0.25 for a 40x objective, 0.5 for 20x"
            f"{f' (the file names {image.objective:g}x)' if image.objective else ''}; whoever provides the slide has "
            "the exact value"
        )
    if problem:
        image.close()
        raise InputError(f"{slide}: {path}: {problem}")
    if mpp and image.stated_mpp and abs(mpp / image.stated_mpp - 1) > _OTHER:
        log.warning(
            "%s: %s: its pixels are taken to be %g um, as given, but the file says %.4g um; all sizes depend on it",
            slide,
            path,
            mpp,
            image.stated_mpp,
        )
    elif mpp and not image.stated_mpp and image.objective:
        _warn_of_objective(slide, image, mpp)
    return TolerantPyramid(image) if skip else image


def _warn_of_objective(slide: str, image: Pyramid, mpp: float) -> None:
    """Warn of a given pixel size that is not that of the objective, of a file that states no pixel size."""
    expected = _UM_OF_1X / (image.objective or math.inf)
    if not 1 / _NOT_OF_OBJECTIVE < mpp / expected < _NOT_OF_OBJECTIVE:
        log.warning(
            "%s: %s: its pixels are taken to be %g um, as given (column mpp or --mpp), but the file names an objective "
            "of %gx, whose pixels are about %.2g um; a wrong value gives wrong cells and types: ask whoever provides "
            "the slide",
            slide,
            image.path,
            mpp,
            image.objective,
            expected,
        )


class TolerantPyramid(Pyramid):
    """A pyramid in which regions that cannot be decoded are background."""

    def __init__(self, image: Pyramid) -> None:
        self._image = image
        self._lost: dict[int, list[tuple[int, int, int, int]]] = {}
        self._reason = ""
        self.path, self.levels, self.mpp = image.path, image.levels, image.mpp
        self.channels, self.dtype, self.background = image.channels, image.dtype, image.background
        self.origin = image.origin

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        x0, y0, x1, y1 = box
        width, height = x1 - x0, y1 - y0
        try:
            out[...] = self._image.read(level, x0, y0, width, height)
        except InputError as error:
            if max(width, height) <= self._smallest(level):
                self._lost.setdefault(level, []).append(box)
                self._reason = self._reason or str(error)
                out[...] = self.background
            elif width >= height:
                half = width // 2
                self._fill(level, (x0, y0, x0 + half, y1), out[:, :half])
                self._fill(level, (x0 + half, y0, x1, y1), out[:, half:])
            else:
                half = height // 2
                self._fill(level, (x0, y0, x1, y0 + half), out[:half])
                self._fill(level, (x0, y0 + half, x1, y1), out[half:])

    def _smallest(self, level: int) -> int:
        """Side of a region that is not divided further, px of the level."""
        return max(_PIECE_PX, round(_PIECE_UM / ((self.mpp or 1.0) * self.levels[level].downsample)))

    def damage(self) -> list[str]:
        """Name each region that could not be decoded; adjacent pieces are one region."""
        messages = []
        for level, boxes in self._lost.items():
            regions = shapely.get_parts(shapely.union_all(shapely.box(*np.array(boxes, dtype=float).T)))
            for x0, y0, x1, y1 in shapely.bounds(regions).astype(int).tolist():
                messages.append(f"{self.path}: level {level}, {x0},{y0} to {x1},{y1} px; first error: {self._reason}")
        return messages

    def close(self) -> None:
        """Close the file."""
        self._image.close()


def log_damage(slide: str, messages: list[str]) -> list[str]:
    """Log damaged places; return the first few, to be kept in the store."""
    for message in messages[:_NAMED]:
        log.warning("%s: left out: %s", slide, message)
    if len(messages) > _NAMED:
        log.warning("%s: and %d more", slide, len(messages) - _NAMED)
    return messages[:_NAMED]
