"""Pixels of large images, region by region: TIFF, OME-TIFF, what OpenSlide reads, and PNG, JPEG, WebP, BMP, JPEG 2000.

    image = open_pyramid("he.ome.tif")
    image.read(level, x, y, width, height)     # (height, width, 3) uint8, or (height, width) for a single plane

Pixel (x, y) of a level covers [x, x + 1) x [y, y + 1) of that level; level coordinates times `downsample` are level-0
coordinates. Only the tiles that a region touches are decoded.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from numpy.typing import NDArray
from tifffile import TiffFile, TiffFileError

from celldetr.runtime.errors import InputError
from celldetr.slides.flat import FLAT, is_flat, read_flat
from celldetr.slides.tiff import (
    DamagedSlide,
    check_orientation,
    check_tile_bytes,
    level_pages,
    number,
    stated_objective,
    stated_pixel_size,
    tile_planes,
)

_PLAUSIBLE_MPP = (0.02, 20.0)  # um; a resolution tag beyond this range is for printing (72 dpi), not from a microscope
_FINEST_PRINT = 2.0  # um; PNG and JPEG, which are printed and scanned, state larger pixels for that (5.3 um: 4800 dpi)
_OVAL = 0.02  # largest relative difference between width and height of a pixel
_FASTER = ("aperio",)  # formats of OpenSlide of which tifffile reads the same pixels in a quarter of the time


@dataclass(frozen=True)
class Level:
    """A level of a pyramid: its size in px, and level-0 pixels per pixel."""

    width: int
    height: int
    downsample: float


class Pyramid(ABC):
    """An open image, made by `open_pyramid`."""

    path: Path
    levels: tuple[Level, ...]
    """At least one, the finest first."""
    mpp: float | None
    """Size of a level-0 pixel in um; None if unknown."""
    stated_mpp: float | None = None
    """The same as the file says, whatever the caller does; None if it says nothing."""
    objective: float | None = None
    """Magnification of the objective (20, 40) as the file says; None if it says nothing."""
    channels: int
    """3 for colour, 1 for a single plane."""
    dtype: np.dtype[Any]
    background: int
    """Value of pixels outside the image: white (255) for colour, 0 for a single plane."""
    origin: tuple[int, int] = (0, 0)
    """Corner x, y of the part that was scanned, px of level 0, from which QuPath counts (openslide.bounds-x, -y)."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0, px."""
        return self.levels[0].width, self.levels[0].height

    def level_for(self, downsample: float) -> int:
        """Index of the coarsest level with at most `downsample` level-0 pixels per pixel."""
        fine = [index for index, level in enumerate(self.levels) if level.downsample <= downsample * 1.01]
        return fine[-1] if fine else 0

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Read a region: (height, width, 3) uint8, or (height, width) of `dtype`; `background` outside the image.

        First column `x`, first row `y` and the size are px of the level; the region may lie outside the image.

        Raises
        ------
        InputError
            The region cannot be decoded; the message names the file, the level and the place.
        """
        shape = (height, width, 3) if self.channels == 3 else (height, width)
        region = np.full(shape, self.background, dtype=self.dtype)
        grid = self.levels[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, grid.width), min(y + height, grid.height)
        if x0 < x1 and y0 < y1:
            self._fill(level, (x0, y0, x1, y1), region[y0 - y : y1 - y, x0 - x : x1 - x])
        return region

    @abstractmethod
    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        """Write the pixels of a box (x0, y0, x1, y1) inside the level to `out`."""

    def damage(self) -> list[str]:
        """Regions that were read as background because they cannot be decoded; see `celldetr.slides.damage`."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Pyramid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_pyramid(path: str | os.PathLike[str], mpp: float | None = None, *, plane: int | None = None) -> Pyramid:
    """Open an image.

    Parameters
    ----------
    path
        A slide that OpenSlide reads; or TIFF or OME-TIFF, tiled or in strips, colour as (y, x, 3), (3, y, x), (4, y, x)
        or (1, y, x, 3). The largest image of the file is taken, with its smaller copies. Or PNG, JPEG, WebP, BMP
        or JPEG 2000.
    mpp
        Size of a level-0 pixel in um; replaces what the file says.
    plane
        Read only this plane (channel), as gray values: 0 is DAPI in a Xenium morphology image. TIFF only.

    Raises
    ------
    DamagedSlide
        It cannot be read as an image.
    InputError
        There is no such file, its colours or samples cannot be read as what they are, or its pixels are not square.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; expected an image (TIFF, OME-TIFF, a slide that OpenSlide reads, PNG, JPEG)"
        )
    kind = openslide.OpenSlide.detect_format(str(file))
    if kind is None and not file.stat().st_size:
        raise DamagedSlide(f"{file}: got an empty file (0 bytes), expected an image; get it again")
    if kind is None and is_flat(file):  # MIRAX slides begin as JPEG does
        if plane is not None:
            raise InputError(f"{file}: got a {FLAT}, expected a TIFF or OME-TIFF with planes")
        return _Flat(file, mpp)
    if kind in _FASTER and plane is None:
        with contextlib.suppress(InputError):
            image = _Tiff(file, mpp, plane)
            if image.complete:
                return image
            image.close()  # OpenSlide draws tiles that a level lacks from the finer one
    if kind not in (None, "generic-tiff") and plane is None:
        return _Slide(file, mpp)
    return _Tiff(file, mpp, plane)


class _Slide(Pyramid):
    """A slide that OpenSlide reads."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.path = path
        self._slide = self._open()
        self._downsamples = [float(down) for down in self._slide.level_downsamples]
        self.levels = _levels(self._slide.level_dimensions)
        for level in range(self._slide.level_count):
            tile = f"openslide.level[{level}].tile-"
            sides = (int(self._slide.properties.get(tile + side, 0)) for side in ("width", "height"))
            check_tile_bytes(path, f"of level {level}", 4 * math.prod(sides))
        stated = self._slide.properties
        self.mpp, self.stated_mpp = _pixel_sizes(
            path, mpp, stated.get(openslide.PROPERTY_NAME_MPP_X), stated.get(openslide.PROPERTY_NAME_MPP_Y)
        )
        self.objective = number(stated.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        x, y = (stated.get(name, 0) for name in (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y))
        self.origin = int(x), int(y)
        self.channels, self.dtype, self.background = 3, np.dtype(np.uint8), 255

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideError as error:
            raise DamagedSlide(f"{self.path}: OpenSlide cannot open it ({error}); is the file complete?") from error

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        x0, y0, x1, y1 = box
        down = self._downsamples[level]  # not that of `levels`: OpenSlide divides by the ratio of the rounded sizes
        try:
            region = self._slide.read_region((round(x0 * down), round(y0 * down)), level, (x1 - x0, y1 - y0))
        except openslide.OpenSlideError as error:
            self._slide = self._open()  # after an error OpenSlide reads nothing from an open slide
            raise InputError(f"{self.path}: level {level}, {x0},{y0} to {x1},{y1} px: {error}") from error
        pixels = np.asarray(region)
        for channel in range(3):  # numpy copies slowly along an axis of length three
            out[..., channel] = pixels[..., channel]
        out[pixels[..., 3] == 0] = self.background

    def close(self) -> None:
        self._slide.close()


class _Tiff(Pyramid):
    """A TIFF pyramid; tiles are decoded by tifffile."""

    def __init__(self, path: Path, mpp: float | None, plane: int | None) -> None:
        self.path = path
        with contextlib.ExitStack() as opened:
            try:
                self._file = opened.enter_context(TiffFile(path))
                self._read_structure(mpp, plane)
            except (InputError, MemoryError):
                raise
            except Exception as error:  # tifffile raises many kinds for a damaged structure
                with path.open("rb") as file:
                    page = b"<html" in file.read(1024).lower()
                reason = "it is a web page (HTML); get the slide again" if page else f"{error}; is the file complete?"
                if isinstance(error, TiffFileError):
                    reason += f" Expected TIFF, a format of OpenSlide, {FLAT}; others must be converted"
                raise DamagedSlide(f"{path}: cannot be read as TIFF: {reason}") from error
            opened.pop_all()

    def _read_structure(self, mpp: float | None, plane: int | None) -> None:
        levels = level_pages(self._file)
        first = levels[0][0]
        check_orientation(self.path, first.tags.valueof("Orientation", 1))
        self._planes = [tile_planes(pages, plane, self.path) for pages in levels]
        self.channels = sum(reader.samples for reader in self._planes[0])
        self.dtype = np.dtype(first.dtype)
        if self.channels == 3 and self.dtype != np.uint8:
            raise InputError(f"{self.path}: got colour of type {self.dtype}, expected uint8 (8 bit a channel)")
        if self.channels == 1 and self.dtype.kind != "u":
            raise InputError(
                f"{self.path}: got a plane of type {self.dtype}, expected uint8 or uint16 (other types may have "
                "negative values or NaN); convert the image"
            )
        self.background = 255 if self.channels == 3 else 0
        self.complete = all(all(page.databytecounts) for pages in levels for page in pages)
        self.levels = _levels([(pages[0].imagewidth, pages[0].imagelength) for pages in levels])
        self.mpp, self.stated_mpp = _pixel_sizes(self.path, mpp, *stated_pixel_size(self._file, first))
        self.objective = stated_objective(self._file)

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        out = out.reshape(*out.shape[:2], self.channels)
        start = 0
        for reader in self._planes[level]:
            reader.fill(box, out[..., start : start + reader.samples])
            start += reader.samples

    def close(self) -> None:
        for reader in (reader for readers in self._planes for reader in readers):
            reader.close()
        self._file.close()


class _Flat(Pyramid):
    """An image without tiles; transparent pixels are white."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.path = path
        self._pixels, um = read_flat(path)
        height, width, _ = self._pixels.shape
        self.levels = _levels([(width, height)])
        self.mpp, self.stated_mpp = _pixel_sizes(path, mpp, *um, largest=_FINEST_PRINT)
        self.channels, self.dtype, self.background = 3, np.dtype(np.uint8), 255

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        x0, y0, x1, y1 = box
        pixels = self._pixels[y0:y1, x0:x1]
        out[...] = pixels[..., :3]
        if pixels.shape[2] == 4:
            alpha = pixels[..., 3:].astype(np.uint16)
            out[...] = (out * alpha + self.background * (255 - alpha) + 127) // 255

    def close(self) -> None:
        del self._pixels


def _levels(sizes: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their sizes (width, height), the finest first.

    The size of a level is rounded to whole pixels, but the pixels of a level at half the size are still exactly two
    level-0 pixels wide. The ratio of the sizes would misplace the far end of a slide by up to two pixels.
    """
    width, height = sizes[0]
    levels = []
    for across, down in sizes:
        whole = round(width / across)
        exact = abs(whole * across - width) < whole and abs(whole * down - height) < whole
        levels.append(Level(across, down, float(whole) if exact else width / across))
    return tuple(levels)


def _pixel_sizes(
    path: Path, mpp: float | None, width: object, height: object, largest: float = _PLAUSIBLE_MPP[1]
) -> tuple[float | None, float | None]:
    """Size of a pixel in um that holds, `mpp` if it is given, and the one that the file states."""
    if not mpp:
        stated = _pixel_size(path, width, height, largest)
        return stated, stated
    try:
        return mpp, _pixel_size(path, width, height, largest)
    except InputError:  # not square: the caller knows better
        return mpp, None


def _pixel_size(path: Path, width: object, height: object, largest: float = _PLAUSIBLE_MPP[1]) -> float | None:
    """Size of a pixel in um from what a file states; None if no microscope has such pixels.

    Raises
    ------
    InputError
        Pixels are not square.
    """
    x, y = number(width), number(height)
    if x is None or not _PLAUSIBLE_MPP[0] <= x <= largest:
        return None
    if y and abs(x / y - 1) > _OVAL:
        raise InputError(
            f"{path}: got pixels of {x:.4g} x {y:.4g} um, expected square ones; resample the image, or give the right "
            "um per px in column mpp (he_mpp) of the sheet if the file is wrong"
        )
    return x
