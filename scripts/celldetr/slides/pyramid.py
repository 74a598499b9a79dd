"""Pixels of gigapixel images, region by region: TIFF and OME-TIFF pyramids, and the formats that OpenSlide reads.

    image = open_pyramid("he.ome.tif")
    image.read(level, x, y, width, height)     # (height, width, 3) uint8, or (height, width) for a single plane

Pixel (x, y) of a level covers [x, x + 1) x [y, y + 1) of that level; level coordinates times `downsample` are level-0
coordinates. Only the tiles that a region touches are decoded.
"""

import contextlib
import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError

_UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "": 1.0}
_PLAUSIBLE_MPP = (0.02, 20.0)  # um; a resolution tag beyond this range is for printing (72 dpi), not from a microscope
_CACHE_BYTES = 48 << 20  # decoded tiles kept for each level


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
    channels: int
    """3 for colour, 1 for a single plane."""
    dtype: np.dtype[Any]
    background: int
    """Value of pixels outside the image: white (255) for colour, 0 for a single plane."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0, px."""
        return self.levels[0].width, self.levels[0].height

    def level_for(self, downsample: float) -> int:
        """Index of the coarsest level with at most `downsample` level-0 pixels per pixel."""
        fine = [index for index, level in enumerate(self.levels) if level.downsample <= downsample * 1.01]
        return fine[-1] if fine else 0

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Read a region.

        Parameters
        ----------
        level
            Index of the level.
        x, y
            First column and row, px of that level; may lie outside the image.
        width, height
            Size, px of that level.

        Returns
        -------
        NDArray
            (height, width, 3) uint8, or (height, width) of `dtype`; `background` outside the image.

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
        or (1, y, x, 3).
    mpp
        Size of a level-0 pixel in um; replaces what the file says.
    plane
        Read only this plane (channel), as gray values: 0 is DAPI in a Xenium morphology image. TIFF only.

    Raises
    ------
    InputError
        There is no such file, or it cannot be read as an image.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected an image (OME-TIFF, or a slide that OpenSlide reads)")
    kind = openslide.OpenSlide.detect_format(str(file))
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
        self.mpp = mpp or _plausible(self._slide.properties.get(openslide.PROPERTY_NAME_MPP_X))
        self.channels, self.dtype, self.background = 3, np.dtype(np.uint8), 255

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideError as error:
            raise InputError(f"{self.path}: OpenSlide cannot open it ({error}); is the file complete?") from error

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
                # ignore OME metadata: it may name other files (channels of a morphology image) that are not here
                self._file = opened.enter_context(tifffile.TiffFile(path, is_ome=False))
                self._read_structure(mpp, plane)
            except (InputError, MemoryError):
                raise
            except Exception as error:  # tifffile raises many kinds for a damaged structure
                raise InputError(f"{path}: cannot be read as TIFF ({error}); is the file complete?") from error
            opened.pop_all()

    def _read_structure(self, mpp: float | None, plane: int | None) -> None:
        series = self._file.series[0]
        pages = [[page.aspage() for page in level.pages if page is not None] for level in series.levels]
        first = pages[0][0]
        self._planes = [_tile_planes(page_list, plane, self.path) for page_list in pages]
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
        self.levels = _levels([(level[0].imagewidth, level[0].imagelength) for level in pages])
        self.mpp = mpp or self._mpp(first)

    def _mpp(self, page: tifffile.TiffPage) -> float | None:
        text = self._file.pages.first.description or ""
        if "OME" in text[:2000] and "PhysicalSizeX" in text:
            return _ome_mpp(text)
        tag = page.tags.get("XResolution")
        unit = {2: 25400.0, 3: 10000.0}.get(int(page.resolutionunit or 1))
        if tag is None or unit is None or not tag.value[0]:
            return None
        return _plausible(unit * tag.value[1] / tag.value[0])

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        if self.channels == 1:
            self._planes[level][0].fill(box, out[..., None])
            return
        start = 0
        for reader in self._planes[level]:
            reader.fill(box, out[..., start : start + reader.samples])
            start += reader.samples

    def close(self) -> None:
        for reader in (reader for readers in self._planes for reader in readers):
            reader.tile.cache_clear()
        self._file.close()


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


def _tile_planes(pages: Sequence[tifffile.TiffPage], plane: int | None, path: Path) -> list["_Tiles"]:
    """Readers of the planes of a level: colour in one reader or in three, or a single plane."""
    first = pages[0]
    if first.samplesperpixel in (3, 4) and first.planarconfig == 1:
        samples = slice(0, 3) if plane is None else slice(plane, plane + 1)
        parts = [(first, 0, samples)]
        count = samples.stop - samples.start
    else:
        separate = first.samplesperpixel > 1
        parts = [(first, index, slice(1)) for index in range(first.samplesperpixel)] if separate else []
        parts = parts or [(page, 0, slice(1)) for page in pages]
        if plane is not None and len(parts) > 1:
            parts = parts[plane : plane + 1]
        if len(parts) == 4:
            parts = parts[:3]  # the fourth is alpha
        count = len(parts)
    if count not in (1, 3):
        raise InputError(f"{path}: got {count} planes, expected a colour image or one plane")
    return [_Tiles(*part, cache=_CACHE_BYTES // len(parts)) for part in parts]


class _Tiles:
    """Tiles (or strips) of a page.

    Parameters
    ----------
    page
        TIFF page.
    plane
        Index of the plane if the page stores its planes one after another.
    samples
        Samples of a pixel to read.
    cache
        Bytes of decoded tiles to keep; at least two tiles are kept.
    """

    def __init__(self, page: tifffile.TiffPage, plane: int, samples: slice, *, cache: int) -> None:
        self._page, self._samples = page, samples
        self.samples = samples.stop - (samples.start or 0)
        self._path = page.parent.filehandle.path
        self._width = page.tilewidth if page.is_tiled else page.imagewidth
        self._height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        self._across = -(-page.imagewidth // self._width)
        down = -(-page.imagelength // self._height)
        self._offset = plane * self._across * down
        there = min(len(page.dataoffsets), len(page.databytecounts))
        if there < self._offset + self._across * down:
            raise InputError(
                f"{self._path}: the level {page.imagewidth} x {page.imagelength} px needs more than its {there} tiles; "
                "the file is damaged: get it again"
            )
        self._tables = page.jpegtables
        self._handle = page.parent.filehandle.fileno()
        self._decode = page.decode
        stored = page.samplesperpixel if page.planarconfig == 1 else 1
        tile_bytes = self._width * self._height * stored * np.dtype(page.dtype).itemsize
        self.tile = functools.lru_cache(maxsize=max(2, cache // tile_bytes))(self._read_tile)

    def fill(self, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        """Write the pixels of a box (x0, y0, x1, y1) of the page to `out` (height, width, samples)."""
        x0, y0, x1, y1 = box
        for row in range(y0 // self._height, -(-y1 // self._height)):
            for column in range(x0 // self._width, -(-x1 // self._width)):
                tile = self.tile(row, column)
                if tile is None:
                    continue
                left, top = column * self._width, row * self._height
                a0, b0 = max(x0, left), max(y0, top)
                a1, b1 = min(x1, left + tile.shape[1]), min(y1, top + tile.shape[0])
                out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0] = tile[b0 - top : b1 - top, a0 - left : a1 - left]

    def _read_tile(self, row: int, column: int) -> NDArray[Any] | None:
        """Pixels (rows, columns, samples) of a tile; None if it is not in the file (empty glass)."""
        index = self._offset + row * self._across + column
        offset, count = self._page.dataoffsets[index], self._page.databytecounts[index]
        if not count:
            return None
        data = os.pread(self._handle, count, offset)
        try:
            if len(data) != count:
                raise ValueError(f"the file ends after {len(data)} of its {count} bytes")
            tile, _, shape = self._decode(data, index, jpegtables=self._tables)
        except Exception as error:  # each codec raises its own kind of exception
            raise InputError(
                f"{self._path}: the tile in row {row}, column {column} of the level {self._page.imagewidth} x "
                f"{self._page.imagelength} px cannot be decoded ({error}); the file is damaged: get it again"
            ) from error
        if tile is None:
            return None
        pixels: NDArray[Any] = tile.reshape(tile.shape[-3:])[: shape[1], : shape[2]]
        return pixels[..., self._samples]


def _ome_mpp(text: str) -> float | None:
    """Pixel size in um from OME metadata (its first image)."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    pixels = next((node for node in root.iter() if re.sub(r"^\{.*\}", "", node.tag) == "Pixels"), None)
    if pixels is None or "PhysicalSizeX" not in pixels.attrib:
        return None
    unit = _UM_PER_UNIT.get(pixels.attrib.get("PhysicalSizeXUnit", ""))
    return None if unit is None else _plausible(float(pixels.attrib["PhysicalSizeX"]) * unit)


def _plausible(value: object) -> float | None:
    """Pixel size in um as a number; None if no microscope has such pixels."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if _PLAUSIBLE_MPP[0] <= number <= _PLAUSIBLE_MPP[1] else None
