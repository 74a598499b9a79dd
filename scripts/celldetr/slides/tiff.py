"""Pages and tiles of TIFF images: which pages are the levels of the slide, and the pixels of their tiles."""

import functools
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, TIFF, TiffFile, TiffPage

from celldetr.runtime.errors import InputError
from celldetr.slides.decoded import DecodedStrips, strips_of

_UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "": 1.0}
_CACHE_BYTES = 48 << 20  # decoded tiles kept for each level
_TILE_BYTES = 512 << 20  # largest decoded tile; Pillow opens no larger image in colour
_JPEG = {COMPRESSION.JPEG, COMPRESSION.ALT_JPEG, COMPRESSION.JPEG_LOSSY}
_YCBCR = COMPRESSION.APERIO_JP2000_YCBC  # JPEG 2000 whose samples are Y, Cb and Cr
_JPEG_2000 = {_YCBCR, COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG_2000_LOSSY, COMPRESSION.JPEG2000}
_IMAGES = {*_JPEG, *_JPEG_2000, COMPRESSION.PNG, COMPRESSION.WEBP}  # tiles that have a header with a size of their own


class DamagedSlide(InputError):
    """The file of an image exists but cannot be opened."""


def level_pages(file: TiffFile) -> list[list[TiffPage]]:
    """Pages (one, or one for each plane) of each level of the largest image, the finest level first.

    Descriptions of ImageJ, OME or tifffile may be those of another file that this one was converted from: the pages
    themselves tell. Levels have the shape of the largest page; a macro image or a label does not.
    """
    pages = []
    for page in file.pages:
        pages.append(page.aspage())
        for number, offset in enumerate(page.subifds or ()):
            file.filehandle.seek(offset)
            pages.append(TiffPage(file, (page.index, number)))
    first = max(pages, key=lambda page: page.imagewidth * page.imagelength)
    levels: dict[tuple[int, int], list[TiffPage]] = {}
    for page in pages:
        width, height = page.imagewidth, page.imagelength
        skew = abs(height * first.imagewidth - width * first.imagelength)  # both sides may be rounded
        if _layout(page) == _layout(first) and skew < first.imagewidth + first.imagelength:
            levels.setdefault((width, height), []).append(page)
    planes = len(levels[first.imagewidth, first.imagelength])
    return [levels[size][:planes] for size in sorted(levels, reverse=True) if len(levels[size]) >= planes]


def _layout(page: TiffPage) -> tuple[object, ...]:
    return page.samplesperpixel, page.dtype, page.planarconfig, page.photometric, page.is_tiled


def _check_colours(page: TiffPage, path: Path) -> None:
    """Refuse colours that tifffile does not turn into RGB, and compressed tiles whose size is only known too late."""
    plain = page.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.MINISBLACK)
    known = page.photometric == PHOTOMETRIC.YCBCR and page.compression in {*_JPEG, _YCBCR}
    if not (plain or known) or (page.compression in TIFF.IMAGE_COMPRESSIONS and page.compression not in _IMAGES):
        colours, codec = (getattr(value, "name", value) for value in (page.photometric, page.compression))
        raise InputError(
            f"{path}: got colours {colours} with compression {codec}, expected RGB, gray values, or YCbCr in JPEG; "
            "convert the image (e.g. vips colourspace, then vips tiffsave --tile --pyramid)"
        )


def check_orientation(path: Path, orientation: object) -> None:
    """Refuse an image (tag Orientation of TIFF and EXIF) of which a program may show the pixels at other places."""
    if orientation not in (0, 1):
        raise InputError(
            f"{path}: the file asks to be shown turned or mirrored (orientation {orientation}), which some programs do "
            "and some do not: places of nuclei would be ambiguous; save it as it is to be seen (e.g. vips autorot)"
        )


def check_tile_bytes(path: str | Path, level: str, size: int) -> None:
    """Refuse tiles or strips that would fill the memory when they are decoded."""
    if size > _TILE_BYTES:
        raise InputError(
            f"{path}: a tile or strip {level} takes {size / 2**30:.1f} GiB, expected at most {_TILE_BYTES / 2**30:g}; "
            "convert the image (e.g. vips tiffsave --tile --pyramid)"
        )


def tile_planes(pages: Sequence[TiffPage], plane: int | None, path: Path) -> list["Tiles"]:
    """Readers of the planes of a level: colour in one reader or in three, or a single plane."""
    first, gray = pages[0], slice(0, 1)
    _check_colours(first, path)
    if first.samplesperpixel > 1 and len(pages) > 1:
        raise InputError(
            f"{path}: got {len(pages)} colour images of {first.imagewidth} x {first.imagelength} px (a stack of focal "
            "planes, a time series or several slides), expected one; save the one to read as a file of its own (e.g. "
            "the third: vips tiffsave 'IN.tif[page=2]' OUT.tif --tile --pyramid)"
        )
    if first.samplesperpixel in (3, 4) and first.planarconfig == 1:
        parts = [(first, 0, slice(0, 3) if plane is None else slice(plane, plane + 1))]
    elif first.samplesperpixel > 1:
        parts = [(first, index, gray) for index in range(first.samplesperpixel)]
    else:
        parts = [(page, 0, gray) for page in pages]
    if plane is not None and len(parts) > 1:
        parts = parts[plane : plane + 1]
    if len(parts) == 4:
        parts = parts[:3]  # the fourth is alpha
    count = sum(samples.stop - samples.start for _, _, samples in parts)
    if count not in (1, 3):
        raise InputError(f"{path}: got {count} planes, expected a colour image or one plane")
    return [Tiles(*part, cache=_CACHE_BYTES // len(parts)) for part in parts]


class Tiles:
    """Tiles (or strips) of a page: `samples` of each pixel of a plane (0 unless planes are stored one after another).

    Decoded tiles of `cache` bytes are kept, at least two. Strips are decoded once for all readers of the file, if the
    disk has room for them; those without compression are not read but mapped.
    """

    def __init__(self, page: TiffPage, plane: int, samples: slice, *, cache: int) -> None:
        self._page, self._samples = page, samples
        self.samples = samples.stop - samples.start
        self._path = page.parent.filehandle.path
        self._name = f"of the level {page.imagewidth} x {page.imagelength} px"
        self._mapped = _mapped(page, plane, samples)
        self._width = page.tilewidth if page.is_tiled else page.imagewidth
        self._height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        self._across = -(-page.imagewidth // self._width)
        tiles = self._across * -(-page.imagelength // self._height)
        self._offset = plane * tiles
        there = min(len(page.dataoffsets), len(page.databytecounts))
        if there < self._offset + tiles:
            raise DamagedSlide(
                f"{self._path}: got {there} tiles {self._name}, expected {self._offset + tiles}; the file is damaged: "
                "get it again"
            )
        stored = page.samplesperpixel if page.planarconfig == 1 else 1
        tile_bytes = self._width * self._height * stored * np.dtype(page.dtype).itemsize
        if self._mapped is None:
            check_tile_bytes(self._path, self._name, tile_bytes)
        self._tables = page.jpegtables
        self._handle = page.parent.filehandle.fileno()
        self._decode = page.decode
        self._cached = functools.lru_cache(maxsize=max(2, cache // tile_bytes))(self._read_tile)
        self._key = (page.offset, plane, samples.start, samples.stop)

    @functools.cached_property
    def _strips(self) -> DecodedStrips | None:
        """Strips that all readers share; None for tiles, or if there is no room."""
        if self._page.is_tiled:
            return None
        shape = (self._page.imagelength, self._page.imagewidth, self.samples)
        return strips_of(Path(self._path), self._key, shape, np.dtype(self._page.dtype), self._height)

    def tile(self, row: int, column: int) -> NDArray[Any] | None:
        """Pixels (rows, columns, samples) of a tile; None if it is not in the file (empty glass)."""
        if self._strips is None:
            return self._cached(row, column)
        return self._strips.strip(row, functools.partial(self._read_tile, row, column))

    def close(self) -> None:
        """Forget the tiles that are kept."""
        self._cached.cache_clear()

    def fill(self, box: tuple[int, int, int, int], out: NDArray[Any]) -> None:
        """Write the pixels of a box (x0, y0, x1, y1) of the page to `out` (height, width, samples)."""
        x0, y0, x1, y1 = box
        if self._mapped is not None:
            out[...] = self._mapped[y0:y1, x0:x1]
            return
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
        """Decode a tile, see `tile`."""
        index = self._offset + row * self._across + column
        offset, count = self._page.dataoffsets[index], self._page.databytecounts[index]
        if not count:
            return None
        data = os.pread(self._handle, count, offset)
        try:
            if len(data) != count:
                raise ValueError(f"the file ends after {len(data)} of its {count} bytes")
            if self._page.compression in _IMAGES:
                width, height = _jpeg_size(data) or Image.open(io.BytesIO(data)).size
                if width > self._width or height > self._height:
                    raise ValueError(f"it holds {width} x {height} px, expected {self._width} x {self._height}")
            tile, _, shape = self._decode(data, index, jpegtables=self._tables)
        except Exception as error:  # each codec raises its own kind of exception
            raise InputError(
                f"{self._path}: the tile in row {row}, column {column} {self._name} cannot be decoded ({error}); the "
                "file is damaged: get it again"
            ) from error
        if tile is None:
            return None
        pixels: NDArray[Any] = tile.reshape(tile.shape[-3:])[: shape[1], : shape[2]]
        if self._page.compression == _YCBCR:
            size = (pixels.shape[1], pixels.shape[0])
            pixels = np.asarray(Image.frombytes("YCbCr", size, pixels[..., :3].tobytes()).convert("RGB"))
        return pixels[..., self._samples]


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that the frame header of a JPEG states, which Pillow takes longer to find; None if unknown."""
    place = 2
    while data[place : place + 1] == b"\xff":
        kind, length = data[place + 1 : place + 2], int.from_bytes(data[place + 2 : place + 4])
        if kind in (b"\xc0", b"\xc1", b"\xc2"):  # baseline, extended, progressive
            height, width = (int.from_bytes(data[place + at : place + at + 2]) for at in (5, 7))
            return width, height
        place += 2 + length
    return None


def _mapped(page: TiffPage, plane: int, samples: slice) -> NDArray[Any] | None:
    """Pixels (H, W, samples) of a plane as the file holds them; None if they are compressed, tiled or scattered."""
    if page.is_tiled or not page.is_final or sum(page.databytecounts) != page.nbytes:
        return None
    stored = page.samplesperpixel if page.planarconfig == 1 else 1
    shape = (page.imagelength, page.imagewidth, stored)
    dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    start = page.dataoffsets[0] + plane * math.prod(shape) * dtype.itemsize
    if start + math.prod(shape) * dtype.itemsize > page.parent.filehandle.size:
        return None  # cut: rows that are there can still be read
    pixels: NDArray[Any] = np.memmap(page.parent.filehandle.path, dtype, "r", start, shape)
    return pixels[..., samples]


def stated_pixel_size(file: TiffFile, page: TiffPage) -> tuple[float | None, float | None]:
    """Width and height of a pixel of a page in um, as the metadata (OME, Aperio) or the resolution tags state it."""
    text = file.pages.first.description or ""
    if "OME" in text[:2000] and "PhysicalSizeX" in text:
        return _ome_size(text, page)
    if text.startswith("Aperio"):
        stated = [number(found[1]) for found in re.finditer(r"\|\s*MPP\s*=\s*([^|]*)", text)]
        return (stated[0], stated[0]) if stated else (None, None)
    unit = {2: 25400.0, 3: 10000.0}.get(int(page.resolutionunit or 1))
    x, y = (page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution"))
    return (unit * x[1] / x[0], unit * y[1] / y[0]) if unit and x[0] and y[0] else (None, None)


def stated_objective(file: TiffFile) -> float | None:
    """Magnification of the objective as the metadata of Aperio state it; None if they do not."""
    text = file.pages.first.description or ""
    found = re.search(r"\|\s*AppMag\s*=\s*([^|]*)", text) if text.startswith("Aperio") else None
    return number(found[1]) if found else None


def _ome_size(text: str, page: TiffPage) -> tuple[float | None, float | None]:
    """Width and height of a pixel in um from the OME metadata of the image that has the size of a page."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None, None
    for pixels in root.iterfind(".//{*}Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == (str(page.imagewidth), str(page.imagelength)):
            return _um(pixels, "PhysicalSizeX"), _um(pixels, "PhysicalSizeY")
    return None, None


def _um(pixels: ElementTree.Element, key: str) -> float | None:
    unit, value = _UM_PER_UNIT.get(pixels.get(f"{key}Unit", "")), number(pixels.get(key))
    return None if unit is None or value is None else value * unit


def number(value: object) -> float | None:
    """Turn what a file states into a number; None if it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
