"""Drawn Xenium samples: what was planted is in the files, for each version of the folder layout."""

import hashlib
import json
import warnings
import zipfile

import anndata
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata_io

from celldetr.config.classes import ST_TYPES
from celldetr.example.xenium.expression import (
    PANEL,
    REFERENCE_LABELS,
    draw_counts,
    draw_types,
    gene_id,
    profiles,
    write_reference,
)
from celldetr.example.xenium.sample import AffinePlan, write_xenium
from celldetr.runtime.errors import ConfigError
from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.output import dapi_path

VERSIONS = ("1.0.1", "1.5.0", "2.0.0", "3.0.0.15", "4.0.0")
NO_RIM = {"size_um": (80.0, 60.0), "rim_um": 0.0}
TURNED = AffinePlan(rotation_deg=17.0, shift_um=(25.0, 10.0), shear=0.03)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return write_xenium(folder, seed=1, size_um=(260.0, 220.0), rim_um=30.0, affine=TURNED, archive=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "atlas.h5ad"
    return write_reference(path, seed=3, cells=1200), anndata.read_h5ad(path)


def mapped(matrix, points):
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def under(image, polygons):
    """Mean grey value of the pixels under the middles of polygons (px)."""
    middles = polygons.mean(axis=1)
    inside = (middles >= 0).all(axis=1) & (middles < image.shape[1::-1]).all(axis=1)
    columns, rows = middles[inside].astype(int).T
    return image[rows, columns].mean()


@pytest.mark.parametrize("version", VERSIONS)
def test_folders_of_all_versions_are_read_by_spatialdata_io(tmp_path, version):
    truth = write_xenium(tmp_path, seed=4, size_um=(150.0, 120.0), rim_um=0.0, version=version)
    number = np.bincount(truth.nucleus_cell, minlength=len(truth.cell_ids))
    assert set(number) == ({1} if version.startswith("1") else {0, 1, 2})  # nuclei of a cell
    assert np.diff(truth.nucleus_cell).min() >= 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = spatialdata_io.xenium(truth.outs, transcripts=False)
    assert not [w for w in caught if "report" in str(w.message) or "parse the version" in str(w.message)]
    table = read.tables["table"]
    assert list(table.var_names) == list(truth.genes) == list(PANEL)
    assert (truth.counts != table.X).nnz == 0
    assert table.obs["cell_id"].astype(str).tolist() == truth.cell_ids.tolist()
    polygons = read.shapes["nucleus_boundaries"].geometry
    for polygon, planted in zip(polygons, truth.nuclei_um, strict=True):
        assert np.abs(shapely.get_coordinates(polygon)[:-1] - planted).max() < 1e-4
    assert len(read.shapes["cell_boundaries"]) == len(truth.cell_ids)
    assert read.shapes["cell_boundaries"].geometry.is_valid.all()
    assert ("morphology_mip" in read.images) == version.startswith("1")

    labels = read.labels["nucleus_labels"]
    labels = np.asarray(labels["scale0"]["image"] if "scale0" in labels else labels)
    assert labels.shape == truth.xenium_size[::-1]
    own = truth.nucleus_cell + 1 if version.startswith("1") else np.arange(1, len(truth.nuclei_um) + 1)
    columns, rows = (truth.nuclei_um.mean(axis=1) / truth.pixel_size).astype(int).T
    assert np.mean(labels[rows, columns] == own) > 0.93  # a later nucleus may lie above an earlier one


def test_both_images_show_the_nuclei_where_the_matrix_says(sample):
    to_um = np.diag([sample.pixel_size, sample.pixel_size, 1.0]) @ sample.matrix
    assert np.abs(mapped(to_um, sample.nuclei_he) - sample.nuclei_um).max() < 1e-6
    with open_pyramid(sample.he_image) as image:
        assert image.mpp == pytest.approx(0.4)
        red = image.read(0, 0, 0, *sample.he_size)[..., 0].astype(float)
    with open_pyramid(dapi_path(sample.outs)) as image:
        dapi = image.read(0, 0, 0, *sample.xenium_size).astype(float)
    px = mapped(sample.matrix, sample.nuclei_he)
    assert under(red, sample.nuclei_he) < 0.75 * np.median([under(red, sample.nuclei_he + 15), 210])
    exact = under(dapi, px)
    assert exact > 2.5 * under(dapi, px + 30)
    for shift in ((12, 0), (0, 12), (-12, 0), (0, -12)):  # 2.5 um
        assert under(dapi, px + shift) < 0.9 * exact


def test_glass_surrounds_an_irregular_outline_of_tissue(sample):
    with open_pyramid(sample.he_image) as image:
        pixels = image.read(0, 0, 0, *sample.he_size)
    rim = round(30 / 0.4)
    for strip in (pixels[: rim - 8], pixels[8 - rim :], pixels[:, : rim - 8], pixels[:, 8 - rim :]):
        assert strip.min() > 200
    outline = shapely.Polygon(sample.tissue)
    assert 0.4 < outline.area / shapely.envelope(outline).area < 0.97
    assert shapely.contains_xy(outline, *sample.drawn_he.mean(axis=1).T).all()
    assert np.allclose(sample.tissue.min(axis=0), rim, atol=1)
    assert np.allclose(sample.tissue.max(axis=0), np.array(sample.he_size) - rim, atol=1)


def test_shift_moves_the_tissue_and_a_negative_one_cuts_it_off(tmp_path):
    still, moved, cut = (
        write_xenium(tmp_path / str(k), seed=1, affine=AffinePlan(shift_um=shift), **NO_RIM)
        for k, shift in enumerate([(0.0, 0.0), (30.0, 12.0), (-50.0, 0.0)])
    )
    assert np.allclose((moved.matrix - still.matrix)[:2, 2] * 0.2125, [30, 12])
    assert len(moved.drawn_he) == len(still.drawn_he)
    assert 0 < len(cut.cell_ids) < len(still.cell_ids)
    assert len(cut.drawn_he) > len(cut.nuclei_he)
    assert cut.nuclei_um.min() >= 0
    assert cut.xenium_size[0] == pytest.approx(still.xenium_size[0] - 50 / 0.2125, abs=1)


def test_alignment_file_is_the_planned_affine_times_its_error(tmp_path):
    error = AffinePlan(shift_um=(7.0, -3.0), rotation_deg=1.0)
    wrong = write_xenium(tmp_path, seed=1, affine=TURNED, file_error=error, **NO_RIM)
    assert np.linalg.det(wrong.matrix) == pytest.approx((0.4 / 0.2125) ** 2)
    assert np.rad2deg(np.arctan2(wrong.matrix[1, 0], wrong.matrix[0, 0])) == pytest.approx(17)
    assert wrong.nuclei_um.min() >= 0
    assert (wrong.nuclei_um <= np.array(wrong.xenium_size) * wrong.pixel_size).all()
    read = np.loadtxt(wrong.alignment, delimiter=",")
    assert np.allclose(read, wrong.written_matrix)
    middle = wrong.tissue.mean(axis=0, keepdims=True)
    moved = (mapped(read, middle) - mapped(wrong.matrix, middle)) * wrong.pixel_size
    assert np.allclose(moved, [[7, -3]])
    turn = read[:2, :2] @ np.linalg.inv(wrong.matrix[:2, :2])
    assert np.rad2deg(np.arctan2(turn[1, 0], turn[0, 0])) == pytest.approx(1.0)


def test_keypoints_fit_the_truth_up_to_their_noise(tmp_path):
    truth = write_xenium(tmp_path, seed=1, alignment="keypoints", affine=TURNED, **NO_RIM)
    table = pd.read_csv(truth.alignment)
    assert table.columns.tolist() == ["fixedX", "fixedY", "alignmentX", "alignmentY"]
    points = table[["alignmentX", "alignmentY"]].to_numpy()
    error = mapped(truth.matrix, points) - table[["fixedX", "fixedY"]].to_numpy()
    assert 0.05 < np.abs(error).mean() * truth.pixel_size < 1.0


def test_archive_holds_the_folder_at_its_root(sample):
    files = {f.relative_to(sample.outs).as_posix(): f.read_bytes() for f in sample.outs.rglob("*") if f.is_file()}
    with zipfile.ZipFile(sample.archive) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert json.loads(files["experiment.xenium"])["num_cells"] == len(sample.cell_ids)


def test_same_arguments_give_the_same_bytes_and_other_seeds_others(tmp_path):
    def digests(name, seed):
        write_xenium(tmp_path / name, seed=seed, archive=True, **NO_RIM)
        files = sorted(f for f in (tmp_path / name).rglob("*") if f.is_file())
        return {f.relative_to(tmp_path / name): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    first, again, other = digests("a", 1), digests("b", 1), digests("c", 2)
    assert first == again
    assert first.keys() == other.keys()
    assert not [name for name in first if first[name] == other[name] and name.suffix not in (".csv", ".xenium")]


def test_classes_decide_types(sample):
    assert set(sample.types[sample.classes == "neoplastic"]) == {"Malignant"}
    assert set(sample.types[sample.classes == "epithelial"]) <= {"Epithelial"}
    types, subtypes = draw_types(np.random.default_rng(0), ["connective"] * 2000 + ["inflammatory"] * 4000)
    share = pd.Series(types[:2000]).value_counts(normalize=True)
    assert share["Fibroblast"] == pytest.approx(0.75, abs=0.04)
    assert set(share.index) == {"Fibroblast", "Endothelial"}
    share = pd.Series(types[2000:]).value_counts(normalize=True)
    assert share["T"] == pytest.approx(0.40, abs=0.03)
    assert share["Mast"] == pytest.approx(0.05, abs=0.02)
    assert all(REFERENCE_LABELS[label] == kind for label, kind in zip(subtypes, types, strict=True))


def test_expression_tells_the_types():
    rng = np.random.default_rng(5)
    types, subtypes = draw_types(rng, rng.choice(["neoplastic", "epithelial", "connective", "inflammatory"], 1500))
    counts = draw_counts(rng, subtypes, rng.uniform(0, 400, (1500, 2))).toarray()
    assert np.median(counts.sum(axis=1)) == pytest.approx(58, abs=6)
    means = np.stack(
        [np.mean([p for k, p in profiles(PANEL).items() if REFERENCE_LABELS[k] == t], axis=0) for t in ST_TYPES]
    )
    assert np.mean(np.array(ST_TYPES)[(counts @ np.log(means).T).argmax(axis=1)] == types) > 0.93
    for kind, gene in (("T", "CD3E"), ("Mast", "KIT"), ("Endothelial", "VWF"), ("Plasma", "MZB1"), ("B", "MS4A1")):
        mean = [counts[types == t, PANEL.index(gene)].mean() for t in ST_TYPES]
        assert ST_TYPES[int(np.argmax(mean))] == kind
    assert (counts.var(axis=0) > counts.mean(axis=0)).mean() > 0.9  # beyond Poisson


def test_necrotic_cells_hold_few_transcripts(sample):
    total = np.asarray(sample.counts.sum(axis=1)).ravel()
    assert np.median(total[sample.types != "-"]) == pytest.approx(60, rel=0.25)
    rng = np.random.default_rng(0)
    dead = draw_counts(rng, np.array(["-"] * 300), rng.uniform(0, 300, (300, 2)))
    assert np.mean(np.asarray(dead.sum(axis=1)) < 10) > 0.97


def test_reference_is_in_the_style_of_cellxgene(reference):
    cells, table = reference
    raw = table.raw.X.toarray()
    assert raw.shape == table.X.shape
    assert np.array_equal(raw, np.round(raw))
    assert np.allclose(np.expm1(table.X.toarray()).sum(axis=1), 1e4, rtol=1e-3)
    assert table.var_names.str.match(r"^ENSG\d{11}$").all()
    assert table.var_names.is_unique
    names = table.var["feature_name"].astype(str)
    assert 3 <= names.duplicated().sum() <= 5
    assert 3 <= len(set(PANEL) - set(names)) <= 5
    assert all(gene_id(symbol) == identifier for identifier, symbol in names[~names.duplicated()].items())
    assert table.obs["cell_type"].value_counts().to_dict() == cells.to_dict()
    assert set(cells.index) == set(REFERENCE_LABELS)


def test_type_means_of_the_reference_tell_the_types_of_a_sample(reference, sample):
    _, table = reference
    names = table.var["feature_name"].astype(str).to_numpy()
    shared = [gene for gene in PANEL if gene in set(names)]
    columns = [int(np.flatnonzero(names == gene)[0]) for gene in shared]
    kinds = table.obs["cell_type"].map(REFERENCE_LABELS).astype(str).to_numpy()
    raw = table.raw.X.toarray()[:, columns]
    means = np.stack([np.log1p(1e3 * raw[kinds == t].sum(axis=0) / raw[kinds == t].sum()) for t in ST_TYPES])
    keep = (np.asarray(sample.counts.sum(axis=1)).ravel() >= 20) & (sample.types != "-")
    counts = sample.counts.toarray()[keep][:, [PANEL.index(gene) for gene in shared]]
    cells = np.log1p(1e3 * counts / counts.sum(axis=1, keepdims=True))
    likeness = np.corrcoef(cells, means)[: len(cells), len(cells) :]
    assert np.mean(np.array(ST_TYPES)[likeness.argmax(axis=1)] == sample.types[keep]) > 0.9


def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="version '5.0.0', expected one from 1.0.0 to 4.x"):
        write_xenium(tmp_path / "sample", seed=1, version="5.0.0", **NO_RIM)
    with pytest.raises(ConfigError, match="got no nucleus on tissue of 3.0 um x 4.0 um"):
        write_xenium(tmp_path / "sample", seed=1, size_um=(3.0, 4.0))
    with pytest.raises(ConfigError, match="got 3, expected at least 18"):
        write_reference(tmp_path / "r.h5ad", seed=1, cells=3)
    assert not list(tmp_path.iterdir())
