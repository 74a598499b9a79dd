import hashlib
import importlib.util
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.defects import NO_DEFECTS, Defects, pieces
from celldetr.example.looks import LOOKS, MIXTURES, mixture_named
from celldetr.example.pannuke import TISSUES, write_fold
from celldetr.example.render import Renderer, draw_stain, render
from celldetr.example.tissue import grow_scene
from celldetr.runtime.errors import ConfigError

PANNUKE = {"neoplastic": 77403, "inflammatory": 32276, "connective": 50585, "necrotic": 2908, "epithelial": 26572}


def read(path, fold):
    with zipfile.ZipFile(path) as archive:
        names = [f"Fold {fold}/{part}.npy" for part in (f"images/fold{fold}/images", f"images/fold{fold}/types")]
        names.append(f"Fold {fold}/masks/fold{fold}/masks.npy")
        assert archive.namelist() == names
        assert archive.testzip() is None
        return [np.lib.format.read_array(archive.open(name)) for name in names]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("fold") / "fold_2.zip"
    return path, write_fold(path, 2, 14, 96, 5, mpp=0.5)


@pytest.fixture(scope="module")
def drawn():
    """Scenes of all kinds of tissue with their renderings at 0.25 um/px."""
    result = []
    for index in range(6):
        rng = np.random.default_rng([11, index])
        scene = grow_scene(rng, 120, 120, mixture=MIXTURES["balanced"])
        result.append((scene, render(scene, 0.25, (0, 0), (480, 480), stain=draw_stain(rng), seed=index)))
    return result


def test_layout_and_types(archive):
    images, types, masks = read(archive[0], 2)
    assert images.shape == (14, 96, 96, 3)
    assert masks.shape == (14, 96, 96, 6)
    assert images.dtype == masks.dtype == np.float64
    assert images.min() >= 0
    assert images.max() <= 255
    assert np.array_equal(images, np.round(images))
    assert types.shape == (14,)
    assert set(types) <= set(TISSUES)
    assert len(TISSUES) == 19
    assert set(np.unique(masks[..., 5])) == {0, 1}


def test_truth_is_what_the_archive_holds(archive):
    _, types, masks = read(archive[0], 2)
    for tissue, mask, truth in zip(types, masks, archive[1].images, strict=True):
        assert tissue == truth.tissue
        found = []
        for channel in range(5):
            for number in sorted(set(mask[..., channel].ravel()) - {0}):
                rows, columns = np.nonzero(mask[..., channel] == number)
                box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                found.append((*box, channel, number, rows.size))
        told = np.column_stack([truth.boxes, truth.labels, truth.ids, truth.area])
        assert np.array_equal(np.array(found, dtype=np.int64).reshape(-1, 7), told)


def test_defects_are_counted(archive):
    masks = read(archive[0], 2)[2].astype(int)
    claims = (masks[..., :5] > 0).sum(axis=-1)
    void = (claims == 0) & (masks[..., 5] == 0)
    parts = [pieces(m[..., c] == i) for m in masks for c in range(5) for i in set(m[..., c].ravel()) - {0}]
    ids = [[i for c in range(5) for i in set(m[..., c].ravel()) - {0}] for m in masks]
    assert archive[1].defects == {
        "empty_images": sum(not i for i in ids),
        "one_pixel_nuclei": sum(int((image.area == 1).sum()) for image in archive[1].images),
        "split_nuclei": sum(p > 1 for p in parts),
        "split_pieces": sum(p for p in parts if p > 1),
        "overlap_pixels": int((claims > 1).sum()),
        "overlap_images": int((claims > 1).any(axis=(1, 2)).sum()),
        "void_pixels": int(void.sum()),
        "void_images": int(void.any(axis=(1, 2)).sum()),
        "shared_ids": sum(len(i) - len(set(i)) for i in ids),
    }


def test_a_few_images_show_every_defect(archive):
    assert min(archive[1].defects.values()) > 0


def test_without_defects(tmp_path):
    truth = write_fold(tmp_path / "clean.zip", 1, 8, 64, 3, mpp=0.5, defects=NO_DEFECTS)
    planted = ("overlap_pixels", "void_pixels", "shared_ids")
    assert [truth.defects[name] for name in planted] == [0, 0, 0]


def test_defects_can_be_frequent(tmp_path):
    truth = write_fold(tmp_path / "f.zip", 1, 8, 64, 3, mpp=0.5, defects=Defects(0.5, 1, 1, 1, 1, 1))
    assert truth.defects["empty_images"] >= 4
    assert truth.defects["void_images"] >= 3


def test_same_seed_same_bytes(tmp_path):
    def digest(fold, seed):
        write_fold(tmp_path / "f.zip", fold, 5, 48, seed, mpp=0.5)
        return hashlib.sha256((tmp_path / "f.zip").read_bytes()).hexdigest()

    first = digest(1, 7)
    assert digest(1, 7) == first
    assert digest(1, 8) != first
    assert digest(2, 7) != first
    assert [p.name for p in tmp_path.iterdir()] == ["f.zip"]


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_tiny_folds(tmp_path, n_images):
    truth = write_fold(tmp_path / "f.zip", 3, n_images, 64, 1, mpp=0.5, dtype="int16")
    images, types, masks = read(tmp_path / "f.zip", 3)
    assert len(truth.images) == len(images) == len(types) == len(masks) == n_images
    assert images.dtype == masks.dtype == np.int16


@pytest.mark.parametrize(
    ("argument", "value"), [("patches_per_scene", 3), ("patch_size", 2), ("mpp", 0.0), ("dtype", "uint8")]
)
def test_impossible_settings_are_refused(tmp_path, argument, value):
    settings = {"patch_size": 32, argument: value}
    with pytest.raises(ConfigError, match=argument):
        write_fold(tmp_path / "f.zip", 1, 2, seed=1, **settings)
    assert not list(tmp_path.iterdir())


def test_unknown_mixtures_are_refused():
    with pytest.raises(ConfigError, match="pannuke"):
        mixture_named("tumor")
    with pytest.raises(ConfigError, match="fibrous stroma"):
        mixture_named({"bone": 1.0})


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.31])
def test_windows_fit_together(drawn, mpp):
    scene = drawn[0][0]
    renderer = Renderer(scene, draw_stain(np.random.default_rng(0)), 4)
    size = int(100 / mpp)
    whole = renderer.window(mpp, (7, 3), (size, size))
    cut = size // 3 + 1
    tiles = [
        [renderer.window(mpp, (7 + r, 3 + c), (min(cut, size - r), min(cut, size - c))) for c in range(0, size, cut)]
        for r in range(0, size, cut)
    ]
    for name in ("image", "nucleus"):
        put_together = np.concatenate([np.concatenate([getattr(t, name) for t in row], axis=1) for row in tiles])
        assert np.array_equal(put_together, getattr(whole, name))


def test_windows_may_leave_the_scene(drawn):
    scene = drawn[0][0]
    result = render(scene, 0.5, (-60, -60), (50, 50), stain=draw_stain(np.random.default_rng(0)), seed=1)
    assert not result.nucleus.any()


def test_nuclei_keep_their_size_at_any_resolution(drawn):
    scene, fine = drawn[0]
    coarse = render(scene, 0.5, (0, 0), (240, 240), stain=draw_stain(np.random.default_rng(0)), seed=0)
    areas = [
        np.bincount(r.nucleus.ravel(), minlength=len(scene.nuclei) + 1)[1:] * mpp**2
        for r, mpp in ((fine, 0.25), (coarse, 0.5))
    ]
    large = areas[0] > 15
    assert np.allclose(areas[0][large], areas[1][large], rtol=0.15)


def features(drawn):
    """Area (um^2), width over length, optical density in red, and redness of each nucleus, with its class."""
    rows, names = [], []
    for scene, result in drawn:
        density = -np.log(np.maximum(result.image, 1) / 255.0)
        for index, nucleus in enumerate(scene.nuclei, start=1):
            places = np.argwhere(result.nucleus == index) * 0.25
            if len(places) > 60 and places.min() > 1 and places.max() < 119:
                inside = density[result.nucleus == index].mean(axis=0)
                narrow, wide = np.sqrt(np.linalg.eigvalsh(np.cov(places.T)))
                rows.append((len(places) / 16, narrow / wide, inside[0], inside[1] - inside[0]))
                names.append(nucleus.look)
    return np.array(rows), np.array(names)


def test_classes_differ_as_they_do_for_a_pathologist(drawn):
    rows, names = features(drawn)
    area, aspect, dark, red = (
        {c: np.median(rows[names == c, k]) for c in PANNUKE_CLASSES} for k in range(4)
    )  # fmt: skip
    assert area["neoplastic"] > 1.4 * area["epithelial"] > 1.4 * area["inflammatory"]
    assert aspect["connective"] < 0.5 < aspect["epithelial"] < aspect["inflammatory"]
    assert dark["inflammatory"] > 1.2 * max(dark["neoplastic"], dark["epithelial"])
    assert red["necrotic"] > 1.3 * max(red[c] for c in PANNUKE_CLASSES if c != "necrotic")


def test_classes_can_be_told_apart(drawn):
    rows, names = features(drawn)
    rows[:, 0] = np.log(rows[:, 0])
    centres = np.array([rows[names == c].mean(axis=0) for c in PANNUKE_CLASSES])
    spread = np.array([rows[names == c].std(axis=0) for c in PANNUKE_CLASSES])
    distance = (((rows[:, None] - centres) / spread) ** 2 + 2 * np.log(spread)).sum(axis=2)
    right = np.array(PANNUKE_CLASSES)[distance.argmin(axis=1)] == names
    assert min(right[names == c].mean() for c in PANNUKE_CLASSES) > 0.6
    assert right.mean() < 1.0  # no class is given away by a single look


def test_nuclei_stand_out(drawn):
    for _, result in drawn:
        red = result.image[..., 0].astype(float)
        assert red[result.nucleus == 0].mean() - red[result.nucleus > 0].mean() > 50


def composition(mixture, scenes):
    counts = Counter()
    for index in range(scenes):
        scene = grow_scene(np.random.default_rng([2, index]), 140, 140, mixture=MIXTURES[mixture])
        counts.update(nucleus.look for nucleus in scene.nuclei)
    return {name: counts[name] / counts.total() for name in PANNUKE_CLASSES}, counts.total() / scenes


def test_classes_are_as_frequent_as_in_pannuke():
    shares, nuclei = composition("pannuke", 120)
    for name, count in PANNUKE.items():
        expected = count / sum(PANNUKE.values())
        assert abs(shares[name] - expected) < 0.02 + 0.2 * expected, name
    assert 19 < nuclei * 64**2 / 140**2 < 29  # 24 in a PanNuke image


@pytest.mark.parametrize("mixture", ["balanced", "example"])
def test_every_class_can_be_made_frequent(mixture):
    assert min(composition(mixture, 30)[0].values()) > 0.08
    assert set(LOOKS) == set(PANNUKE_CLASSES)


def test_density_scales_the_number_of_nuclei():
    few, many = (len(grow_scene(np.random.default_rng(3), 200, 200, density=d).nuclei) for d in (0.4, 1.0))
    assert few < 0.6 * many


class Settings(dict):
    __getattr__ = dict.__getitem__


def test_the_rule_makes_one_archive_per_fold(tmp_path):
    path = Path(__file__).parents[3] / "scripts" / "make_example.py"
    spec = importlib.util.spec_from_file_location("make_example", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outputs = [str(tmp_path / f"fold_{k}.zip") for k in (1, 2, 3)]
    params = Settings(images=(2, 1, 3), patch_size=32, mpp=0.5, seed=9)
    script.main(Settings(output=outputs, params=params, threads=2))
    assert [len(read(output, fold)[0]) for fold, output in enumerate(outputs, start=1)] == [2, 1, 3]
