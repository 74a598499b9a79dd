"""Patches of a Xenium sample: planted nuclei come back with the labels of their cells, and what is lost is counted."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from slide_files import write_image

import extract_xenium
from celldetr.config.classes import ST_TYPES
from celldetr.example.xenium.sample import AffinePlan, write_xenium
from celldetr.runtime.errors import InputError
from celldetr.store import open_store
from celldetr.xenium.celltypes.labels import FRACTIONS, read_cells, write_cells
from celldetr.xenium.output import NUCLEI, read_nuclei
from celldetr.xenium.patches import place_nuclei
from celldetr.xenium.registration.affine import apply
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.result import Attempt, Quality, RegionQuality, Registration

SIZE, MPP = 64, 0.5


class Named(dict):
    """Files of a rule: by name and as attributes."""

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xenium")
    truth = write_xenium(
        folder, seed=3, size_um=(300, 260), rim_um=30, he_mpp=0.4, affine=AffinePlan(rotation_deg=25, shift_um=(9, -7))
    )
    figures = {"passed": True, "distance": 0.5, "chance": 5, "contrast": 1, "inside": 1, "he_nuclei": 9}
    region = RegionQuality(x=1, y=1, cell=(0, 0, 1, 1), nuclei=9, **figures)
    quality = Quality(failures=(), z=9, regions_passed=1, regions=(region,), **figures)
    attempt = Attempt(name="file", matrix=truth.matrix, quality=quality)
    given = {"matrix": truth.matrix, "pixel_size": truth.pixel_size, "warnings": ("correct the file",)}
    registration = Registration(**given, origin="file", quality=quality, attempts=(attempt,))
    registration.write(folder / "registration.json", "s1")
    labels = np.array([ST_TYPES.index(name) if name in ST_TYPES else -1 for name in truth.types.tolist()])
    fractions = pd.get_dummies(pd.Categorical(truth.types, ST_TYPES), dtype=np.float32).set_axis(FRACTIONS, axis=1)
    reasons = np.where(labels >= 0, "labelled", "no counts")
    cells = fractions.assign(cell_id=truth.cell_ids, label=labels, reason=reasons)
    write_cells(folder / "cells.parquet", cells, {})
    return SimpleNamespace(folder=folder, truth=truth, labels=labels, registration=registration)


def run(sample, out, registration="registration.json", **changes):
    files = {"outs": sample.truth.outs, "he": sample.truth.he_image}
    files |= {"registration": sample.folder / registration, "cells": sample.folder / "cells.parquet"}
    names = {"store": "s1.zarr", "summary_tsv": "s1.tsv", "summary_html": "s1.html"}
    settings = {"min_labelled": 1, "min_nuclei": 1, "min_tissue": 0.1, **changes}
    params = {"settings": settings, "patch_size": SIZE, "mpp": MPP, "tissue": "Lung", "group": "donor 1", "seed": 0}
    params["given"] = {"he": {"path": "my/he.svs", "place": "row s1 of the sheet, column he"}}
    extract_xenium.main(
        SimpleNamespace(
            input=Named(files),
            output=SimpleNamespace(**{key: out / name for key, name in names.items()}),
            params=SimpleNamespace(**params),
            wildcards=SimpleNamespace(sample="s1"),
            threads=2,
        )
    )
    return open_store(out / "s1.zarr")


@pytest.fixture(scope="module")
def store(sample, tmp_path_factory):
    return run(sample, tmp_path_factory.mktemp("out"))


def test_planted_nuclei_come_back_with_their_types(sample, store):
    """Each patch has a box around what it shows of each nucleus of which a tenth or more is visible."""
    truth = sample.truth
    planted = shapely.polygons(truth.nuclei_he * truth.he_mpp / MPP)
    types = sample.labels[truth.nucleus_cell]
    corners = np.rint(store.patches[["x", "y"]].to_numpy() * store.attrs["image"]["mpp"] / MPP)
    cut = outside = 0
    for index, (x, y) in enumerate(corners):
        parts = shapely.intersection(planted, shapely.box(x, y, x + SIZE, y + SIZE))
        share = shapely.area(parts) / shapely.area(planted)
        shown = np.flatnonzero(share > 0.1)
        boxes, labels = store.boxes_of(index)
        expected = shapely.bounds(parts[shown]) - [x, y, x, y]
        distance = np.abs(boxes[:, None] - expected[None]).max(axis=-1)
        assert len(boxes) == len(shown)
        assert distance.min(axis=0).max() < 0.1  # px
        assert np.array_equal(labels, types[shown[distance.argmin(axis=1)]])
        cut += (share[shown] < 1 - 1e-9).sum()
        centres = shapely.get_coordinates(shapely.centroid(planted[shown])) - (x, y)
        outside += ((centres < 0) | (centres > SIZE)).any(axis=1).sum()
    assert cut > outside > 10
    assert (store.labels == -1).any()
    table = pd.read_csv(store.path.with_suffix(".tsv"), sep="\t").set_index("name")["count"]
    assert abs(table["cut nuclei in patches"] - cut) <= 2  # by rounding of the file's corners
    assert table["parts of nuclei at the edge of a patch that show too little"] > 0
    page = store.path.with_suffix(".html").read_text()
    assert '<p class="warning">correct the file</p>' in page
    assert "um per px, from my/he.svs" in page


def test_nuclei_follow_the_field_of_displacements(sample):
    """The field moves nuclei in um of the Xenium frame, before the matrix."""
    polygons, cells = read_nuclei(sample.truth.outs), read_cells(sample.folder / "cells.parquet")
    values = np.stack([np.full((12, 12), 3.0), np.full((12, 12), -2.0)])
    field = DisplacementField(x=-100, y=-100, spacing=50, coefficients=values)
    bent = sample.registration.model_copy(update={"field": field})
    moved, plain = (place_nuclei(polygons, cells, found, MPP)[0] for found in (bent, sample.registration))
    linear = sample.registration.um_to_he()[:2, :2] * sample.registration.he_mpp / MPP
    corners, before = (shapely.get_coordinates(found.outlines) for found in (moved, plain))
    assert np.allclose(corners - before, linear @ (3.0, -2.0), atol=1e-6)


def test_regions_that_fail_give_no_patches(sample, store, tmp_path):
    """Regions of a registration that passes as a whole."""
    middle = float(shapely.total_bounds(shapely.polygons(sample.truth.nuclei_um))[[0, 2]].mean())
    good, quality = sample.registration.quality.regions[0], sample.registration.quality
    cells = [(-1e4, -1e4, middle, 1e4), (middle, -1e4, 1e4, 1e4)]
    left, right = (good.model_copy(update={"cell": cell, "passed": cell[0] < 0}) for cell in cells)
    quality = quality.model_copy(update={"regions": (left, right), "regions_passed": 0.5})
    attempts = (sample.registration.attempts[0].model_copy(update={"quality": quality}),)
    half = sample.registration.model_copy(update={"quality": quality, "attempts": attempts})
    half.write(sample.folder / "half.json", "s1")
    some = run(sample, tmp_path, "half.json")
    left_out = some.attrs["patches_passed_over"]["in a region whose registration fails"]
    assert len(store) - left_out == len(some) > 0
    centres = some.patches[["x", "y"]].to_numpy() + SIZE * MPP / sample.truth.he_mpp / 2
    assert (apply(half.he_to_um(), centres)[:, 0] < middle + 1).all()


def test_every_nucleus_is_in_a_patch_or_counted(sample, store):
    dropped = store.attrs["dropped"]
    table = pd.read_csv(store.path.with_suffix(".tsv"), sep="\t").set_index(["kind", "name"])["count"]
    nuclei = table["total", "nuclei on the H&E"] + dropped["nuclei outside of the H&E image"]
    assert nuclei + dropped["nuclei with an outline of no area or fewer than 3 corners"] == len(sample.truth.nuclei_he)
    shown = table["total", "nuclei on the H&E"] - dropped["nuclei in no patch that was taken"]
    cut = table["total", "cut nuclei in patches"]
    assert len(store.labels) - cut <= shown <= len(store.labels)
    without = set(range(len(sample.truth.cell_ids))) - set(sample.truth.nucleus_cell.tolist())
    assert dropped["cells without a nucleus outline"] == len(without) > 0
    assert store.attrs["image"]["mpp"] == pytest.approx(sample.truth.he_mpp)
    assert set(store.patches["group"]) == {"donor 1"}


def changed(sample, **files):
    """Return the sample with other files in place of the true ones."""
    truth = {**vars(sample.truth), **files}
    return SimpleNamespace(**{**vars(sample), "truth": SimpleNamespace(**truth)})


def test_nuclei_on_blank_glass_have_no_box_and_are_counted(sample, store, tmp_path, caplog):
    """The H&E lacks its right part; all that lies elsewhere has the boxes that it had."""
    truth = sample.truth
    image = tifffile.imread(truth.he_image, level=0)
    edge = image.shape[1] * 6 // 10
    image[:, edge:] = (243, 243, 244)
    torn = write_image(tmp_path / "torn.ome.tif", image, levels=1)
    found = run(changed(sample, he_image=torn), tmp_path)
    lost = (truth.nuclei_he[..., 0].min(axis=1) > edge + 8 / truth.he_mpp).sum()
    partly = (truth.nuclei_he[..., 0].max(axis=1) > edge).sum()
    assert 20 < lost <= found.attrs["dropped"]["nuclei on blank glass of the H&E image"] <= partly
    right = found.patches["x"].to_numpy()[np.repeat(np.arange(len(found)), np.diff(found.box_ptr))]
    assert (right + found.boxes[:, 0] * MPP / truth.he_mpp < edge + 8 / truth.he_mpp).all()
    assert store.attrs["dropped"]["nuclei on blank glass of the H&E image"] == 0
    warning = "lie on blank glass of the H&amp;E image"
    assert warning in found.path.with_suffix(".html").read_text()
    assert warning not in store.path.with_suffix(".html").read_text()
    assert "lie on blank glass" in caplog.text


def test_patches_that_xenium_did_not_segment_are_marked_and_shown(sample, store, tmp_path, caplog):
    assert store.patches["complete"].all()
    outs = shutil.copytree(sample.truth.outs, tmp_path / "outs")
    corners = pd.read_parquet(outs / NUCLEI)
    cells = corners["cell_id"].unique()
    kept = cells[np.random.default_rng(1).random(len(cells)) < 0.5]
    corners[corners["cell_id"].isin(kept)].to_parquet(outs / NUCLEI)
    half = changed(sample, outs=outs)
    assert run(half, tmp_path, max_unsegmented=1).patches["complete"].all()
    found = run(half, tmp_path)
    incomplete = ~found.patches["complete"]
    assert incomplete.mean() > 0.4
    page = found.path.with_suffix(".html").read_text()
    assert "Red squares" in page
    assert "Xenium did not segment" in caplog.text
    assert "Red squares" not in store.path.with_suffix(".html").read_text()
    table = pd.read_csv(found.path.with_suffix(".tsv"), sep="\t").set_index(["kind", "name"])["count"]
    reason = "patches in which Xenium did not segment many of the visible nuclei"
    assert table["total", reason] == incomplete.sum() < table["total", "patches"]


def test_patches_whose_nuclei_lie_elsewhere_are_left_out_counted_and_named(sample, store, tmp_path, caplog):
    """Beyond a fold the section is 20 um off."""
    outs = shutil.copytree(sample.truth.outs, tmp_path / "outs")
    corners = pd.read_parquet(outs / NUCLEI)
    middle = corners.groupby("cell_id", observed=True)["vertex_x"].transform("mean")
    beyond = middle > 180
    corners.loc[beyond, "vertex_y"] += 20
    corners.to_parquet(outs / NUCLEI)
    found = run(changed(sample, outs=outs), tmp_path)
    lost = found.attrs["patches_passed_over"]["with many nuclei where the H&E shows none (a fold, a tear)"]
    half = SIZE * MPP / sample.truth.he_mpp / 2
    corners_px = [part.patches[["x", "y"]].to_numpy() for part in (store, found)]
    places = [apply(sample.registration.he_to_um(), low + half)[:, 0] for low in corners_px]
    before, after = ((x > 180 + SIZE * MPP).sum() for x in places)
    assert lost >= before - after > 0.85 * before > 8
    before, after = ((x < 180 - SIZE * MPP).sum() for x in places)
    assert after > 0.9 * before > 8
    assert "where many of their nuclei should be the H&amp;E shows none" in found.path.with_suffix(".html").read_text()
    assert f"{lost} of " in caplog.text
    assert "many nuclei where" not in str(store.attrs["patches_passed_over"])


def test_no_patch_reaches_beyond_the_xenium_image(sample, store):
    truth = sample.truth
    assert store.attrs["patches_passed_over"]["beyond the imaged area"] > 0
    side = SIZE * MPP / truth.he_mpp
    corners = store.patches[["x", "y"]].to_numpy()[:, None] + side * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    there = corners @ truth.matrix[:2, :2].T + truth.matrix[:2, 2]
    slack = 25  # Xenium px: the map's cells are 8 um wide
    assert ((there > -slack) & (there < np.array(truth.xenium_size) + slack)).all()


def test_the_dark_pixels_are_in_the_boxes(store):
    """Nuclei are darker than what surrounds them: the registration was used in the right direction."""
    inside, outside = [], []
    for patch in map(store.read, range(len(store))):
        mask = np.zeros((SIZE, SIZE), bool)
        for x0, y0, x1, y1 in np.rint(patch.boxes).astype(int):
            mask[y0:y1, x0:x1] = True
        inside.append(patch.image[mask][:, 0])
        outside.append(patch.image[~mask][:, 0])
    assert np.concatenate(inside).mean() < np.concatenate(outside).mean() - 25


def test_the_summary_adds_up(store):
    table = pd.read_csv(store.path.with_suffix(".tsv"), sep="\t")
    counts = table[table["kind"] == "class"].set_index("name")["count"]
    assert counts.to_dict() == store.attrs["counts"]
    page = store.path.with_suffix(".html").read_text()
    assert page.count("<img") == 1 + min(12, len(store))
    assert all(name in page for name in ST_TYPES)


def test_no_patch_is_an_error_with_the_reasons(sample, tmp_path):
    text = "got no patch; .*with too few labelled nuclei.*look at the registration"
    with pytest.raises(InputError, match=text):
        run(sample, tmp_path, min_labelled=10_000)
    assert not (tmp_path / "s1.zarr").exists()


def test_cells_of_another_sample_are_refused(sample):
    polygons = pd.DataFrame({"cell_id": ["a"], "geometry": [None]})
    cells = pd.DataFrame({"cell_id": ["b"], "label": [1]})
    with pytest.raises(InputError, match=r"ids like \['b'\], but the nuclei have ids like \['a'\]"):
        place_nuclei(polygons, cells, sample.registration, MPP)
