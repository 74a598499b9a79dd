"""Affines and the alignment file: matrices and keypoints are read, wrong files are refused, mistakes are named."""

import re

import numpy as np
import pytest
from xenium_scene import EXTENT, PIXEL, planted

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.xenium.registration.affine import (
    affine,
    apply,
    decompose,
    fit_affine,
    fit_robust,
    inverse,
    rotation,
    scaling,
)
from celldetr.xenium.registration.alignment import check_plausible, read_alignment

MPP = 1.3 * PIXEL
XENIUM_SIZE = tuple((EXTENT / PIXEL).astype(int).tolist())
SETTINGS = RegistrationSettings()


@pytest.mark.parametrize(("angle", "flip"), [(-179.0, False), (-90.0, True), (33.0, True), (180.0, False)])
def test_a_matrix_is_decomposed(angle, flip):
    linear = rotation(angle) @ np.array([[1, 0.07], [0, 1]]) @ np.diag([1.2, 1.3]) @ np.diag([1, -1 if flip else 1])
    parts = decompose(affine(linear, (5, 6)))
    assert np.cos(np.radians(parts.rotation_degrees - angle)) == pytest.approx(1)
    assert (parts.scale_x, parts.scale_y, parts.shear) == pytest.approx((1.2, 1.3, 0.07))
    assert parts.reflected == flip
    assert parts.determinant == pytest.approx((-1 if flip else 1) * 1.2 * 1.3)


def test_a_matrix_file_is_read(tmp_path):
    matrix = planted(30, 1.3, (10, 20))[0]
    np.savetxt(tmp_path / "a.csv", matrix, delimiter=",")
    found = read_alignment(tmp_path / "a.csv")
    assert np.allclose(found.matrix, matrix)
    assert not found.residuals.size


def test_keypoints_are_fitted_over_all_rows_with_residuals(tmp_path):
    rng = np.random.default_rng(1)
    matrix = planted(-70, 1.3, shear=0.02)[0]
    he = rng.random((40, 2)) * 5000
    xenium = apply(matrix, he) + rng.normal(0, 3, (40, 2))
    table = np.column_stack([np.arange(40), he[:, 0], xenium[:, 0], he[:, 1], xenium[:, 1]])
    path, header = tmp_path / "k.csv", "\ufeffid,alignmentX,fixedX,alignmentY,fixedY"
    np.savetxt(path, table, delimiter=",", header=header, comments="", encoding="utf-8")
    found = read_alignment(path)
    least = np.linalg.lstsq(np.column_stack([he, np.ones(40)]), xenium, rcond=None)[0].T
    assert np.allclose(found.matrix[:2], least)
    assert np.median(np.linalg.norm(apply(found.matrix, he) - apply(matrix, he), axis=1)) < 3
    assert 1 < np.median(found.residuals) < 8


KEYS = "fixedX,fixedY,alignmentX,alignmentY\n"
BAD_FILES = {
    "empty": ("", "got an empty file"),
    "rows": ("1,0,0\n0,1,0\n", "got 2 rows"),
    "columns": ("1,0,0,0\n0,1,0,0\n0,0,1,0\n", "got 3 rows that begin with '1,0,0,0'"),
    "text": ("1,0,x\n0,1,0\n0,0,1\n", "could not convert"),
    "nan": ("1,0,nan\n0,1,0\n0,0,1\n", "not finite"),
    "header": ("x,y\n1,2\n3,4\n5,6\n", "got 4 rows that begin with 'x,y'"),
    "last row": ("1,0,0\n0,1,0\n0,0,2\n", "got the last row"),
    "transposed": ("1,0,0\n0,1,0\n300,200,1\n", "looks transposed"),
    "singular": ("1,2,0\n2,4,0\n0,0,1\n", "maps the image to a line"),
    "two keypoints": (KEYS + "0,0,0,0\n1,1,1,1\n", "got 2 keypoints"),
    "keypoints on a line": (KEYS + "0,0,0,0\n1,1,1,1\n2,2,2,2\n5,5,5,5\n", "lie on a line"),
    "short row": (KEYS + "0,0,0,0\n1,1,1\n2,2,2,2\n", "row 3 has too few columns"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_alignment_files_are_refused(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_alignment(tmp_path / "a.csv")


def test_robust_fit_ignores_wrong_pairs():
    rng = np.random.default_rng(2)
    source = rng.random((60, 2)) * 1000
    truth = affine([[1.01, 0.02], [-0.02, 0.99]], (12, -7))
    target = apply(truth, source) + rng.normal(0, 0.3, source.shape)
    wrong = rng.random(60) < 0.4
    target[wrong] += rng.uniform(-300, 300, (wrong.sum(), 2))
    found, agree = fit_robust(source, target, np.ones(60), 3.0, seed=0)
    assert np.abs(apply(found, source) - apply(truth, source)).max() < 1
    assert not (agree & wrong).sum() > 2
    assert np.abs(apply(fit_affine(source, target), source) - apply(truth, source)).max() > 5


MISTAKES = {
    "the inverse (Xenium px -> H&E px)": inverse,
    "um instead of Xenium px (H&E px -> um)": lambda matrix: scaling(PIXEL) @ matrix,
    "um instead of H&E px (H&E um -> Xenium px)": lambda matrix: matrix @ scaling(1 / MPP),
    "um on both sides (H&E um -> Xenium um)": lambda matrix: scaling(PIXEL) @ matrix @ scaling(1 / MPP),
    "the inverse, and um instead of Xenium px (um -> H&E px)": lambda matrix: inverse(scaling(PIXEL) @ matrix),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_likely_mistakes_are_named_and_undone(name):
    matrix, size = planted(20, 1.3)
    judged = check_plausible(MISTAKES[name](matrix), MPP, PIXEL, SETTINGS, size, XENIUM_SIZE)
    assert any("scale" in problem for problem in judged.problems)
    assert np.allclose(judged.mistakes[name], matrix)


@pytest.mark.parametrize("flip", [False, True])
def test_a_right_matrix_is_plausible_and_reflection_is_noted(flip):
    matrix, size = planted(20, 1.3, flip=flip)
    judged = check_plausible(matrix, MPP, PIXEL, SETTINGS, size, XENIUM_SIZE)
    assert not judged.problems
    assert any("mirrored" in note for note in judged.notes) == flip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.array([[1, 0, 1e6], [0, 1, 0], [0, 0, 1]]), "beside the Xenium image"),
        (np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]), "shear"),
        (np.diag([1.2, 1 / 1.2, 1]), "in x and"),
        (scaling(1.08), r"expected 1\.3 \(0\.2762 um per H&E px"),
    ],
)
def test_implausible_matrices_are_explained(change, message):
    matrix, size = planted(0, 1.3)
    problems = " ".join(check_plausible(change @ matrix, round(MPP, 4), PIXEL, SETTINGS, size, XENIUM_SIZE).problems)
    assert re.search(message, problems)
