"""Local distortion: planted smooth fields come back, outliers and gaps do not pull, no distortion stays none."""

import numpy as np
import pytest
from scipy.spatial import cKDTree
from xenium_scene import wave

from celldetr.runtime.errors import InputError
from celldetr.xenium.registration import distortion
from celldetr.xenium.registration.distortion import WindowShifts, estimate_field
from celldetr.xenium.registration.field import DisplacementField, FieldFit

SIZE = np.array([900.0, 700.0])


def section(bend, *, seed=0, noise=0.5, shown=None):
    """DAPI nuclei (n, 2), their H&E nuclei (8 % missing, 8 % others), and shifts of windows, of which 15 % are wrong.

    `shown` says which points the H&E shows.
    """
    rng = np.random.default_rng(seed)
    nuclei = rng.random((6000, 2)) * SIZE
    alive = np.ones(len(nuclei), dtype=bool)
    for one, other in sorted(cKDTree(nuclei).query_pairs(6.5)):
        alive[other] &= not alive[one]
    nuclei = nuclei[alive]
    seen = rng.random(len(nuclei)) > 0.08
    if shown is not None:
        seen &= shown(nuclei)
    blobs = nuclei[seen] + bend(nuclei[seen]) + rng.normal(0, noise, (seen.sum(), 2))
    others = rng.random((len(nuclei) // 12, 2)) * SIZE
    others = others if shown is None else others[shown(others)]
    centres = np.stack(np.meshgrid(*(np.arange(50, side - 25, 50.0) for side in SIZE)), axis=-1).reshape(-1, 2)
    shifts, score = bend(centres) + rng.normal(0, 0.5, centres.shape), rng.uniform(0.2, 0.5, len(centres))
    wrong = rng.random(len(centres)) < 0.15
    shifts[wrong] = rng.uniform(-14, 14, (wrong.sum(), 2))
    if shown is not None:
        blank = ~shown(centres)
        shifts[blank], score[blank] = rng.uniform(-14, 14, (blank.sum(), 2)), 0.05
    return WindowShifts(centres, shifts, score), np.vstack([blobs, others]), nuclei


def errors(field, nuclei, bend):
    return np.linalg.norm(field.displacement(nuclei) - bend(nuclei), axis=1)


@pytest.mark.parametrize(("largest", "length"), [(2, 300), (6, 300), (6, 600), (4, 1000)])
def test_planted_fields_come_back(largest, length):
    bend = wave(largest, length)
    windows, blobs, nuclei = section(bend)
    field, figures = estimate_field(windows, blobs, nuclei, seed=0)
    off = errors(field, nuclei, bend)
    assert np.median(off) < 0.35
    assert np.percentile(off, 95) < 1
    assert figures.after < figures.before
    assert figures.squares_helped > 0.8 * figures.squares
    assert figures.largest == pytest.approx(np.linalg.norm(bend(nuclei), axis=1).max(), rel=0.2)


def test_threads_and_the_short_search_for_the_stiffness_give_the_same_field(monkeypatch):
    """On a large section one part of the H&E nuclei chooses the stiffness."""
    points = section(wave(4, 300))
    first, figures = estimate_field(*points, seed=0)
    second, same = estimate_field(*points, seed=0, workers=3)
    assert (first.digest, figures) == (second.digest, same)
    monkeypatch.setattr(distortion, "_MANY", 1000)
    short, _ = estimate_field(*points, seed=0)
    assert np.abs(short.displacement(points[-1]) - first.displacement(points[-1])).max() < 0.3
    assert np.percentile(errors(short, points[-1], wave(4, 300)), 95) < 1


@pytest.mark.parametrize(("noise", "seed"), [(0.1, 0), (1.0, 1)])
def test_no_distortion_stays_none(noise, seed):
    windows, blobs, nuclei = section(np.zeros_like, seed=seed, noise=noise)
    field, figures = estimate_field(windows, blobs, nuclei, seed=seed)
    assert field is None
    assert not figures.kept


def test_nuclei_of_another_section_give_no_field():
    windows, _, nuclei = section(wave(4, 500))
    _, blobs, _ = section(np.zeros_like, seed=1)
    rng = np.random.default_rng(0)
    field, _ = estimate_field(windows, rng.permuted(blobs, axis=0), nuclei, seed=0)
    assert field is None


def test_a_missing_third_is_not_pulled():
    """Where the H&E shows nothing, the field falls to nothing; the rest is as right as without the gap."""
    bend = wave(5, 500)
    windows, blobs, nuclei = section(bend, shown=lambda points: points[:, 0] < 600)
    field, _ = estimate_field(windows, blobs, nuclei, seed=0)
    there = nuclei[:, 0] < 590
    assert np.percentile(errors(field, nuclei[there], bend), 95) < 1
    size = np.linalg.norm(field.displacement(nuclei), axis=1)
    assert size.max() < 7
    assert size[nuclei[:, 0] > 850].max() < 1.5
    windows, blobs, nuclei = section(np.zeros_like, shown=lambda points: points[:, 0] < 600)
    assert estimate_field(windows, blobs, nuclei, seed=0)[0] is None


def test_a_fold_leaves_the_rest_alone():
    """Beyond a fold, the section lies elsewhere: 40 um to the side, too far to be followed."""
    smooth = wave(4, 500)

    def bend(points):
        return np.where(points[:, :1] > 600, (40.0, 25.0), smooth(points))

    windows, blobs, nuclei = section(bend)
    wrong = windows.centres[:, 0] > 600
    windows.score[wrong] = 0.05
    windows.shifts[wrong] = np.random.default_rng(0).uniform(-14, 14, (wrong.sum(), 2))
    field, figures = estimate_field(windows, blobs, nuclei, seed=0)
    there = nuclei[:, 0] < 580
    assert np.median(errors(field, nuclei[there], smooth)) < 0.4
    assert np.percentile(errors(field, nuclei[there], smooth), 95) < 1.5
    assert figures.squares_helped < figures.squares
    assert np.median(np.linalg.norm(field.displacement(nuclei[nuclei[:, 0] > 700]), axis=1)) < 1


def test_too_few_nuclei_are_no_reason_for_a_field():
    windows, blobs, nuclei = section(wave(4, 500))
    assert estimate_field(windows, blobs[:50], nuclei, seed=0) == (None, None)
    none = WindowShifts(np.empty((0, 2)), np.empty((0, 2)), np.empty(0))
    field, _ = estimate_field(none, blobs, nuclei, seed=0)
    assert np.median(errors(field, nuclei, wave(4, 500))) < 1  # pairs alone


def test_a_fit_is_exact_where_there_is_enough_and_nothing_far_away():
    rng = np.random.default_rng(0)
    points = rng.random((4000, 2)) * 500
    shifts = np.column_stack([0.01 * points[:, 0], 3 - 0.01 * points[:, 1]])
    used = np.flatnonzero(points[:, 0] < 250)
    field = FieldFit(points, 0.1).solve(used, shifts[used], np.ones(len(used)))
    assert field.displacement(points[used]) == pytest.approx(shifts[used], abs=0.15)
    wide = FieldFit(np.vstack([points, [(2000.0, 250.0)]]), 0.1).solve(used, shifts[used], np.ones(len(used)))
    assert np.abs(wide.displacement(np.array([[1900.0, 250.0]]))).max() < 0.05


def test_a_field_says_the_same_in_its_file_on_grids_and_beyond_its_knots():
    rng = np.random.default_rng(0)
    field = DisplacementField(x=-100, y=20, spacing=40, coefficients=rng.normal(size=(2, 6, 9)))
    again = DisplacementField.model_validate(field.to_dict())
    points = rng.random((50, 2)) * 300
    assert np.array_equal(again.displacement(points), field.displacement(points))
    assert again.digest == field.digest
    assert again.digest != field.model_copy(update={"x": 0.0}).digest
    x, y = field.over(np.array([[3.0, 50.0]]), np.array([[70.0], [90.0], [99.0]]))
    assert np.allclose([x[2, 1], y[2, 1]], field.move(np.array([[50.0, 99.0]]))[0])
    far = field.displacement(np.array([[1e6, 70.0], [-100 + 7 * 40, 70.0]]))
    assert far[0] == pytest.approx(far[1])


@pytest.mark.parametrize("values", [np.ones((2, 3, 9)), np.ones((1, 6, 9)), np.full((2, 6, 9), np.nan)])
def test_coefficients_that_are_no_field_are_refused(values):
    with pytest.raises((InputError, ValueError), match="expected finite ones"):
        DisplacementField(x=0, y=0, spacing=40, coefficients=values)
    with pytest.raises((InputError, ValueError), match="got a displacement of 90 um"):
        DisplacementField(x=0, y=0, spacing=40, coefficients=np.full((2, 6, 9), 90.0))
