"""STHELAR: planted nuclei come back in place and with their types; what does not fit is refused by name."""

import contextlib
import dataclasses
import io
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.config.slides import PatchSettings
from celldetr.config.sthelar import CELLS, PLACES
from celldetr.config.xenium import XeniumSplitSettings
from celldetr.example.sthelar import SIDE, STEP, _png, draw_section, write_sthelar
from celldetr.fetch.sthelar import fetch_section
from celldetr.report.sthelar import draw_section as draw_map
from celldetr.report.sthelar import write_section_page
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.store import NO_LABEL, open_store
from celldetr.xenium.split import xenium_split
from celldetr.xenium.sthelar.nuclei import nuclei_of, read_ids, read_image, window
from celldetr.xenium.sthelar.patches import extract_section
from celldetr.xenium.sthelar.types import read_types

NAME, MPP = "breast_s0", 0.274
LIMITS = {"Dice": 0.0, "Jaccard": 0.0, "bPQ": 0.0}
TYPES = (
    "cells_final_label_group\tcells_label3\ttype\n# T and NK are not told apart\nT_NK\t*\t-\nB_Plasma\t*\t-\n"
    "Myeloid\t*\tMyeloid\nBlood_vessel\t*\tEndothelial\nFibroblast_Myofibroblast\t*\tFibroblast\n"
    "Epithelial\tcancer_cell\tMalignant\nEpithelial\t*\tEpithelial\nOther\t*\t-\n"
)
EXPECTED = {
    **dict.fromkeys(("T", "NK", "B", "Plasma"), NO_LABEL),
    **dict.fromkeys(("Myeloid", "Mast"), ST_TYPES.index("Myeloid")),
    **{name: ST_TYPES.index(name) for name in ("Endothelial", "Fibroblast", "Malignant", "Epithelial")},
}


@pytest.fixture(scope="module")
def drawn():
    return draw_section(NAME, (4, 3), (3,), MPP)


def put(section, folder):
    """Write a section as it is fetched."""
    write_sthelar(folder / "copy", [section])
    return fetch_section(NAME, folder / "raw", repository="a/b", revision="main", folder=str(folder / "copy"))


@pytest.fixture(scope="module")
def raw(drawn, tmp_path_factory):
    return put(drawn, tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Write a section of six patches."""
    return put(draw_section(NAME, (3, 2), (4,), MPP), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def types(tmp_path_factory):
    path = tmp_path_factory.mktemp("types") / "types.tsv"
    path.write_text(TYPES, encoding="utf-8")
    return read_types(path)


@pytest.fixture
def extract(tmp_path, types):
    def run(folder, *, size=256, mpp=0.25, source_mpp=None, limits=LIMITS, **settings):
        found = extract_section(
            folder,
            tmp_path / f"{NAME}.zarr",
            name=NAME,
            group="donor",
            tissue="breast",
            types=types,
            limits=limits,
            size=size,
            mpp=mpp,
            source_mpp=source_mpp,
            settings=PatchSettings(**{"min_labelled": 0, **settings}),
            seed=1,
            workers=2,
        )
        return found, open_store(tmp_path / f"{NAME}.zarr")

    return run


def truth(section, patch, *, scale, low):
    """Centroid in our px and label of each nucleus of a patch that lies wholly in the window."""
    found = []
    for number in np.unique(section.maps[patch])[1:]:
        y, x = np.nonzero(section.maps[patch] == number)
        if min(x.min(), y.min()) > low and max(x.max(), y.max()) < SIDE - 1 - low:
            middle = (np.array([x.mean(), y.mean()]) + 0.5 - low) * scale
            box = (np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - low) * scale
            kind = section.types[int(np.searchsorted(section.ids, number))]
            found.append((middle, box, EXPECTED.get(kind, NO_LABEL)))
    return found


@pytest.mark.parametrize(("size", "mpp"), [(256, 0.25), (256, MPP), (128, 0.5)])
def test_planted_nuclei_come_back_in_place_with_their_types(drawn, raw, extract, size, mpp):
    found, store = extract(raw, size=size, mpp=mpp)
    assert found.mpp == pytest.approx(MPP, rel=0.01)  # measured by the areas of the nuclei
    scale = found.mpp / mpp
    low = (SIDE - size / scale) / 2
    assert len(store) == len(drawn.images)
    checked = 0
    for patch in range(len(store)):
        read = store.read(patch)
        nuclei = slice(*store.box_ptr[patch : patch + 2])
        for middle, box, label in truth(drawn, patch, scale=scale, low=max(low, 0)):
            index = np.linalg.norm(store.centroids[nuclei] - middle, axis=1).argmin()
            np.testing.assert_allclose(store.centroids[nuclei][index], middle, atol=0.02)
            np.testing.assert_allclose(read.boxes[index], box, atol=0.02)
            assert read.labels[index] == label
            checked += 1
    assert checked > 100
    np.testing.assert_allclose(store.patches[["x", "y"]], drawn.corners + max(low, 0), atol=1)
    assert (store.labels >= 0).any()
    assert set(store.patches["group"]) == {"donor"}


def test_pixels_are_those_of_the_patch(drawn, raw, extract):
    _, store = extract(raw, mpp=MPP, source_mpp=MPP)
    np.testing.assert_array_equal(store.images(np.arange(len(store))), drawn.images)
    _, store = extract(raw, size=128, mpp=2 * MPP, source_mpp=MPP)
    halved = drawn.images.reshape(len(drawn.images), 128, 2, 128, 2, 3).mean(axis=(2, 4))
    assert np.abs(store.images(np.arange(len(store))) - halved).mean() < 6


def test_counts_add_up(drawn, raw, extract):
    found, store = extract(raw, limits={**LIMITS, "bPQ": 0.5}, max_patches=9)
    rows = {(kind, name): count for kind, name, count in found.rows}
    assert rows["total", "patches"] == len(store) == 9
    low = int((drawn.quality[:, 2] < 0.5).sum())
    assert rows["not taken", "patches whose bPQ is below 0.5 or unknown"] == low == 1
    assert rows["not taken", "patches not drawn"] == len(drawn.images) - low - 9
    assert rows["total", "nuclei in patches"] == len(store.labels)
    assert sum(count for (kind, _), count in rows.items() if kind == "class") == len(store.labels)
    lymphocytes = sum(kind in ("T", "NK") for kind in drawn.types)
    untyped = [count for (kind, name), count in rows.items() if kind == "without a type" and "T_NK" in name]
    assert untyped == [lymphocytes]
    assert len(found.map.passed_over) + len(found.map.taken) == len(drawn.images)


def test_the_page_shows_the_section(raw, extract, tmp_path):
    found, store = extract(raw, limits={**LIMITS, "bPQ": 0.5})
    write_section_page(tmp_path / "patches.html", store, found, "Patches of a section")
    assert "patches of STHELAR at 0.27" in (tmp_path / "patches.html").read_text(encoding="utf-8")
    picture = np.asarray(draw_map(found.map))
    assert picture.shape[:2] == (found.map.size[1], found.map.size[0])
    x, y = found.map.passed_over[0] + STEP // 2
    assert (picture[y, x] == 255).all()  # what was not taken is blank


def test_blocks_of_overlapping_patches_share_no_tissue(raw, extract):
    _, store = extract(raw)
    rules = XeniumSplitSettings(by="block", train=0.5, val=0.0, test=0.5, block_um=140)
    part = xenium_split([store], rules, 0).table.set_index("patch")["part"]
    corners = store.patches[["x", "y"]].to_numpy()
    side = 256 * 0.25 / store.attrs["image"]["mpp"]
    assert set(part) == {"train", "test"}
    for one in part.index[part == "train"]:
        for other in part.index[part == "test"]:
            assert np.abs(corners[one] - corners[other]).max() >= side - 1.5


def change(section, **values):
    return dataclasses.replace(section, **values)


def rewrite(path, edit):
    pq.write_table(edit(pq.read_table(path)), path)


def column(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def edit_rows(name, edit):
    """Change the bytes of a column of the first patches."""

    def apply(folder):
        path = sorted(folder.glob("patches-*.parquet"))[0]

        def each(table):
            values = table[name].to_pylist()
            return column(table, name, pa.array([edit(value) for value in values], table.schema.field(name).type))

        rewrite(path, each)

    return apply


def npz(ids):
    buffer = io.BytesIO()
    sparse.save_npz(buffer, sparse.csr_matrix(ids))
    return buffer.getvalue()


def png(side):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "a.png"}


def cells(edit):
    return lambda folder: rewrite(folder / CELLS, edit)


def cut_file(folder):
    path = sorted(folder.glob("patches-*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-500])


ROWS = "patches-00000.parquet"
WRONG = {
    "no id column": (cells(lambda t: t.drop_columns("cell_id_int")), r"got no columns \['cell_id_int'\]"),
    "no labels": (
        cells(lambda t: t.drop_columns("cells_label3")), r"got no columns \['cells_label3'\], .* the columns of"),
    "an unknown label": (
        cells(lambda t: column(t, "cells_label3", pa.array([None, *t["cells_label3"].to_pylist()[1:]]))
              .slice(0).set_column(1, "cells_final_label_group", pa.array(["Neuron"] * len(t)))),
        r"has no row for: \['Neuron', ''\] \(1 cells\)",
    ),
    "an id twice": (cells(lambda t: pa.concat_tables([t, t.slice(0, 1)])), "got an id twice"),
    "ids of another table": (
        cells(lambda t: column(t, "cell_id_int", pa.array(range(1, len(t) + 1)))),
        "nuclei of the maps have no row in the table of cells",
    ),
    "cells of another section": (
        cells(lambda t: column(t, "nucleus_area", pa.array(t["nucleus_area"].to_numpy()[::-1].copy()))),
        "areas of nuclei .* are not related",
    ),
    "a truncated file": (cut_file, r"patches-00000.parquet: cannot be read"),
    "a damaged image": (edit_rows("image", lambda v: {**v, "bytes": v["bytes"][:200]}), "png: image: cannot be"),
    "a patch twice": (
        lambda f: rewrite(f / ROWS, lambda t: pa.concat_tables([t, t.slice(0, 1)])), "_0.png: got this patch twice"),
    "a patch of another section": (
        lambda f: rewrite(f / ROWS, lambda t: column(t, "slide_id", pa.array(["lung_s1"] * len(t)))),
        f"got a row of section 'lung_s1', expected rows of {NAME} alone",
    ),
    "no image": (edit_rows("image", lambda v: None), "got NoneType, expected the bytes"),
    "images of another size": (edit_rows("image", lambda v: png(512)), "image: got 512 x 512 px, expected 256"),
    "maps of another size": (edit_rows("cell_id_map", lambda v: npz(np.eye(128, dtype=int))), r"got \(128, 128\) px"),
    "maps of numbers": (edit_rows("cell_id_map", lambda v: npz(np.eye(256))), "got float64, expected integers"),
    "maps that are none": (edit_rows("cell_id_map", lambda v: v[:100]), "expected a sparse matrix of SciPy"),
    "places of another level": (
        lambda f: rewrite(f / PLACES, lambda t: column(t, "xmax", pa.array(t["xmax"].to_numpy() + 256))),
        "expected places 256 px wide",
    ),
    "a place twice": (
        lambda f: rewrite(f / PLACES, lambda t: pa.concat_tables([t, t.slice(0, 1)])), "got the place of .* twice"),
    "a patch without a place": (
        lambda f: rewrite(f / PLACES, lambda t: t.slice(1)), f"{NAME}_0.png: got no place of this patch"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_section_that_does_not_fit_is_refused(small, extract, tmp_path, what):
    folder = shutil.copytree(small, tmp_path / "raw")
    edit, message = WRONG[what]
    edit(folder)
    with pytest.raises(InputError, match=message):
        extract(folder)
    assert not (tmp_path / f"{NAME}.zarr").exists()


PLACED_WRONG = {
    "with x and y swapped": lambda maps: maps.transpose(0, 2, 1),
    "mirrored": lambda maps: maps[:, :, ::-1],
    "upside down": lambda maps: maps[:, ::-1],
    "of the patch before": lambda maps: np.roll(maps, -1, axis=0),
}


@pytest.mark.parametrize("how", PLACED_WRONG)
def test_maps_that_lie_elsewhere_are_refused(drawn, extract, tmp_path, how):
    folder = put(change(drawn, maps=np.ascontiguousarray(PLACED_WRONG[how](drawn.maps))), tmp_path)
    with pytest.raises(InputError, match=f"images and maps do not fit|{how} they would hold"):
        extract(folder)


def test_the_pixel_size_is_checked(drawn, raw, extract, tmp_path):
    with pytest.raises(InputError, match=r"mpp: got 0.25 um per px, but by the areas of its nuclei it is 0.27"):
        extract(raw, source_mpp=0.25)
    with pytest.raises(InputError, match=r"got patches of 256 px of 0.27.* um \(70.* um\), expected at least 80 um"):
        extract(raw, size=320)
    with pytest.raises(InputError, match="would be blurred; take the data set of the higher magnification"):
        extract(raw, size=256, mpp=0.14)
    folder = put(change(drawn, areas=np.full_like(drawn.areas, np.nan)), tmp_path)
    with pytest.raises(InputError, match="its pixel size is not known.*column mpp of the sheet"):
        extract(folder)
    found, _ = extract(folder, source_mpp=0.3)  # nothing contradicts it
    assert found.mpp == 0.3


def test_large_ids_and_cells_without_a_row_are_kept(drawn, extract, tmp_path):
    """Ids from 2^31 on are negative in the maps and in the table, or in one of them."""
    assert (drawn.ids >= 2**31).sum() > 50
    folder = put(drawn, tmp_path)
    before, _ = extract(folder)
    rewrite(folder / CELLS, lambda t: column(t, "cell_id_int", pa.array(drawn.ids)))  # 64 bits
    assert extract(folder)[0].rows == before.rows
    rewrite(folder / CELLS, lambda t: t.slice(0, len(t) * 3 // 4))
    found, store = extract(folder)
    unknown = next(count for kind, name, count in found.rows if "has no row" in name)
    assert 0 < unknown < len(store.labels) / 2
    assert found.rows[1] == before.rows[1]  # their nuclei have boxes


def test_an_empty_choice_says_why(raw, extract):
    with pytest.raises(InputError, match=r"got no patch; of 12: 12 whose Dice is below 1 or unknown"):
        extract(raw, limits={**LIMITS, "Dice": 1.0})
    with pytest.raises(InputError, match="12 with too few labelled nuclei"):
        extract(raw, min_labelled=1000)


def test_a_nucleus_at_the_edge_is_boxed_where_it_is_visible():
    ids = np.zeros((SIDE, SIDE), int)
    ids[100:110, 10:30] = 7  # its left half is cut off
    ids[0:20, 100:110] = 8  # all of it
    ids[200:210, 18:30] = 9  # a sixth of it
    place = window(216, 0.25, 0.25)
    assert (place.low, place.scale) == (20, 1)
    found = nuclei_of(ids, place, 0.4)
    assert found.ids.tolist() == [7, 9]
    assert found.boxes.tolist() == [[0, 80, 10, 90], [0, 180, 10, 190]]
    assert found.centroids.tolist() == [[5, 85], [5, 185]]
    assert nuclei_of(ids, place, 0.6).hidden == 1
    assert len(nuclei_of(np.zeros_like(ids), place, 0.1).ids) == 0
    with pytest.raises(InputError, match="expected at least 64 um"):
        window(256, 0.25, 0.2125)


def test_a_map_that_claims_to_be_huge_takes_no_memory():
    content = npz(sparse.csr_matrix((np.ones(1, int), ([0], [0])), shape=(1, 2**31 - 1)))
    tracemalloc.start()
    with pytest.raises(InputError, match="px, expected"):
        read_ids(content)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), what=st.sampled_from(["map", "image"]))
def test_damaged_bytes_are_refused_or_read(drawn, data, what):
    content, read = (npz(drawn.maps[0]), read_ids) if what == "map" else (_png(drawn.images[0]), read_image)
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 400))
    damaged = content[:place] + data.draw(st.sampled_from([b"", b"\xff", b"\x00" * 40])) + content[place + 1 :]
    with contextlib.suppress(InputError):
        read(damaged)


def test_a_map_whose_indices_lie_outside_is_refused():
    buffer = io.BytesIO()
    parts = {"data": np.ones(1, int), "indices": np.array([10**6]), "indptr": np.r_[0, np.ones(SIDE, int)]}
    np.savez(buffer, **parts, format=np.array(b"csr"), shape=np.array([SIDE, SIDE]))
    with pytest.raises(InputError, match="cell_id_map: cannot be read"):
        read_ids(buffer.getvalue())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got the columns"),
        ("label\n", "expected columns of the cell metadata and then type"),
        ("label\ttype\nT\tT\nT\tB\n", r"line 3: got the labels \['T'\] a second time"),
        ("label\ttype\nT\tt\n", "line 2: got the type 't'"),
        ("a\tb\ttype\nT\tT\n", "line 2: got 2 cells, expected 3: a, b, type"),
    ],
)
def test_mistakes_in_the_table_of_types_are_named(tmp_path, text, message):
    path = tmp_path / "types.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_types(path)
