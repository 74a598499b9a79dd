"""Images: a damaged file is refused with its name by our own error, or gives regions of the size asked for.

Slides that OpenSlide alone knows are left out: on some damage its own libraries end the process.
"""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import damages, refused, tries

from celldetr.slides.pyramid import open_pyramid

HEIGHT, WIDTH, MOST = 37, 50, 200
IMAGE = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
KINDS = {
    "deflate": {"compression": "deflate", "predictor": True},
    "jpeg": {"compression": "jpeg"},
    "lzw": {"compression": "lzw"},
    "plain": {},
    "ome": {"compression": "deflate", "ome": True},
    "strips": {"tile": None},
}
FLAT = {"png": "PNG", "palette": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP"}


def write(path, compression=None, ome=False, **options):
    """Write an image of two levels with tiles of 16 px: half of the file is not pixels."""
    with tifffile.TiffWriter(path, ome=ome) as writer:
        same = {"photometric": "rgb", "tile": (16, 16), "compression": compression, **options}
        writer.write(IMAGE, subifds=1, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **same)
        writer.write(IMAGE[::2, ::2], subfiletype=1, **same)
    return path.read_bytes()


def write_flat(path, kind):
    """Write an image without tiles."""
    picture = Image.fromarray(IMAGE).quantize() if kind == "palette" else Image.fromarray(IMAGE)
    picture.save(path, FLAT[kind], exif=Image.Exif(), dpi=(101600, 101600))
    return path.read_bytes()


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    contents = {kind: write(folder / f"{kind}.tif", **options) for kind, options in KINDS.items()}
    return folder / "a.tif", contents | {kind: write_flat(folder / kind, kind) for kind in FLAT}


def read_all(path):
    """All levels of an image, the first MOST px of each side."""
    with open_pyramid(path) as image:
        assert image.mpp is None or 0.02 <= image.mpp <= 20
        regions = []
        for number, level in enumerate(image.levels):
            width, height = min(level.width, MOST), min(level.height, MOST)
            region = image.read(number, 0, 0, width, height)
            assert region.shape[:2] == (height, width)
            regions.append(region)
        return regions


@pytest.mark.parametrize("kind", [*KINDS, *FLAT])
@tries(80)
@given(damage=damages(), more=st.one_of(st.none(), damages()))
def test_damaged_images(wholes, kind, damage, more):
    path, contents = wholes
    content = damage(contents[kind])
    path.write_bytes(more(content) if more else content)
    error, _ = refused(read_all, path)
    assert error is None or str(path) in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images(wholes, kind):
    path, contents = wholes
    path.write_bytes(contents[kind])
    first, second = read_all(path)
    assert kind == "jpeg" or np.array_equal(first, IMAGE)
    assert second.shape == ((HEIGHT + 1) // 2, WIDTH // 2, 3)


@pytest.mark.parametrize("kind", FLAT)
def test_whole_flat_images(wholes, kind):
    path, contents = wholes
    path.write_bytes(contents[kind])
    (only,) = read_all(path)
    assert only.shape == IMAGE.shape
    assert kind not in ("png", "bmp") or np.array_equal(only, IMAGE)
