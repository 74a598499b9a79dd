"""Gigapixel images read region by region: OME-TIFF and TIFF pyramids, and all else that OpenSlide opens.

    image = open_pyramid("he.ome.tif")
    image.read(level, x, y, width, height)     # (height, width, 3) uint8, or (height, width) of a single plane

A level's pixel (x, y) covers [x, x + 1) x [y, y + 1) of that level; level coordinates times `downsample` are those of
level 0. Nothing but the tiles that a region touches is read, and any number of threads may read at once.
"""

import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
_PLAUSIBLE_MPP = (0.02, 20.0)  # um; a resolution tag outside of this is of a printer, not of a microscope
_CACHE_BYTES = 48 << 20  # decoded tiles that are kept for a level


@dataclass(frozen=True)
class Level:
    """One level of a pyramid: size in px, and level-0 pixels per pixel."""

    width: int
    height: int
    downsample: float


class Pyramid(ABC):
    """An open image. Made by `open_pyramid`.

    Attributes
    ----------
    path
        The file.
    levels
        From the finest to the coarsest; at least one.
    mpp
        Size of a level-0 pixel in um, as given or as the file says; None when nobody knows.
    channels
        3 for colour, 1 for a single plane.
    dtype
        Type of a sample.
    background
        Value of pixels outside of the image: white for colour, 0 for a single plane.
    """

    path: Path
    levels: tuple[Level, ...]
    mpp: float | None
    channels: int
    dtype: np.dtype[Any]
    background: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0, px."""
        return self.levels[0].width, self.levels[0].height

    def level_for(self, downsample: float) -> int:
        """Index of the coarsest level that is no coarser than `downsample` level-0 pixels per pixel."""
        fine = [index for index, level in enumerate(self.levels) if level.downsample <= downsample * 1.01]
        return fine[-1] if fine else 0

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Read a region.

        Parameters
        ----------
        level
            Index of the level.
        x, y
            First column and row, px of that level; may lie outside of the image.
        width, height
            Size in px of that level.

        Returns
        -------
        NDArray
            (height, width, 3) uint8, or (height, width) of `dtype`; `background` outside of the image.

        Raises
        ------
        InputError
            The region cannot be decoded; names the file, the level and the place.
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

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Pyramid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_pyramid(path: str | os.PathLike[str], mpp: float | None = None, *, plane: int | None = None) -> Pyramid:
    """Open an image for reading regions.

    Parameters
    ----------
    path
        OME-TIFF or TIFF, tiled or in strips, colour as (y, x, 3), (3, y, x), (4, y, x) or (1, y, x, 3); or a slide that
        OpenSlide reads.
    mpp
        Size of a level-0 pixel in um, instead of what the file says.
    plane
        Read this plane (channel) alone, as gray values: 0 is DAPI in a Xenium morphology image. TIFF only.

    Raises
    ------
    InputError
        No such file, or no image that can be read.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected an image (OME-TIFF, or a slide that OpenSlide reads)")
    kind = openslide.OpenSlide.detect_format(str(file))
    if kind not in (None, "generic-tiff") and plane is None:
        return _Slide(file, mpp)
    return _Tiff(file, mpp, plane)


class _Slide(Pyramid):
    """A slide read by OpenSlide."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.path = path
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise InputError(f"{path}: OpenSlide cannot open it ({error}); is the file complete?") from error
        self._downsamples = [float(down) for down in self._slide.level_downsamples]
        self.levels = _levels(self._slide.level_dimensions)
        self.mpp = mpp or _plausible(self._slide.properties.get(openslide.PROPERTY_NAME_MPP_X))
        self.channels, self.dtype, self.background = 3, np.dtype(np.uint8), 255

    def _fill(self, level: int, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        x0, y0, x1, y1 = box
        down = self._downsamples[level]  # OpenSlide divides by this, rounded sizes and all
        try:
            region = self._slide.read_region((round(x0 * down), round(y0 * down)), level, (x1 - x0, y1 - y0))
        except openslide.OpenSlideError as error:
            raise InputError(f"{self.path}: level {level}, {x0},{y0} to {x1},{y1} px: {error}") from error
        pixels = np.asarray(region)
        for channel in range(3):  # numpy is slow along an axis of three
            out[..., channel] = pixels[..., channel]
        out[pixels[..., 3] == 0] = self.background

    def close(self) -> None:
        self._slide.close()


class _Tiff(Pyramid):
    """A TIFF pyramid, its tiles decoded here."""

    def __init__(self, path: Path, mpp: float | None, plane: int | None) -> None:
        self.path = path
        try:
            # OME metadata is not followed: it may name sister files (channels of a morphology image) that are not here
            self._file = tifffile.TiffFile(path, is_ome=False)
        except Exception as error:
            raise _unreadable(path, error) from error
        try:
            self._read_structure(mpp, plane)
        except (InputError, MemoryError):
            self._file.close()
            raise
        except Exception as error:
            self._file.close()
            raise _unreadable(path, error) from error

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
                f"{self.path}: got a plane of type {self.dtype}, expected uint8 or uint16; other types may hold "
                "negative values or NaN: convert the image"
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
            reader.forget()
        self._file.close()


def _unreadable(path: Path, error: Exception) -> InputError:
    """Error of a file whose structure is damaged: tifffile trusts it, and each damage has its own kind of error."""
    return InputError(f"{path}: cannot be read as TIFF ({error}); is the file complete?")


def _levels(sizes: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels of the sizes (width, height), the finest first.

    A level of half the size is rounded up or down to whole pixels; its pixels are still two wide. Dividing the sizes
    would misplace the far end of a slide by as much as two pixels.
    """
    width, height = sizes[0]
    levels = []
    for across, down in sizes:
        whole = round(width / across)
        exact = abs(whole * across - width) < whole and abs(whole * down - height) < whole
        levels.append(Level(across, down, float(whole) if exact else width / across))
    return tuple(levels)


def _tile_planes(pages: Sequence[tifffile.TiffPage], plane: int | None, path: Path) -> list["_Tiles"]:
    """Readers of the planes that make an image of three channels or of one."""
    first = pages[0]
    if first.samplesperpixel in (3, 4) and first.planarconfig == 1:
        readers = [_Tiles(first, 0, 3 if plane is None else 1, 0 if plane is None else plane)]
    elif first.samplesperpixel > 1:
        readers = [_Tiles(first, index) for index in range(first.samplesperpixel)]
    else:
        readers = [_Tiles(page, 0) for page in pages]
    if plane is not None and len(readers) > 1:
        readers = readers[plane : plane + 1]
    if len(readers) == 4:
        readers = readers[:3]  # alpha
    if sum(reader.samples for reader in readers) not in (1, 3):
        raise InputError(f"{path}: got {len(readers)} planes, expected a colour image or one plane")
    for reader in readers:
        reader.remember(_CACHE_BYTES // len(readers))
    return readers


class _Tiles:
    """Tiles (or strips) of one plane of a page.

    Parameters
    ----------
    page
        TIFF page.
    plane
        Plane, where a page keeps them apart.
    samples, first_sample
        Samples of a pixel that are wanted, and the first of them.
    """

    def __init__(self, page: tifffile.TiffPage, plane: int, samples: int = 1, first_sample: int = 0) -> None:
        self._page, self.samples, self._first = page, samples, first_sample
        self._path = page.parent.filehandle.path
        tiled = page.is_tiled
        self._width = page.tilewidth if tiled else page.imagewidth
        self._height = page.tilelength if tiled else min(page.rowsperstrip, page.imagelength)
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
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        self._tile_bytes = self._width * self._height * samples * np.dtype(page.dtype).itemsize
        self._recent: Callable[[int, int], NDArray[Any] | None] = self._tile

    def remember(self, size: int) -> None:
        """Keep the tiles decoded last, of `size` bytes together, at least two."""
        self._recent = functools.lru_cache(maxsize=max(2, size // self._tile_bytes))(self._tile)

    def forget(self) -> None:
        """Give the memory of the tiles back."""
        self._recent = self._tile

    def fill(self, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        """Write the pixels of a box (x0, y0, x1, y1) of the page to `out` (height, width, samples)."""
        x0, y0, x1, y1 = box
        for row in range(y0 // self._height, -(-y1 // self._height)):
            for column in range(x0 // self._width, -(-x1 // self._width)):
                tile = self._recent(row, column)
                if tile is None:
                    continue
                left, top = column * self._width, row * self._height
                a0, b0 = max(x0, left), max(y0, top)
                a1, b1 = min(x1, left + tile.shape[1]), min(y1, top + tile.shape[0])
                out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0] = tile[b0 - top : b1 - top, a0 - left : a1 - left]

    def _tile(self, row: int, column: int) -> NDArray[Any] | None:
        """Pixels (rows, columns, samples) of a tile; None when the file leaves it out (empty glass)."""
        index = self._offset + row * self._across + column
        offset, count = self._page.dataoffsets[index], self._page.databytecounts[index]
        if not count:
            return None
        data = os.pread(self._handle, count, offset)
        try:
            if len(data) != count:
                raise ValueError(f"the file ends after {len(data)} of its {count} bytes")
            tile, _, shape = self._decode(data, index, jpegtables=self._tables)
        except Exception as error:  # each codec has its own kind of error for damaged bytes
            raise InputError(
                f"{self._path}: the tile in row {row}, column {column} of the level {self._page.imagewidth} x "
                f"{self._page.imagelength} px cannot be decoded ({error}); the file is damaged: get it again"
            ) from error
        if tile is None:
            return None
        pixels: NDArray[Any] = tile.reshape(tile.shape[-3:])[: shape[1], : shape[2]]
        return pixels[..., self._first : self._first + self.samples]


def _ome_mpp(text: str) -> float | None:
    """Pixel size in um of the first image of OME metadata."""
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
    """Pixel size in um as a number, if it can be one of a microscope."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if _PLAUSIBLE_MPP[0] <= number <= _PLAUSIBLE_MPP[1] else None
