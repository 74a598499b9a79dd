"""Slides to patches: the right boxes, nothing guessed, damage named and counted, and a fair choice of patches."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import extract_slide
from celldetr.config.sheets import SlideRow, read_sheet, used_slides
from celldetr.config.slides import SlideSettings
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic
from celldetr.slides.choice import SlidePatches, choose_patches
from celldetr.slides.damage import DamagedSlide, open_slide
from celldetr.slides.pyramid import _Tiff
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
            resolution = {} if mpp is None else {"resolution": (1e4 / mpp / 2**level,) * 2}
            writer.write(
                np.rint(image).astype(np.uint8),
                tile=(64, 64),
                photometric="rgb",
                compression="jpeg" if aperio else "deflate",
                description=f"Aperio Image Library v1|AppMag = 20|MPP = {mpp}" if aperio else None,
                metadata=None,
                resolutionunit=None if mpp is None else "CENTIMETER",
                subfiletype=int(level > 0),
                **resolution,
            )
            image = image.reshape(len(image) // 2, 2, len(image) // 2, 2, 3).mean(axis=(1, 3))
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for level, tile in damage:
            page = file.pages[level]
            start, count = page.dataoffsets[tile], page.databytecounts[tile]
            data[start : start + count] = bytes(count)
    path.write_bytes(data)
    return path


def write_outlines(path, shapes=SHAPES):
    pd.DataFrame({"geometry": shapely.to_wkb(list(shapes))}).to_parquet(path)
    return path


@pytest.fixture
def cut(tmp_path):
    """Run the script on a slide; return the store, its attributes' folder, and the counts {(kind, name): count}."""

    def run(file, nuclei=None, *, name="s1", mpp=None, unit="px", on_damage="stop", settings=RULES, workers=1):
        out = {"store": f"{name}.zarr", "picture": f"{name}.png", "summary_tsv": f"{name}.tsv"}
        params = {"settings": settings, "patch_size": 64, "mpp": MPP, "slide_mpp": mpp, "unit": unit, "seed": 0}
        params |= {"on_damage": on_damage, "group": "donor", "tissue": "kidney"}
        rule = SimpleNamespace(
            input=SimpleNamespace(file=file, nuclei=nuclei or write_outlines(tmp_path / "nuclei")),
            output=SimpleNamespace(
                **{key: tmp_path / value for key, value in out.items()}, summary_html=tmp_path / f"{name}.html"
            ),
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
    truth = shapely.bounds(SHAPES)
    for index in range(len(store)):
        corner = store.patches.loc[index, ["x", "y"]].to_numpy(float)
        centres = (truth[:, :2] + truth[:, 2:]) / 2 - corner
        inside = ((centres >= 0) & (centres < 64)).all(axis=1)
        expected = np.clip(truth[inside] - np.tile(corner, 2), 0, 64)
        np.testing.assert_allclose(store.boxes_of(index)[0], expected, atol=1e-4)
    pixels = tifffile.imread(file, key=0)
    x, y = store.patches.loc[5, ["x", "y"]].astype(int)
    np.testing.assert_array_equal(store.read(5).image, pixels[y : y + 64, x : x + 64])
    assert rows["total", "patches"] == 64
    assert rows["total", "nuclei on the slide"] == 400
    assert rows["total", "nuclei in patches"] + rows["dropped", "nuclei in no patch that was taken"] == 400


def test_the_size_of_a_pixel_is_known_or_the_slide_refused(tmp_path, cut):
    file = write_slide(tmp_path / "slide", mpp=None)
    with pytest.raises(InputError, match=r"s1.*column mpp of the slides sheet") as caught:
        cut(file, on_damage="skip")  # not damage
    assert not isinstance(caught.value, DamagedSlide)
    store, _ = cut(file, mpp=MPP)
    assert len(store) == 64
    wrong = write_slide(tmp_path / "wrong", mpp=0.25)
    assert len(cut(wrong, mpp=MPP, name="s2")[0]) == 64  # the sheet overrules the file


def test_gray_images_are_refused(tmp_path, cut):
    tifffile.imwrite(tmp_path / "gray", np.zeros((256, 256), np.uint8), resolution=(2e4, 2e4), resolutionunit=3)
    with pytest.raises(InputError, match="colour"):
        cut(tmp_path / "gray")


def test_outlines_of_another_slide_or_unit_are_refused(tmp_path, cut):
    file = write_slide(tmp_path / "slide")
    far = write_outlines(tmp_path / "far", shapely.transform(SHAPES, lambda points: points + [600, 0]))
    with pytest.raises(InputError, match=r"far.*lie on the slide.*nuclei_unit"):
        cut(file, far)
    um = write_outlines(tmp_path / "um", shapely.transform(SHAPES, lambda points: points * MPP))
    store, _ = cut(file, um, unit="um")
    same, _ = cut(file, name="s2")
    np.testing.assert_allclose(store.boxes, same.boxes, atol=1e-4)


def test_no_patch_is_an_error_with_the_reasons(tmp_path, cut):
    file = write_slide(tmp_path / "slide")
    with pytest.raises(InputError, match=r"s1: got no patch.*with too few nuclei.*min_nuclei"):
        cut(file, settings={"min_nuclei": 500})


def test_damaged_tiles_stop_or_are_left_out(tmp_path, cut):
    whole = cut(write_slide(tmp_path / "whole"), name="whole")[0]
    tiles = [(0, 2 * 12 + 2), (0, 5 * 12 + 6)]  # 12 tiles across; patches lie on tiles
    file = write_slide(tmp_path / "damaged", damage=tiles)
    with pytest.raises(InputError, match=r"damaged.*row 2, column 2"):
        cut(file)
    assert not (tmp_path / "s1.zarr").exists()
    store, rows = cut(file, on_damage="skip", workers=2)
    assert len(store) == 62
    places = [tuple(row) for row in store.patches[["x", "y"]].to_numpy()]
    assert (128, 128) not in places
    assert (384, 320) not in places
    kept = [i for i, row in enumerate(whole.patches[["x", "y"]].to_numpy()) if tuple(row) in places]
    np.testing.assert_array_equal(store.images(range(len(store))), whole.images(kept))
    np.testing.assert_array_equal(np.diff(store.box_ptr), np.diff(whole.box_ptr)[kept])
    assert rows["damaged", "patches"] == rows["not taken", "patches damaged"] == 2
    assert store.attrs["patches_passed_over"]["damaged"] == 2
    assert "row 2, column 2" in store.attrs["damage"]["patches"][0]


def test_damage_of_the_overview_costs_its_region_alone(tmp_path, cut):
    last = 3  # the level that the tissue map is read from
    file = write_slide(tmp_path / "slide", levels=4, damage=[(last, 0)])  # 2 x 2 tiles of 512 px each
    with pytest.raises(InputError, match="cannot be decoded"):
        cut(file)
    store, rows = cut(file, on_damage="skip")
    assert rows["damaged", "regions of the overview"] == len(store.attrs["damage"]["overview"]) == 1
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
    with pytest.raises(InputError, match="no such file"):
        cut(tmp_path / "missing", on_damage="skip")


def test_slides_that_openslide_reads_go_on_after_damage(tmp_path, cut):
    whole = cut(write_slide(tmp_path / "whole", aperio=True), name="whole")[0]
    file = write_slide(tmp_path / "damaged", aperio=True, damage=[(0, 2 * 12 + 2), (1, 2 * 6 + 3)])
    with open_slide(file, None, "s1") as image:
        assert not isinstance(image, _Tiff)
        assert image.mpp == MPP
    with pytest.raises(InputError, match="damaged"):
        cut(file)
    store, rows = cut(file, on_damage="skip", workers=2)
    assert rows["damaged", "patches"] == 1
    assert rows["damaged", "regions of the overview"] == 1
    places = {tuple(row) for row in store.patches[["x", "y"]].to_numpy()}
    kept = [i for i, row in enumerate(whole.patches[["x", "y"]].to_numpy()) if tuple(row) in places]
    assert len(kept) == len(store) >= 50
    np.testing.assert_array_equal(store.images(range(len(store))), whole.images(kept))


def test_what_cannot_be_decoded_reads_as_glass_and_the_rest_as_it_is(tmp_path):
    whole = write_slide(tmp_path / "whole")
    file = write_slide(tmp_path / "damaged", damage=[(0, 30)])
    with open_slide(whole, None, "s") as image:
        expected = image.read(0, 0, 0, 768, 768)
    image = open_slide(file, None, "s", skip=True)
    found = image.read(0, 0, 0, 768, 768)
    different = (found != expected).any(axis=2)
    rows, columns = np.nonzero(different)
    assert len(image.damage()) == 1
    assert rows.max() - rows.min() < 96  # the tile of 64 px in pieces of less
    assert columns.max() - columns.min() < 96
    assert (found[different] == 255).all()


def test_pictures_show_tissue_and_patches(tmp_path, cut):
    cut(write_slide(tmp_path / "slide"))
    pixels = np.asarray(Image.open(tmp_path / "s1.png").convert("RGB")).astype(int)
    assert pixels.shape == (768, 768, 3)
    for colour in ((0, 158, 115), (0, 80, 200)):
        where = np.argwhere((pixels == colour).all(axis=2))
        assert len(where) > 500
        assert np.abs(where.min(axis=0) - 128).max() <= 32
        assert np.abs(where.max(axis=0) - 639).max() <= 32


def make_patches(name, tissue, count, group=None, columns=10, side=64.0):
    index = np.arange(count)
    x, y = (index % columns) * 64, (index // columns) * 64
    return SlidePatches(name, group or name, tissue, x, y, np.full(count, 3), side)


SLIDES = st.lists(
    st.tuples(st.sampled_from(["kidney", "lung", "prostate"]), st.integers(0, 120), st.integers(0, 4)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(SLIDES, st.integers(2, 300), st.floats(0.01, 0.6), st.integers(0, 5))
def test_the_choice_keeps_its_promises(sizes, total, val_share, seed):
    slides = [make_patches(f"s{i}", t, n, f"{t}{g}") for i, (t, n, g) in enumerate(sizes)]
    available = sum(len(slide) for slide in slides)
    try:
        choice = choose_patches(slides, total=total, val_share=val_share, seed=seed)
    except InputError:
        assert available < 50
        return
    split = choice.split
    assert not split.duplicated(["store", "patch"]).any()
    assert len(split) <= min(total, available)
    assert set(split["part"]) == {"train", "val"}
    assert (split["part"] == "val").sum() <= max(1, round(val_share * min(total, available)))
    by_name = {slide.store: slide for slide in slides}
    parts = {part: rows for part, rows in split.groupby("part")}
    for store in set(parts["train"]["store"]) & set(parts["val"]["store"]):  # a strip: no pixel in both
        train, val = (parts[part][parts[part]["store"] == store]["patch"].to_numpy() for part in ("train", "val"))
        slide = by_name[store]
        for axis in (slide.x, slide.y):
            gap = axis[val].min() - axis[train].max()
            if gap >= slide.side:
                break
        else:
            pytest.fail(f"{store}: patches of both parts overlap")
    again = choose_patches(slides, total=total, val_share=val_share, seed=seed)
    pd.testing.assert_frame_equal(again.split, split)
    summary = choice.summary.set_index("name")
    assert summary.loc["all", "chosen"] == len(split)
    assert summary.loc["all", "paper"] == 64_000
    assert (summary["train"] + summary["val"] == summary["chosen"]).all()


def test_tissues_get_equal_shares_and_validation_is_on_other_slides():
    slides = [make_patches(f"k{i}", "kidney", 400) for i in range(3)]
    slides += [make_patches(f"l{i}", "lung", 900 + i) for i in range(3)]
    slides += [make_patches("p0", "prostate", 60), make_patches("p1", "prostate", 30)]
    choice = choose_patches(slides, total=900, val_share=0.1, seed=0)
    split = choice.split.assign(tissue=choice.split["store"].str[0])
    counts = split.groupby("tissue").size()
    assert counts.sum() == 900
    assert abs(counts["k"] - counts["l"]) <= 2
    assert (split["part"] == "val").sum() == 90
    val = split[split["part"] == "val"]
    assert set(val["tissue"]) == {"k", "l", "p"}
    large = split[split["tissue"] != "p"]
    parts = large.groupby("store")["part"].nunique()
    assert (parts == 1).all()
    notes = choice.summary.set_index("name")["note"]
    assert notes[val["store"].iloc[0]] == "held out for validation"
    other = choose_patches(slides, total=900, val_share=0.1, seed=1).split
    assert not other.equals(choice.split)


def test_no_slide_is_held_out_that_training_needs():
    slides = [make_patches("a", "lung", 100), make_patches("b", "lung", 60)]
    choice = choose_patches(slides, total=150, val_share=0.1, seed=0)
    assert len(choice.split) == 150
    assert (choice.split["part"] == "val").sum() == 15
    assert set(choice.split[choice.split["part"] == "train"]["store"]) == {"a", "b"}


def test_slides_of_a_donor_validate_together():
    slides = [make_patches(f"s{i}", "lung", 100, group=f"donor{i // 2}") for i in range(6)]
    split = choose_patches(slides, total=200, val_share=0.2, seed=0).split
    donors = split.assign(donor=split["store"].str[1].astype(int) // 2).groupby("donor")["part"].nunique()
    assert (donors == 1).all()


def test_a_single_slide_gives_a_strip_and_overlapping_patches_are_left_out():
    index = np.arange(400)
    half = SlidePatches("s", "s", "lung", (index % 20) * 32, (index // 20) * 32, np.ones(400, int), 64.0)
    choice = choose_patches([half], total=400, val_share=0.1, seed=0)
    x = half.x[choice.split["patch"]]
    val = (choice.split["part"] == "val").to_numpy()
    assert x[val].min() - x[~val].max() == 64
    assert val.sum() == 40
    assert "validates" in choice.summary.set_index("name").loc["s", "note"]


def test_too_few_patches_are_told(caplog):
    with pytest.raises(InputError, match="expected at least 2"):
        choose_patches([make_patches("a", "lung", 1), make_patches("b", "lung", 0)], total=10, val_share=0.1, seed=0)
    choice = choose_patches(
        [make_patches("a", "lung", 30), make_patches("b", "lung", 0)], total=64, val_share=0.1, seed=0
    )
    assert "fewer than the 64 wanted" in caplog.text
    assert choice.summary.set_index("name").loc["b", "note"] == "no patches: damaged"


def test_a_choice_of_stores_is_a_split_file(tmp_path, cut):
    store, _ = cut(write_slide(tmp_path / "slide"))
    (tmp_path / "broken").write_bytes(b"no slide" * 50)
    empty, _ = cut(tmp_path / "broken", on_damage="skip", name="s2")
    slides = [SlidePatches.of(one, "donor", "kidney") for one in (store, empty)]
    assert slides[0].side == 64
    with atomic(tmp_path / "split.tsv") as temporary:
        choose_patches(slides, total=50, val_share=0.2, seed=0).split.to_csv(temporary, sep="\t", index=False)
    split = read_split(tmp_path / "split.tsv")
    assert set(split["store"]) == {"s1"}
    assert len(split) == 50


ROW = {"slide": "a", "use": "yes", "tissue": "lung", "group": "a", "file": "a.tif", "nuclei": "a.parquet"}


def write_sheet(path, **changes):
    row = {key: value for key, value in {**ROW, **changes}.items() if value}
    path.write_text("\t".join(SlideRow.model_fields) + "\n" + "\t".join(row.get(k, "") for k in SlideRow.model_fields))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hest": "TENX1"}, "either file or hest"),
        ({"file": ""}, "either file or hest"),
        ({"file": "a.MRXS"}, "pyramidal TIFF"),
        ({"nuclei": ""}, "nuclei"),
        ({"nuclei": "hest"}, "column hest"),
        ({"nuclei": "detect | a.parquet"}, "'detect' alone"),
        ({"nuclei": "detect", "nuclei_unit": "um"}, "nuclei_unit"),
        ({"nuclei": "detect", "nuclei_sha256": "01234567"}, "nuclei_sha256"),
        ({"hest": "../x", "file": ""}, "hest"),
        ({"mpp": "250"}, "mpp"),
        ({"use": "no"}, "column use"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, changes, message):
    path = write_sheet(tmp_path / "slides.tsv", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        used_slides("slides.tsv", tmp_path)
    assert str(path) in str(caught.value)


def test_shipped_sheets_are_right():

    root = Path(__file__).parents[3]
    assert used_slides(None, root) == {}
    example = used_slides("config/example/slides.tsv", root)
    assert [row.detect for row in example.values()] == [False, True]
    rows = used_slides(SlideSettings().sheet, root)
    assert {row.tissue for row in rows.values()} == {"kidney", "lung", "prostate"}
    assert all(row.hest and row.nuclei == ("hest",) and row.mpp for row in rows.values())
    for row in read_sheet(root / "config/slides.tsv", SlideRow, "slide").values():
        assert row.slide == row.hest
    for tissue in ("kidney", "lung", "prostate"):
        assert len({row.group for row in rows.values() if row.tissue == tissue}) >= 2


def test_defaults_are_those_of_the_paper():
    assert SlideSettings().total == 64_000
    assert SlideSettings().patches.rules().min_labelled == 0
