"""Images without tiles and levels: PNG, JPEG, WebP, BMP and JPEG 2000.

They are decoded once, as a whole, to a temporary file.
"""

import functools
import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from celldetr.runtime.errors import InputError
from celldetr.slides.decoded import MOST_PIXELS, on_disk
from celldetr.slides.tiff import DamagedSlide, check_orientation

FLAT = "PNG, JPEG, WebP, BMP or JPEG 2000"
"""Formats, for errors."""
_MOST_PIXELS_2000 = 2**28  # the decoder of JPEG 2000 holds 12 bytes per pixel in memory
_CONVERT = "convert the image (e.g. vips tiffsave --tile --pyramid --compression jpeg)"
_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000; the depth of its first samples follows after 42 bytes
_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "F")


class _Format(NamedTuple):
    name: str
    magic: bytes
    header: Callable[..., ImageFile]  # Pillow's own check of the size refuses a slide, so that its `open` does not fit
    decode: Callable[..., NDArray[np.uint8]]
    most_pixels: int = MOST_PIXELS


_FORMATS = (
    _Format("PNG", b"\x89PNG\r\n\x1a\n", PngImageFile, imagecodecs.png_decode),
    _Format("JPEG", b"\xff\xd8\xff", JpegImageFile, imagecodecs.jpeg8_decode),
    _Format("WebP", b"RIFF", WebPImageFile, imagecodecs.webp_decode),
    _Format("BMP", b"BM", BmpImageFile, imagecodecs.bmp_decode),
    _Format("JPEG 2000", b"\0\0\0\x0cjP  ", Jpeg2KImageFile, imagecodecs.jpeg2k_decode, _MOST_PIXELS_2000),
    _Format("JPEG 2000", _CODESTREAM, Jpeg2KImageFile, imagecodecs.jpeg2k_decode, _MOST_PIXELS_2000),
)


class FlatImage(NamedTuple):
    """A decoded image."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), or (H, W, 4) with alpha, mapped from a file."""
    um: tuple[float | None, float | None]
    """Width and height of a pixel in um, as the file states it for printing."""


def is_flat(path: Path) -> bool:
    """Whether a file is an image of these formats, by its first bytes."""
    return _format(path) is not None


def _format(path: Path) -> _Format | None:
    with path.open("rb") as file:
        start = file.read(8)
    return next((one for one in _FORMATS if start.startswith(one.magic)), None)


def read_flat(path: Path) -> FlatImage:
    """Decode an image, or return the last one if it is the same file.

    Raises
    ------
    DamagedSlide
        It cannot be decoded.
    InputError
        It is not in 8-bit colour, is too large, would be shown turned, or the disk is full.
    """
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)  # threads and steps open one image again and again
def _read(path: Path, time: int, size: int) -> FlatImage:
    kind = _format(path)
    assert kind is not None
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            shape, um = _read_header(path, kind, file, _bits(kind, data))
            if kind.name == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
                raise ValueError("it has no end")  # the decoder would fill up with gray
            pixels = _on_disk(path, shape)
            kind.decode(data, out=pixels)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # each codec raises its own kinds of exception
        raise DamagedSlide(f"{path}: cannot be read as {kind.name}: {error}; is the file complete?") from error
    pixels.flags.writeable = False
    return FlatImage(pixels, um)


def _bits(kind: _Format, data: mmap.mmap) -> int:
    """Bits of a sample."""
    if kind.name == "JPEG 2000":
        if (start := data.find(_CODESTREAM)) < 0:
            raise ValueError("it has no image")
        return (data[start + 42] & 0x7F) + 1
    return data[24] if kind.name == "PNG" else 8


def _read_header(
    path: Path, kind: _Format, file: Any, bits: int
) -> tuple[tuple[int, int, int], tuple[float | None, float | None]]:
    """Return the shape (H, W, 3 or 4), and the size of a pixel in um."""
    image = kind.header(file)
    width, height = image.size
    if width * height > kind.most_pixels:
        raise InputError(
            f"{path}: got {width} x {height} px, {3 * width * height / 2**30:.3g} GiB when decoded, expected at most "
            f"{kind.most_pixels / 1e6:.0f} million px in a {kind.name}; {_CONVERT}"
        )
    if image.mode in _GRAY:
        raise InputError(f"{path}: got a gray image, expected colour (H&E)")
    if image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA"):
        raise InputError(
            f"{path}: got colours {image.mode}, expected RGB; convert the image with its profile (e.g. vips "
            "icc_transform IN OUT srgb)"
        )
    if bits > 8:
        raise InputError(f"{path}: got colour of {bits} bit a channel, expected 8; convert the image (e.g. vips cast)")
    # PngImageFile's own getexif would load the image
    check_orientation(path, Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    alpha = image.mode in ("RGBA", "PA") or "transparency" in image.info
    x, y = (25400 / dots if dots else None for dots in image.info.get("dpi", (0, 0)))
    return (height, width, 4 if alpha else 3), (x, y)


def _on_disk(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        return on_disk(shape, np.uint8)
    except OSError as error:
        raise InputError(
            f"{path}: decoded it takes {np.prod(shape) / 2**30:.3g} GiB in {tempfile.gettempdir()}: {error.strerror}; "
            f"set TMPDIR to a larger folder, or {_CONVERT}"
        ) from error
