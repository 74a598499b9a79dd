"""Slides to patches: the right boxes, nothing guessed, damage named and counted."""

import base64
import functools
import io
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from named_inputs import files, job_with
from PIL import Image
from slide_files import damage_tiles

import choose_slide_patches
import extract_slide
from celldetr.runtime.errors import InputError
from celldetr.runtime.rule import run_rule
from celldetr.slides import pyramid
from celldetr.slides.damage import open_slide
from celldetr.slides.tiff import DamagedSlide
from celldetr.store import open_store
from celldetr.store.splits import read_split

MPP = 0.5
RULES = {"min_nuclei": 1, "min_tissue": 0.25}
RNG = np.random.default_rng(0)
CENTRES = RNG.uniform(140, 620, (400, 2))
SHAPES = shapely.buffer(shapely.points(CENTRES), RNG.uniform(5, 9, 400))


@functools.cache
def drawn():
    """Draw pink tissue with dark nuclei in white glass."""
    noise = np.random.default_rng(1).integers(-12, 13, (768, 768, 1))
    image = np.full((768, 768, 3), 244.0)
    image[128:640, 128:640] = (215, 150, 195)
    for (cx, cy), shape in zip(CENTRES, SHAPES, strict=True):
        radius = np.sqrt(shape.area / np.pi)
        y, x = np.mgrid[int(cy) - 10 : int(cy) + 12, int(cx) - 10 : int(cx) + 12]
        inside = (x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 <= radius**2
        image[y[inside], x[inside]] = (90, 60, 150)
    return np.clip(image + noise, 0, 255)


def write_slide(path, *, mpp=MPP, levels=2, damage=(), aperio=False):
    """Write the drawn slide as a pyramid; damage: (level, tile) to overwrite."""
    image = drawn()
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            more = {"compression": "deflate", "subfiletype": int(level > 0)}
            if aperio:
                more |= {"compression": "jpeg", "description": f"Aperio Image Library v1|AppMag = 20|MPP = {mpp}"}
            if mpp is not None:
                more |= {"resolution": (1e4 / mpp / 2**level,) * 2, "resolutionunit": "CENTIMETER"}
            writer.write(np.rint(image).astype(np.uint8), tile=(64, 64), photometric="rgb", metadata=None, **more)
            image = image.reshape(len(image) // 2, 2, len(image) // 2, 2, 3).mean(axis=(1, 3))
    return damage_tiles(path, damage)


def write_outlines(path, shapes=SHAPES):
    pd.DataFrame({"geometry": shapely.to_wkb(list(shapes))}).to_parquet(path)
    return path


@pytest.fixture
def cut(tmp_path):
    """Run the script on a slide; return the store and the counts {(kind, name): count}."""

    def run(
        file, nuclei=None, *, name="s1", mpp=None, unit="px", on_damage="stop", settings=RULES, workers=1, check=True
    ):
        out = {"store": "zarr", "picture": "png", "summary_tsv": "tsv", "summary_html": "html"}
        params = {"settings": settings, "patch_size": 64, "mpp": MPP, "slide_mpp": mpp, "unit": unit, "seed": 0}
        params |= {"on_damage": on_damage, "group": "donor", "tissue": "kidney"}
        params |= {"cell_outlines": False, "check_outlines": check}
        rule = SimpleNamespace(
            input=SimpleNamespace(file=file, nuclei=nuclei or write_outlines(tmp_path / "nuclei")),
            output=SimpleNamespace(**{key: tmp_path / f"{name}.{end}" for key, end in out.items()}),
            params=SimpleNamespace(**params),
            wildcards=SimpleNamespace(slide=name),
            threads=workers,
        )
        extract_slide.main(rule)
        counts = pd.read_csv(rule.output.summary_tsv, sep="\t").set_index(["kind", "name"])["count"].to_dict()
        return open_store(rule.output.store), counts

    return run


def test_a_slide_becomes_patches_with_the_boxes_of_its_nuclei(tmp_path, cut):
    file = write_slide(tmp_path / "slide")
    store, rows = cut(file)
    assert store.classes == ()
    assert (store.labels == -1).all()
    assert set(store.patches["tissue"]) == {"kidney"}
    assert set(store.patches["group"]) == {"donor"}
    assert len(store) == 64  # 8 x 8 patches of tissue
    for index in range(len(store)):
        corner = store.patches.loc[index, ["x", "y"]].to_numpy(float)
        parts = shapely.intersection(SHAPES, shapely.box(*corner, *(corner + 64)))
        parts = parts[shapely.area(parts) >= 0.1 * shapely.area(SHAPES)]
        np.testing.assert_allclose(store.boxes_of(index)[0], shapely.bounds(parts) - np.tile(corner, 2), atol=1e-4)
    pixels = tifffile.imread(file, key=0)
    x, y = store.patches.loc[5, ["x", "y"]].astype(int)
    np.testing.assert_array_equal(store.read(5).image, pixels[y : y + 64, x : x + 64])
    run_rule(lambda _: cut(file), job_with(tmp_path, "file", input=files(file=file)))
    assert "64 patches of 64 px at 0.5 um per px, from my/file." in (tmp_path / "s1.html").read_text()
    assert rows["total", "patches"] == 64
    assert rows["total", "nuclei on the slide"] == 400
    assert rows["total", "nuclei in patches"] == len(store.labels) > 400
    assert 50 < rows["total", "cut nuclei in patches"] < 400
    assert rows["dropped", "nuclei in no patch that was taken"] == 0
    assert rows["dropped", "parts of nuclei at the edge of a patch that show too little"] > 0


def test_the_size_of_a_pixel_is_known_or_the_slide_refused(tmp_path, cut):
    file = write_slide(tmp_path / "slide", mpp=None)
    with pytest.raises(InputError, match=r"s1.*column mpp of its sheet") as caught:
        cut(file, on_damage="skip")  # not damage
    assert not isinstance(caught.value, DamagedSlide)
    store, _ = cut(file, mpp=MPP)
    assert len(store) == 64
    wrong = write_slide(tmp_path / "wrong", mpp=0.25)
    assert len(cut(wrong, mpp=MPP, name="s2")[0]) == 64  # the sheet overrules the file
    tifffile.imwrite(tmp_path / "gray", np.zeros((256, 256), np.uint8), resolution=(2e4, 2e4), resolutionunit=3)
    with pytest.raises(InputError, match="colour"):
        cut(tmp_path / "gray")


def test_outlines_that_do_not_fit_are_refused_or_taken_if_asked_to(tmp_path, cut, caplog):
    file = write_slide(tmp_path / "slide")
    far = write_outlines(tmp_path / "far", shapely.transform(SHAPES, lambda points: points + [600, 0]))
    with pytest.raises(
        InputError, match=r"s1: .*far: got 400 nuclei in px, of which \d+ lie on the slide \(768 x 768.*-600"
    ):
        cut(file, far, check=False)
    moved = write_outlines(tmp_path / "moved", shapely.transform(SHAPES, lambda points: points + [12, 0]))
    with pytest.raises(InputError, match=r"6, 0 um away.*would fit moved by -12, 0 px.*check_outlines to no"):
        cut(file, moved)
    _, rows = cut(file, moved, check=False)
    assert rows["checked", "outlines against the stain: they do not fit"] > 200
    assert "are taken as check_outlines is no" in caplog.text
    few = write_outlines(tmp_path / "few", shapely.transform(SHAPES[:9], lambda points: points + [12, 0]))
    _, rows = cut(file, few)
    assert rows["checked", "outlines against the stain: too few to judge"] == 9
    assert "9 nuclei are too few" in caplog.text
    assert "beside" not in caplog.text
    cut(file, write_outlines(tmp_path / "near", shapely.transform(SHAPES, lambda points: points + [4, 0])))
    assert "beside the nuclei: they fit best if moved by -2, 0 um" in caplog.text


def test_outlines_in_um_give_the_same_boxes(tmp_path, cut):
    file = write_slide(tmp_path / "slide")
    um = write_outlines(tmp_path / "um", shapely.transform(SHAPES, lambda points: points * MPP))
    store, rows = cut(file, um, unit="um")
    assert rows["checked", "outlines against the stain: they fit"] > 200
    same, _ = cut(file, name="s2")
    np.testing.assert_allclose(store.boxes, same.boxes, atol=1e-4)


def test_no_patch_is_an_error_with_the_reasons(tmp_path, cut):
    file = write_slide(tmp_path / "slide")
    with pytest.raises(InputError, match=r"s1: got no patch.*with too few nuclei.*min_nuclei"):
        cut(file, settings={"min_nuclei": 500})


@pytest.fixture(params=[False, True], ids=["tifffile", "OpenSlide"])
def aperio(request, monkeypatch):
    """Whether the slide is one that OpenSlide reads."""
    monkeypatch.setattr(pyramid, "_FASTER", ())
    return request.param


def test_damaged_tiles_stop_or_are_left_out(tmp_path, cut, aperio):
    whole = cut(write_slide(tmp_path / "whole", aperio=aperio), name="whole")[0]
    file = write_slide(tmp_path / "damaged", aperio=aperio, damage=[(0, 2 * 12 + 2), (0, 5 * 12 + 6)])
    with open_slide(file, None, "s1") as image:
        assert isinstance(image, pyramid._Tiff) != aperio
        assert image.mpp == MPP
    with pytest.raises(InputError, match="damaged.*(row 2, column 2|row 5, column 6|px: )"):  # patches lie on tiles
        cut(file)
    assert not (tmp_path / "s1.zarr").exists()
    store, rows = cut(file, on_damage="skip", workers=2)
    places = {tuple(row) for row in store.patches[["x", "y"]].to_numpy()}
    assert len(store) == 62
    assert not places & {(128, 128), (384, 320)}
    kept = [i for i, row in enumerate(whole.patches[["x", "y"]].to_numpy()) if tuple(row) in places]
    np.testing.assert_array_equal(store.images(range(len(store))), whole.images(kept))
    np.testing.assert_array_equal(np.diff(store.box_ptr), np.diff(whole.box_ptr)[kept])
    assert rows["damaged", "patches"] == rows["not taken", "patches damaged"] == 2
    assert store.attrs["patches_passed_over"]["damaged"] == 2
    assert len(store.attrs["damage"]["patches"]) == 2


def test_damage_of_the_overview_costs_its_region_alone(tmp_path, cut, aperio):
    last = 3  # the level that the tissue map is read from
    file = write_slide(tmp_path / "slide", levels=4, aperio=aperio, damage=[(last, 0)])  # 2 x 2 tiles of 512 px each
    with pytest.raises(InputError, match="slide"):
        cut(file)
    store, rows = cut(file, on_damage="skip")
    assert rows["damaged", "regions of the overview and the check"] == len(store.attrs["damage"]["overview"]) == 1
    assert 0 < len(store) < 64
    assert (store.patches[["x", "y"]].max(axis=1) >= 512 - 64).all()


def test_a_slide_that_cannot_be_opened_stops_or_gives_an_empty_store(tmp_path, cut):
    (tmp_path / "broken").write_bytes(b"no slide at all" * 50)
    with pytest.raises(DamagedSlide, match=r"s1.*broken"):
        cut(tmp_path / "broken")
    store, rows = cut(tmp_path / "broken", on_damage="skip")
    assert len(store) == 0
    assert rows["damaged", "slides that cannot be opened"] == 1
    assert "cannot be opened" in (tmp_path / "s1.html").read_text()
    assert (tmp_path / "s1.png").exists()
    job = job_with(tmp_path, "file", input=files(file=tmp_path / "broken"))
    run_rule(lambda _: cut(tmp_path / "broken", on_damage="skip"), job)
    assert "my/file cannot be opened" in (tmp_path / "s1.html").read_text()
    assert "my/file: " in (tmp_path / "rule.log").read_text()
    with pytest.raises(InputError, match="no such file"):
        cut(tmp_path / "missing", on_damage="skip")


def test_pictures_show_tissue_patches_and_outlines(tmp_path, cut):
    cut(write_slide(tmp_path / "slide"))
    pixels = np.asarray(Image.open(tmp_path / "s1.png").convert("RGB")).astype(int)
    assert pixels.shape == (768, 768, 3)
    for colour in ((0, 158, 115), (0, 80, 200)):
        where = np.argwhere((pixels == colour).all(axis=2))
        assert len(where) > 500
        assert np.abs(where.min(axis=0) - 128).max() <= 32
        assert np.abs(where.max(axis=0) - 639).max() <= 32
    page = (tmp_path / "s1.html").read_text()
    assert page.count("<img") == 1 + 3 + 12
    first = re.search(r"<h2>Outlines.*?base64,([^\"]+)", page, re.DOTALL).group(1)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first)))).astype(int)
    row, column = np.nonzero(np.abs(pixels - (0, 158, 115)).sum(axis=2) < 60)
    assert len(row) > 500
    points = shapely.points((column + 0.5) / 8 + 128, (row + 0.5) / 8 + 128)
    rims = shapely.union_all(shapely.boundary(SHAPES))
    assert shapely.distance(points, rims).max() < 0.5  # px of the slide


def test_the_choice_from_stores_is_a_split_file(tmp_path, cut):
    cut(write_slide(tmp_path / "slide"))
    (tmp_path / "broken").write_bytes(b"no slide" * 50)
    cut(tmp_path / "broken", on_damage="skip", name="s2")
    rule = SimpleNamespace(
        input=SimpleNamespace(stores=[tmp_path / "s1.zarr", tmp_path / "s2.zarr"]),
        params=SimpleNamespace(slides=[{"group": "donor", "tissue": "kidney"}] * 2, total=50, val_share=0.2, seed=0),
        output=SimpleNamespace(split=tmp_path / "split.tsv", summary=tmp_path / "summary.tsv"),
    )
    choose_slide_patches.main(rule)
    split = read_split(rule.output.split)
    assert set(split["store"]) == {"s1"}
    assert split["part"].value_counts().to_dict() == {"train": 40, "unused": 14, "val": 10}
    assert pd.read_csv(rule.output.summary, sep="\t").set_index("name").loc["s2", "note"] == "no patches: damaged"
