"""Drawn PanNuke folds: layout, planted defects, and nuclei whose classes can be told apart."""

import hashlib
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import shapely

import make_example
from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.drawing import draw_he
from celldetr.example.images import label_image
from celldetr.example.pannuke import TISSUES, write_fold
from celldetr.example.tissue import grow_scene
from celldetr.pannuke.convert import nuclei_of

PANNUKE = {"neoplastic": 77403, "inflammatory": 32276, "connective": 50585, "necrotic": 2908, "epithelial": 26572}


def read(path, fold):
    with zipfile.ZipFile(path) as archive:
        names = [f"Fold {fold}/{part}.npy" for part in (f"images/fold{fold}/images", f"images/fold{fold}/types")]
        names.append(f"Fold {fold}/masks/fold{fold}/masks.npy")
        assert archive.namelist() == names
        return [np.lib.format.read_array(archive.open(name)) for name in names]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("fold") / "fold_2.zip"
    write_fold(path, 2, 14, 96, 5, mpp=0.5)
    return read(path, 2)


@pytest.fixture(scope="module")
def drawn():
    """Scenes of all kinds of tissue, drawn at 0.25 um/px: scene, image, nuclei."""
    scenes = []
    for index in range(6):
        rng = np.random.default_rng([11, index])
        scene = grow_scene(rng, (120, 120), "balanced")
        scenes.append((scene, *draw_he(rng, scene, 0.25)))
    return scenes


def test_layout_and_types(archive):
    images, types, masks = archive
    assert images.shape == (14, 96, 96, 3)
    assert masks.shape == (14, 96, 96, 6)
    assert images.dtype == masks.dtype == np.float64
    assert np.array_equal(images, np.round(images).clip(0, 255))
    assert set(types) <= set(TISSUES)
    assert set(np.unique(masks[..., 5])) == {0, 1}


def test_a_fold_has_each_defect_of_the_real_ones(archive, tmp_path):
    images, types, masks = archive
    odd = [nuclei_of(mask).odd for mask in masks]
    for name in ("one-pixel nuclei", "split nuclei", "overlap pixels", "void pixels", "empty images"):
        assert 0 < sum(found.get(name, 0) > 0 for found in odd) < len(odd), name
    ids = [[set(mask[..., channel].ravel()) - {0} for channel in range(5)] for mask in masks]
    assert any(len(set.union(*found)) < sum(map(len, found)) for found in ids), "an id in two channels"
    assert 100 < images[[not mask[..., :5].any() for mask in masks]].mean() < 250  # tissue without nuclei


def test_same_seed_same_bytes(tmp_path):
    def digest(fold, seed):
        write_fold(tmp_path / "f.zip", fold, 5, 48, seed, mpp=0.5)
        return hashlib.sha256((tmp_path / "f.zip").read_bytes()).hexdigest()

    first = digest(1, 7)
    assert digest(1, 7) == first
    assert digest(1, 8) != first
    assert digest(2, 7) != first
    assert [path.name for path in tmp_path.iterdir()] == ["f.zip"]


def test_label_images_number_the_pixels_whose_centres_lie_inside():
    scene = grow_scene(np.random.default_rng(0), (60, 50))
    polygons = [*scene.nuclei.outlines * 3.1 - 7.0, np.array([(5.0, 5.0), (150.0, 5.5), (5.5, 150.0), (99.0, 140.0)])]
    rows, columns = np.indices((140, 170)) + 0.5
    expected = np.zeros(rows.shape, dtype=int)
    for number, outline in enumerate(polygons, start=1):
        expected[shapely.contains_xy(shapely.Polygon(outline), columns, rows)] = number
    assert np.array_equal(label_image(polygons, expected.shape), expected)
    assert not label_image([], (3, 4)).any()


def features(drawn):
    """Area (um^2), width over length, optical density in red, and redness of each nucleus, with its class."""
    rows, names = [], []
    for scene, image, nuclei in drawn:
        density = -np.log(np.maximum(image, 1) / 255.0)
        for index, label in enumerate(scene.nuclei.classes, start=1):
            places = np.argwhere(nuclei == index) * 0.25
            if len(places) > 60 and places.min() > 1 and places.max() < 119:
                inside = density[nuclei == index].mean(axis=0)
                narrow, wide = np.sqrt(np.linalg.eigvalsh(np.cov(places.T)))
                rows.append((len(places) / 16, narrow / wide, inside[0], inside[1] - inside[0]))
                names.append(PANNUKE_CLASSES[label])
    return np.array(rows), np.array(names)


def test_classes_differ_as_for_a_pathologist_and_can_be_told_apart(drawn):
    rows, names = features(drawn)
    area, aspect, dark, red = ({c: np.median(rows[names == c, k]) for c in PANNUKE_CLASSES} for k in range(4))
    assert area["neoplastic"] > 1.4 * area["epithelial"] > 1.4 * area["inflammatory"]
    assert aspect["connective"] < 0.5 < aspect["epithelial"] < aspect["inflammatory"]
    assert dark["inflammatory"] > 1.2 * max(dark["neoplastic"], dark["epithelial"])
    assert red["necrotic"] > 1.3 * max(red[c] for c in PANNUKE_CLASSES if c != "necrotic")
    rows[:, 0] = np.log(rows[:, 0])
    centres = np.array([rows[names == c].mean(axis=0) for c in PANNUKE_CLASSES])
    spread = np.array([rows[names == c].std(axis=0) for c in PANNUKE_CLASSES])
    distance = (((rows[:, None] - centres) / spread) ** 2 + 2 * np.log(spread)).sum(axis=2)
    right = np.array(PANNUKE_CLASSES)[distance.argmin(axis=1)] == names
    assert min(right[names == c].mean() for c in PANNUKE_CLASSES) > 0.6
    assert right.mean() < 1.0  # no class is given away by a single property


def test_nuclei_stand_out_and_fill_their_outlines(drawn):
    for scene, image, nuclei in drawn:
        red = image[..., 0].astype(float)
        assert red[nuclei == 0].mean() - red[nuclei > 0].mean() > 50
        planted = shapely.area(shapely.polygons(scene.nuclei.outlines))
        drawn_area = np.bincount(nuclei.ravel(), minlength=len(planted) + 1)[1:] * 0.25**2
        assert 0.85 < np.median(drawn_area / planted) < 1.05  # a few lie below others, or reach over the edge


def composition(mixture, scenes):
    counts = np.zeros(5)
    for index in range(scenes):
        scene = grow_scene(np.random.default_rng([2, index]), (140, 140), mixture)
        counts += np.bincount(scene.nuclei.classes, minlength=5)
    return dict(zip(PANNUKE_CLASSES, counts / counts.sum(), strict=True)), counts.sum() / scenes


def test_classes_are_as_frequent_as_in_pannuke():
    shares, nuclei = composition("pannuke", 120)
    for name, count in PANNUKE.items():
        expected = count / sum(PANNUKE.values())
        assert abs(shares[name] - expected) < 0.02 + 0.2 * expected, name
    assert 19 < nuclei * 64**2 / 140**2 < 29  # 24 in a PanNuke image


@pytest.mark.parametrize("mixture", ["balanced", "example"])
def test_every_class_can_be_made_frequent(mixture):
    assert min(composition(mixture, 30)[0].values()) > 0.08


def test_the_rule_makes_one_archive_per_fold(tmp_path):
    outputs = [str(tmp_path / f"fold_{k}.zip") for k in (1, 2, 3)]
    params = SimpleNamespace(images=(2, 1, 3), patch_size=32, mpp=0.5, seed=9)
    make_example.main(SimpleNamespace(output=outputs, params=params, threads=2))
    assert [len(read(output, fold)[0]) for fold, output in enumerate(outputs, start=1)] == [2, 1, 3]
