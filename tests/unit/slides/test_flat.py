"""PNG, JPEG, WebP, BMP and JPEG 2000: the pixels that other programs show, or one sentence that says why not."""

import errno
import os
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from celldetr.runtime.errors import InputError
from celldetr.slides import flat
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tiff import DamagedSlide

HEIGHT, WIDTH = 173, 259
y, x = np.mgrid[:HEIGHT, :WIDTH]
IMAGE = np.stack([60 + x / 3, 230 - y / 2, 90 + (x + y) / 5], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(IMAGE)
ALPHA = np.where(x < 40, 0, np.where(x < 80, 127, 255)).astype(np.uint8)
SEEN_THROUGH = np.rint(255 + (IMAGE - 255.0) * ALPHA[..., None] / 255)
KEYED = (IMAGE == (60, 230, 90)).all(axis=-1, keepdims=True)
TURNED = Image.Exif()
TURNED[274] = 6


def seen(path):
    with open_pyramid(path) as image:
        assert (image.size, image.channels, len(image.levels)) == ((WIDTH, HEIGHT), 3, 1)
        return image.read(0, 0, 0, *image.size).astype(int)


@pytest.mark.parametrize(
    ("name", "picture", "options", "expected", "error"),
    [
        ("he.png", PICTURE, {}, IMAGE, 0),
        ("he.jpg", PICTURE, {"quality": 98}, IMAGE, 3),
        ("progressive.jpg", PICTURE, {"quality": 98, "progressive": True, "keep_rgb": True}, IMAGE, 3),
        ("he.webp", PICTURE, {"lossless": True}, IMAGE, 0),
        ("he.bmp", PICTURE, {}, IMAGE, 0),
        ("he.jp2", PICTURE, {}, IMAGE, 0),
        ("he.j2k", PICTURE, {"mct": 1, "tile_size": (64, 64)}, IMAGE, 0),
        ("alpha.jp2", Image.fromarray(np.dstack([IMAGE, ALPHA])), {}, SEEN_THROUGH, 1),
        ("palette.png", PICTURE.quantize(256), {}, np.asarray(PICTURE.quantize(256).convert("RGB")), 0),
        ("alpha.png", Image.fromarray(np.dstack([IMAGE, ALPHA])), {}, SEEN_THROUGH, 1),
        ("alpha.webp", Image.fromarray(np.dstack([IMAGE, ALPHA])), {"lossless": True, "exact": True}, SEEN_THROUGH, 1),
        ("key.png", PICTURE, {"transparency": (60, 230, 90)}, np.where(KEYED, 255, IMAGE), 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_are_those_that_are_seen(tmp_path, name, picture, options, expected, error):
    picture.save(tmp_path / name, **options)
    found = seen(tmp_path / name)
    assert np.abs(found - expected).max() <= error
    with open_pyramid(tmp_path / name, 0.25) as image:
        part = image.read(0, -10, 150, 100, 90)
    assert np.array_equal(part[:23, 10:], found[150:, :90])
    assert (part[23:] == 255).all()
    assert (part[:, :10] == 255).all()


@pytest.mark.parametrize(
    ("name", "picture", "options", "message"),
    [
        ("he.png", PICTURE.convert("L"), {}, "gray image, expected colour"),
        ("he.png", PICTURE.convert("LA"), {}, "gray image, expected colour"),
        ("he.png", PICTURE.convert("I;16"), {}, "gray image, expected colour"),
        ("he.jpg", PICTURE.convert("L"), {}, "gray image, expected colour"),
        ("he.jp2", PICTURE.convert("L"), {}, "gray image, expected colour"),
        ("he.jpg", PICTURE.convert("CMYK"), {}, "colours CMYK, expected RGB"),
        ("he.jpg", PICTURE, {"exif": TURNED}, r"turned or mirrored \(orientation 6\)"),
        ("he.png", PICTURE, {"exif": TURNED}, r"turned or mirrored \(orientation 6\)"),
        ("he.png", PICTURE, {"dpi": (101600, 50800)}, r"pixels of 0\.25 x 0\.5 um, expected square"),
    ],
)
def test_what_would_be_seen_otherwise_is_refused(tmp_path, name, picture, options, message):
    picture.save(tmp_path / name, **options)
    with pytest.raises(InputError, match=rf"{name}: .*{message}") as caught:
        open_pyramid(tmp_path / name)
    assert not isinstance(caught.value, DamagedSlide)


@pytest.mark.parametrize(
    ("name", "dots", "expected"),
    [("a.png", 101600, 0.25), ("a.jpg", 50800, 0.5), ("a.png", 4800, None), ("a.jpg", 300, None), ("a.bmp", 96, None)],
)
def test_a_resolution_that_printers_have_is_no_pixel_size(tmp_path, name, dots, expected):
    PICTURE.save(tmp_path / name, dpi=(dots, dots))
    with open_pyramid(tmp_path / name) as image:
        assert image.mpp == (expected and pytest.approx(expected, rel=1e-3))
    with open_pyramid(tmp_path / name, 0.3) as image:
        assert image.mpp == 0.3


@pytest.mark.parametrize("name", ["he.png", "he.jpg", "he.webp", "he.bmp", "he.jp2", "he.j2k"])
def test_files_that_are_cut_are_refused(tmp_path, name):
    PICTURE.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (12, len(whole) // 2, len(whole) - 20):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(DamagedSlide, match=rf"{name}: cannot be read as .*is the file complete"):
            open_pyramid(tmp_path / name)


def test_sixteen_bits_bombs_and_planes_are_refused(tmp_path):
    path = tmp_path / "he.png"
    path.write_bytes(imagecodecs.png_encode(IMAGE.astype(np.uint16) * 16))
    with pytest.raises(InputError, match=r"he\.png: got colour of 16 bit a channel, expected 8"):
        open_pyramid(path)
    for name in ("jp2", "j2k"):
        deep = imagecodecs.jpeg2k_encode(IMAGE.astype(np.uint16) * 16, bitspersample=12, level=0, codecformat=name)
        (tmp_path / name).write_bytes(deep)
        with pytest.raises(InputError, match=f"{name}: got colour of 12 bit a channel, expected 8"):
            open_pyramid(tmp_path / name)
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 90_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT\0\0\0\0"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(InputError, match=r"got 100000 x 90000 px, 25\.1 GiB when decoded, expected at most 2147 milli"):
        open_pyramid(path)
    PICTURE.save(path)
    with pytest.raises(InputError, match="expected a TIFF or OME-TIFF with planes"):
        open_pyramid(path, plane=0)


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "he.png")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"he\.png: decoded it takes .*No space left on device; set TMPDIR"):
        open_pyramid(tmp_path / "he.png")


def test_an_image_is_decoded_once_until_it_changes(tmp_path, monkeypatch):
    calls = []
    original = flat._on_disk
    monkeypatch.setattr(flat, "_on_disk", lambda *shape: calls.append(shape) or original(*shape))
    path = tmp_path / "he.png"
    PICTURE.save(path)
    with open_pyramid(path) as first, open_pyramid(path) as second:
        assert np.array_equal(first.read(0, 5, 5, 9, 9), second.read(0, 5, 5, 9, 9))
    assert np.array_equal(seen(path), IMAGE)
    assert len(calls) == 1
    Image.fromarray(IMAGE[::-1]).save(path)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(seen(path), IMAGE[::-1])
