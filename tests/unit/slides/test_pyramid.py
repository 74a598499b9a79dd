"""Images read by region: whatever the layout, the pixels are those that were written, and damage is named."""

import struct
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import MagicMock

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_files import damage_tiles

from celldetr.runtime.errors import InputError
from celldetr.slides import pyramid, tiff
from celldetr.slides.damage import open_slide
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tiff import DamagedSlide

HEIGHT, WIDTH = 173, 259
TILE = {"tile": (64, 32)}
RGB = {"photometric": "rgb"}
PLANES = {"photometric": "minisblack"}


def write(path, levels, *, ome=False, subifds=True, metadata=None, **options):
    """Write levels as sub-images of the first page, or as pages that follow it."""
    with tifffile.TiffWriter(path, ome=ome) as writer:
        below = {"subifds": len(levels) - 1} if subifds else {}
        writer.write(levels[0], metadata=metadata, **below, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    return path


def halves(image, count=3):
    """Every second pixel, again and again, along the two axes that are neither colour nor of length 1."""
    levels = [image]
    for _ in range(count - 1):
        last = levels[-1]
        index = tuple(slice(None, None, 2) if side > 4 else slice(None) for side in last.shape)
        levels.append(np.ascontiguousarray(last[index]))
    return levels


IMAGE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
LAYOUTS = {
    "yxs": (IMAGE, {**RGB, **TILE}),
    "zyxs": (IMAGE[None], {**RGB, **TILE}),
    "planes in a page": (np.moveaxis(IMAGE, -1, 0), {**RGB, **TILE, "planarconfig": "separate"}),
    "pages of planes": (np.moveaxis(IMAGE, -1, 0), {**PLANES, **TILE}),
    "alpha": (np.dstack([IMAGE, IMAGE[..., :1]]), {**RGB, **TILE, "extrasamples": ["unassalpha"]}),
    "four pages of planes": (
        np.moveaxis(np.dstack([IMAGE, IMAGE[..., :1]]), -1, 0),
        {**PLANES, **TILE, "ome": True, "metadata": {"axes": "CYX"}},
    ),
    "strips": (IMAGE, {**RGB, "rowsperstrip": 17}),
    "one strip": (IMAGE, RGB),
    "deflate": (IMAGE, {**RGB, **TILE, "compression": "deflate", "predictor": True}),
    "pages of levels": (IMAGE, {**RGB, **TILE, "subifds": False}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_pixels_of_every_level(tmp_path, name):
    array, options = LAYOUTS[name]
    path = write(tmp_path / "he.tif", halves(array), **options)
    with open_pyramid(path) as image:
        assert (image.size, image.channels, image.dtype) == ((WIDTH, HEIGHT), 3, np.uint8)
        for index, (level, expected) in enumerate(zip(image.levels, halves(IMAGE), strict=True)):
            assert (level.width, level.height) == (expected.shape[1], expected.shape[0])
            assert level.downsample == 2**index  # 259 px become 130 and 65: rounded, and still two and four wide
            assert np.array_equal(image.read(index, 0, 0, level.width, level.height), expected)


FOREIGN = ("ImageJ=1.53t\nimages=3\nchannels=3\nunit=micron\n", '{"shape": [346, 518, 3]}')


@pytest.mark.parametrize("description", FOREIGN)
@pytest.mark.parametrize("subifds", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_descriptions_of_the_file_it_was_converted_from_do_not_matter(tmp_path, description, subifds, separate):
    array, options = LAYOUTS["planes in a page" if separate else "yxs"]
    options = {**options, "description": description, "subifds": subifds}
    with open_pyramid(write(tmp_path / "he.tif", halves(array), **options)) as image:
        assert [level.downsample for level in image.levels] == [1, 2, 4]
        assert np.array_equal(image.read(2, 0, 0, 65, 44), IMAGE[::4, ::4])


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    with open_pyramid(write(tmp_path_factory.mktemp("p") / "he.tif", [IMAGE], **RGB, **TILE)) as image:
        yield image


@settings(max_examples=60, deadline=None)
@given(x=st.integers(-80, 330), y=st.integers(-80, 240), width=st.integers(1, 200), height=st.integers(1, 200))
def test_regions_are_cut_exactly_and_white_outside(tiled, x, y, width, height):
    wide = np.pad(IMAGE, ((500, 500), (500, 500), (0, 0)), constant_values=255)
    expected = wide[500 + y : 500 + y + height, 500 + x : 500 + x + width]
    assert np.array_equal(tiled.read(0, x, y, width, height), expected)


def test_single_planes_are_grey_and_zero_outside(tmp_path):
    stack = np.random.default_rng(1).integers(0, 60000, (4, HEIGHT, WIDTH), dtype=np.uint16)
    options = {**PLANES, **TILE, "compression": "jpeg2000"}  # as Xenium stores them
    path = write(tmp_path / "m.ome.tif", halves(stack, 2), ome=True, metadata={"axes": "CYX"}, **options)
    for plane in (0, 2):
        with open_pyramid(path, 0.2125, plane=plane) as image:
            assert (image.channels, image.dtype, image.background, image.mpp) == (1, np.uint16, 0, 0.2125)
            assert np.array_equal(image.read(0, 0, 0, WIDTH, HEIGHT), stack[plane])
            assert np.array_equal(image.read(1, 0, 0, 50, 40), stack[plane, ::2, ::2][:40, :50])
            assert not image.read(0, WIDTH, 0, 5, 5).any()


def test_tiles_that_are_left_out_are_background(tmp_path):
    image = np.full((128, 128, 3), 255, np.uint8)
    image[:64, :32] = 7
    tiles = (image[y : y + 64, x : x + 32] if y == x == 0 else None for y in (0, 64) for x in range(0, 128, 32))
    with tifffile.TiffWriter(tmp_path / "he.tif") as writer:
        writer.write(tiles, shape=image.shape, dtype=np.uint8, compression="deflate", **RGB, **TILE)
    with open_pyramid(tmp_path / "he.tif") as found:
        assert np.array_equal(found.read(0, 0, 0, 128, 128), image)


@pytest.mark.parametrize("name", ["strips", "one strip", "planes"])
def test_strips_without_compression_may_be_larger_than_memory_for_a_tile(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tiff, "_TILE_BYTES", 99)
    image, options = {
        **LAYOUTS,
        "planes": (np.moveaxis(IMAGE, -1, 0), {**RGB, "planarconfig": "separate"}),
    }[name]
    for order in "<>":
        tifffile.imwrite(tmp_path / "he.tif", image, byteorder=order, **options)
        with open_pyramid(tmp_path / "he.tif") as found:
            assert np.array_equal(found.read(0, -9, 40, 100, 90)[:, 9:], IMAGE[40:130, :91])
            assert np.array_equal(found.read(0, 0, 0, WIDTH, HEIGHT), IMAGE)
    deep = np.random.default_rng(1).integers(0, 60000, (HEIGHT, WIDTH), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", deep, byteorder=">", photometric="minisblack")
    with open_pyramid(tmp_path / "deep.tif", plane=0) as found:
        assert np.array_equal(found.read(0, 0, 0, WIDTH, HEIGHT), deep)


@pytest.mark.parametrize("planes", [False, True])
def test_compressed_strips_are_decoded_once_for_all_readers(tmp_path, monkeypatch, planes):
    image, more = (np.moveaxis(IMAGE, -1, 0), {"planarconfig": "separate"}) if planes else (IMAGE, {})
    path = tmp_path / "he.tif"
    tifffile.imwrite(path, image, rowsperstrip=17, compression="deflate", **RGB, **more)
    calls, decode = [], tiff.Tiles._read_tile
    monkeypatch.setattr(tiff.Tiles, "_read_tile", lambda *given: calls.append(given[1:]) or decode(*given))

    def read(_):
        with open_pyramid(path) as found:
            return [np.array_equal(found.read(0, x, y, 99, 50), IMAGE[y : y + 50, x : x + 99])
                    for y in (0, 123, 60) for x in (0, 90, 160)]  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        assert np.all(list(pool.map(read, range(8))))
    assert len(calls) == (3 if planes else 1) * 11
    tifffile.imwrite(path, 255 - image, rowsperstrip=17, compression="deflate", **RGB, **more)
    with open_pyramid(path) as found:
        assert np.array_equal(found.read(0, 0, 0, WIDTH, HEIGHT), 255 - IMAGE)


def test_compressed_strips_are_read_on_a_full_disk_and_damaged_ones_are_named(tmp_path, monkeypatch):
    path = tmp_path / "he.tif"
    tifffile.imwrite(path, IMAGE, rowsperstrip=17, compression="deflate", **RGB)
    with monkeypatch.context() as patched:
        patched.setattr("celldetr.slides.decoded.on_disk", MagicMock(side_effect=OSError))
        with open_pyramid(path) as found:
            assert np.array_equal(found.read(0, 0, 0, WIDTH, HEIGHT), IMAGE)
    damage_tiles(path, [(0, 3)])
    with open_pyramid(path) as found:
        for _ in range(2):
            with pytest.raises(InputError, match=r"he\.tif: the tile in row 3, column 0 .* cannot be decoded"):
                found.read(0, 0, 60, 9, 9)
        assert np.array_equal(found.read(0, 0, 0, WIDTH, 51), IMAGE[:51])


def write_tiles(path, images, **options):
    """Write a page of compressed tiles of 64 x 64 px, row by row."""
    with tifffile.TiffWriter(path) as writer:
        writer.write(iter(images), shape=(128, 128, 3), dtype=np.uint8, tile=(64, 64), metadata=None, **options)
    return path


def test_ycbcr_of_jpeg_and_of_jpeg_2000_become_rgb(tmp_path):
    y, x = np.mgrid[:128, :128]
    smooth = np.stack([100 + x / 3, 200 - y / 3, 120 + (x + y) / 5], axis=-1).astype(np.uint8)
    luma = np.asarray(Image.fromarray(smooth).convert("YCbCr"))  # tifffile does not convert
    jpeg = {"tile": (64, 64), "compression": "jpeg", "compressionargs": {"level": 95}}
    tiles = [imagecodecs.jpeg2k_encode(luma[y : y + 64, x : x + 64], level=0, mct=False, codecformat="j2k")
             for y in (0, 64) for x in (0, 64)]  # fmt: skip
    paths = [
        write(tmp_path / "rgb.tif", [smooth], **jpeg, **RGB),
        write(tmp_path / "ycbcr.tif", [luma], **jpeg, photometric="ycbcr", subsampling=(2, 2)),
        write_tiles(tmp_path / "2000.tif", tiles, compression=33003, photometric="ycbcr"),
    ]
    for path in paths:
        with open_pyramid(path) as image:
            assert np.abs(image.read(0, 0, 0, 128, 128).astype(int) - smooth).mean() < 2


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((99, 99, 4), {"photometric": "separated"}, "SEPARATED with compression NONE, expected RGB"),
        ((99, 99, 3), {"photometric": "cielab"}, "CIELAB"),
        ((99, 99, 3), {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "deflate"}, "YCBCR.*DEFLATE"),
        ((99, 99), {"photometric": "miniswhite"}, "MINISWHITE"),
        ((99, 99, 3), {"photometric": "rgb", "compression": "jpegxl"}, "JPEGXL"),
    ],
)
def test_colours_that_are_not_converted_are_refused_by_name(tmp_path, shape, options, message):
    path = write(tmp_path / "he.tif", [np.zeros(shape, np.uint8)], **TILE, **options)
    with pytest.raises(InputError, match=rf"he\.tif: got colours.*{message}") as caught:
        open_pyramid(path)
    assert not isinstance(caught.value, DamagedSlide)


def test_tiles_that_fill_the_memory_are_refused_before_they_are_decoded(tmp_path):
    tile = bytearray(imagecodecs.jpeg8_encode(np.zeros((64, 64, 3), np.uint8)))
    frame = tile.index(b"\xff\xc0")
    tile[frame + 5 : frame + 9] = struct.pack(">HH", 9000, 9000)
    path = write_tiles(tmp_path / "jpeg.tif", [bytes(tile)] * 4, compression="jpeg", photometric="ycbcr")
    with open_pyramid(path) as image, pytest.raises(InputError, match="it holds 9000 x 9000 px, expected 64 x 64"):
        image.read(0, 0, 0, 9, 9)
    for kind, description in (("tif", None), ("svs", "Aperio Image Library v11.2.1")):
        more = {"compression": "jpeg", "description": description, "tile": (16, 16)}
        path = write(tmp_path / f"large.{kind}", [IMAGE], **RGB, **more)
        with tifffile.TiffFile(path, mode="r+b") as file:
            for name in ("TileWidth", "TileLength"):
                file.pages[0].tags[name].overwrite(16_384)
        with pytest.raises(InputError, match=rf"large\.{kind}: .* takes (0\.8|1\.0) GiB, expected at most 0\.5"):
            open_pyramid(path)


def test_a_damaged_tile_is_named_and_the_others_are_read(tmp_path):
    path = write(tmp_path / "he.tif", [IMAGE], compression="deflate", **RGB, **TILE)
    damage_tiles(path, [(0, -(-WIDTH // 32) + 2)])
    with open_pyramid(path) as image:
        assert np.array_equal(image.read(0, 0, 0, WIDTH, 64), IMAGE[:64])
        with pytest.raises(InputError, match=f"he.tif: the tile in row 1, column 2 of the level {WIDTH} x {HEIGHT}"):
            image.read(0, 64, 64, 10, 10)


def test_files_that_are_no_images_are_refused(tmp_path):
    whole = write(tmp_path / "he.tif", [IMAGE], **RGB, **TILE).read_bytes()
    with pytest.raises(InputError, match="no such file"):
        open_pyramid(tmp_path / "none.tif")
    for name, data in (("text.tif", b"no image" * 20), ("empty.tif", b""), ("stub.tif", whole[:6])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DamagedSlide, match=name):
            open_pyramid(tmp_path / name)
    (tmp_path / "web.svs").write_bytes(b"<!DOCTYPE html>\n<HTML><body>Log in</body></HTML>")
    with pytest.raises(DamagedSlide, match=r"web\.svs: .*it is a web page \(HTML\)"):
        open_pyramid(tmp_path / "web.svs")
    Image.fromarray(IMAGE).save(tmp_path / "he.gif")
    with pytest.raises(DamagedSlide, match=r"he\.gif: .*others must be converted"):
        open_pyramid(tmp_path / "he.gif")
    turned = write(tmp_path / "turned.tif", [IMAGE], **RGB, **TILE, extratags=[(274, "H", 1, 6)])
    with pytest.raises(InputError, match=r"turned or mirrored \(orientation 6\)"):
        open_pyramid(turned)
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.tif"), open_pyramid(tmp_path / "cut.tif") as image:
        image.read(0, 0, 0, WIDTH, HEIGHT)
    two = write(tmp_path / "two.tif", [np.zeros((2, 99, 99), np.uint8)], **PLANES, **TILE)
    with pytest.raises(InputError, match="got 2 planes"):
        open_pyramid(two)
    deep = write(tmp_path / "deep.tif", [IMAGE.astype(np.uint16)], **RGB, **TILE)
    with pytest.raises(InputError, match="uint16, expected uint8"):
        open_pyramid(deep)
    for kind in (np.float32, np.int16):
        plane = write(tmp_path / "plane.tif", [np.zeros((99, 99), kind)], **PLANES, **TILE)
        with pytest.raises(InputError, match=f"plane.tif: got a plane of type {np.dtype(kind)}, expected uint8"):
            open_pyramid(plane, plane=0)


def ome(sizes, first=""):
    images = f'{first}<Image><Pixels SizeX="{WIDTH}" SizeY="{HEIGHT}" {sizes}/></Image>'
    return {"description": f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{images}</OME>'.encode()}


def centimetre(x, y):
    return {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}


MACRO = '<Image><Pixels SizeX="240" SizeY="80" PhysicalSizeX="16" PhysicalSizeY="16"/></Image>'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ome('PhysicalSizeX="0.2738"'), 0.2738),
        (ome('PhysicalSizeX="0.2738" PhysicalSizeXUnit="µm"'), 0.2738),
        (ome('PhysicalSizeX="273.8" PhysicalSizeXUnit="nm"'), 0.2738),
        (ome('PhysicalSizeX="0.2738" PhysicalSizeY="0.2738"', MACRO), 0.2738),
        (ome("", MACRO), None),
        (ome('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"'), None),
        (ome('PhysicalSizeX=""'), None),
        (ome('PhysicalSizeX="0,25" PhysicalSizeY="0,25"'), None),
        (ome(""), None),
        (centimetre(0.5, 0.505), 0.5),
        ({"resolution": (25400 / 0.25, 25400 / 0.25), "resolutionunit": "INCH"}, 0.25),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # of a printer
        ({"resolution": (4, 4), "resolutionunit": "NONE"}, None),
        ({}, None),
    ],
)
def test_pixel_sizes_are_read_in_every_unit(tmp_path, options, expected):
    path = write(tmp_path / "he.tif", [IMAGE], **RGB, **TILE, **options)
    with open_pyramid(path) as image:
        assert image.mpp == (None if expected is None else pytest.approx(expected, rel=1e-4))
    with open_pyramid(path, 0.3) as image:
        assert image.mpp == 0.3


@pytest.mark.parametrize(
    "options", [ome('PhysicalSizeX="0.25" PhysicalSizeY="0.5"'), centimetre(0.25, 0.5), centimetre(0.25, 0.256)]
)
def test_pixels_that_are_not_square_are_refused_unless_a_size_is_given(tmp_path, options):
    path = write(tmp_path / "he.tif", [IMAGE], **RGB, **TILE, **options)
    with pytest.raises(InputError, match=r"pixels of 0\.25 x 0\.\d+ um, expected square ones"):
        open_pyramid(path)
    with open_pyramid(path, 0.25) as image:
        assert image.mpp == 0.25


@pytest.mark.parametrize("axes", ["ZYXS", "TYXS"])
@pytest.mark.parametrize("subifds", [True, False])
def test_one_of_several_focal_planes_is_not_taken_without_a_word(tmp_path, axes, subifds):
    stack = np.stack([IMAGE, 255 - IMAGE, IMAGE])
    options = {"ome": True, "metadata": {"axes": axes}, **RGB, **TILE}
    path = write(tmp_path / "he.ome.tif", halves(stack, 2) if subifds else [stack], **options)
    with pytest.raises(InputError, match=rf"he\.ome\.tif: got 3 colour images of {WIDTH} x {HEIGHT} px \(a stack"):
        open_pyramid(path)


def test_the_slide_is_the_largest_image_of_the_file(tmp_path):
    with tifffile.TiffWriter(tmp_path / "he.tif") as writer:
        writer.write(IMAGE[::9, ::9].copy(), **RGB)  # a thumbnail in strips
        writer.write(np.zeros((40, 120, 3), np.uint8), **RGB, **TILE, **centimetre(16, 16))  # the whole glass
        for level in halves(IMAGE):
            writer.write(level, **RGB, **TILE, **(centimetre(0.5, 0.5) if level is IMAGE else {}))
    with open_pyramid(tmp_path / "he.tif") as image:
        assert (image.size, image.mpp) == ((WIDTH, HEIGHT), pytest.approx(0.5))
        assert [level.downsample for level in image.levels] == [1, 2, 4]
        assert np.array_equal(image.read(0, 0, 0, WIDTH, HEIGHT), IMAGE)


def test_the_coarsest_level_that_is_fine_enough_is_chosen(tmp_path):
    with open_pyramid(write(tmp_path / "he.tif", halves(IMAGE), **RGB, **TILE)) as image:
        wanted = [(0.5, 0), (1, 0), (1.9, 0), (2, 1), (3.9, 1), (4, 2), (100, 2)]
        assert [image.level_for(downsample) for downsample, _ in wanted] == [level for _, level in wanted]


def test_aperio_slides_are_read_as_by_openslide(tmp_path, monkeypatch):
    y, x = np.mgrid[:1403, :1807]
    smooth = np.stack([60 + x / 12, 230 - y / 12, 90 + (x + y) / 30], axis=-1).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.svs") as writer:
        for level in (smooth, smooth[2::4, 2::4]):
            text = "Aperio Image Library v11.2.1|AppMag = 20|MPP = 0.2521"
            jpeg = {"compression": "jpeg", "compressionargs": {"level": 98}}
            writer.write(level, tile=(64, 64), description=text, metadata=None, **jpeg, **RGB)
    wholes = []
    for expected in ("_Tiff", "_Slide"):
        with open_pyramid(tmp_path / "slide.svs") as image:
            assert type(image).__name__ == expected
            assert image.mpp == pytest.approx(0.2521)
            assert [level.downsample for level in image.levels] == [1, 4]
            whole = image.read(0, 0, 0, *image.size)
            assert np.abs(whole.astype(int) - smooth).mean() < 2
            assert np.array_equal(image.read(0, 311, 207, 100, 90), whole[207:297, 311:411])
            outside = image.read(0, -10, -10, 20, 20)
            assert (outside[:10] == 255).all()
            assert np.array_equal(outside[10:, 10:], whole[:10, :10])
            far = image.read(1, 400, 300, 30, 30).astype(int)  # at the far end rounded sizes would be pixels off
            assert np.abs(far - smooth[2::4, 2::4][300:330, 400:430]).mean() < 2
            wholes.append(whole)
        refuse = MagicMock(side_effect=InputError("tiles that tifffile does not read"))
        monkeypatch.setattr(pyramid, "_Tiff", refuse)
    assert np.array_equal(*wholes)


def test_the_origin_is_the_corner_of_what_was_scanned(tmp_path, monkeypatch):
    corner = {"openslide.bounds-x": "300", "openslide.bounds-y": "170"}
    scanned = SimpleNamespace(
        properties=corner, level_dimensions=[(900, 800)], level_downsamples=[1.0], level_count=1, close=lambda: None
    )
    monkeypatch.setattr(pyramid.openslide, "OpenSlide", OpenSlide := MagicMock(return_value=scanned))
    OpenSlide.detect_format.return_value = "mirax"
    (tmp_path / "a.mrxs").touch()
    for skip in (False, True):
        with open_slide(tmp_path / "a.mrxs", 0.25, "a", skip=skip) as image:
            assert image.origin == (300, 170)


def test_a_level_of_an_aperio_slide_without_a_tile_shows_the_finer_one(tmp_path):
    path = tmp_path / "slide.svs"
    with tifffile.TiffWriter(path) as writer:
        for side in (1024, 512):
            pixels = np.full((side, side, 3), 90, np.uint8)
            text = "Aperio Image Library v11.2.1|AppMag = 20|MPP = 0.25"
            writer.write(
                pixels, photometric="rgb", compression="jpeg", tile=(256, 256), description=text, metadata=None
            )
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages[1].databytecounts
        file.pages[1].tags["TileByteCounts"].overwrite((*counts[:3], 0))
    with open_pyramid(path) as image:
        assert abs(image.read(1, 0, 0, 512, 512).astype(int) - 90).max() <= 2


def test_a_pixel_size_that_contradicts_the_file_is_named(tmp_path, caplog):
    pixels = np.full((64, 64, 3), 200, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, resolution=(40000, 40000), resolutionunit="CENTIMETER")
    for mpp, said in ((0.2505, False), (0.5, True)):
        caplog.clear()
        open_slide(tmp_path / "a.tif", mpp, "s").close()
        assert ("taken to be 0.5 um, as given, but the file says 0.25 um" in caplog.text) == said
        assert bool(caplog.text) == said


@pytest.mark.parametrize("missing", [False, True], ids=["by tifffile", "by OpenSlide"])  # which draws missing tiles
def test_a_given_pixel_size_is_compared_with_the_objective_if_the_file_states_none(tmp_path, caplog, missing):
    path, pixels = tmp_path / "slide.svs", np.full((512, 512, 3), 90, np.uint8)
    how = {"photometric": "rgb", "compression": "jpeg", "tile": (256, 256), "metadata": None}
    for stated, told in (("", (0.25, 1.0)), ("|MPP = 0.25", ())):  # a file's own um per px goes before the objective
        tifffile.imwrite(path, pixels, description=f"Aperio Image Library v11.2.1|AppMag = 20{stated}", **how)
        if missing:
            with tifffile.TiffFile(path, mode="r+b") as file:
                counts = file.pages[0].tags["TileByteCounts"]
                counts.overwrite((*counts.value[:3], 0))
        for mpp in (0.25, 0.45, 0.5, 0.55, 1.0):
            caplog.clear()
            open_slide(path, mpp, "s").close()
            said = f"taken to be {mpp:g} um, as given (column mpp or --mpp), but the file names an objective of 20x"
            assert (said in caplog.text and "about 0.5 um" in caplog.text) == (mpp in told)
    tifffile.imwrite(path, pixels, description="Aperio Image Library v11.2.1|AppMag = 20", **how)
    with pytest.raises(InputError, match=r"0\.5 for 20x \(the file names 20x\)"):
        open_slide(path, None, "s")
