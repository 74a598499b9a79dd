"""The gate on sections that miss pieces: nuclei of one image only, fields of tissue on glass, few nuclei; and gains."""

import numpy as np
import pytest
import shapely
from scipy import ndimage
from xenium_scene import EXTENT, PIXEL, ellipses, make_scene

from celldetr.config.xenium import RegistrationSettings
from celldetr.xenium.registration.affine import affine, apply, fit_affine, rotation, scaling
from celldetr.xenium.registration.gain import compare
from celldetr.xenium.registration.gate import check
from celldetr.xenium.registration.nuclei import DapiNuclei, blob_responses, find_blobs

SETTINGS = RegistrationSettings(regions=3, window=120)
MIDDLE = EXTENT / 2


def about(linear, shift=(0.0, 0.0)):
    """Return a linear map (2, 2) about the middle of the section, then a shift, um."""
    return affine(linear, MIDDLE - linear @ MIDDLE + np.array(shift))


WRONG = {
    "5 um": about(np.eye(2), (4, -3)),
    "10 um": about(np.eye(2), (-6, -8)),
    "30 um": about(np.eye(2), (18, 24)),
    "4 degrees": about(rotation(4.0)),
    "1.04 times": about(1.04 * np.eye(2)),
    "mirrored": about(np.diag([-1.0, 1.0])),
}


def judge(scene, nuclei, change=None):
    """Check the planted matrix, or one that is wrong by a matrix in um, with some of the nuclei."""
    to_um = scaling(PIXEL) @ scene.matrix
    found = DapiNuclei(nuclei)
    return check(to_um if change is None else change @ to_um, scene.he, found, found.regions(SETTINGS), SETTINGS)


def centres(nuclei):
    return shapely.get_coordinates(shapely.centroid(nuclei))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene"), seed=4, angle=25)


@pytest.fixture(scope="module")
def pale(tmp_path_factory):
    """Draw the same section, but half of its nuclei are invisible in the H&E."""
    return make_scene(tmp_path_factory.mktemp("pale"), seed=4, angle=25, visible=0.5)


CASES = [("scene", case) for case in ("half", "a third", "no right half", "chequers")]


@pytest.mark.parametrize(("which", "case"), [*CASES, ("pale", "all"), ("pale", "half")])
def test_nuclei_that_one_image_lacks_do_not_count(request, which, case):
    """Not segmented at random or in whole areas: the right matrix passes, wrong ones fail, both clearly."""
    scene, rng = request.getfixturevalue(which), np.random.default_rng(0)
    nuclei = scene.nuclei
    x, y = centres(nuclei).T
    kept = {
        "all": x > 0,
        "half": rng.random(len(nuclei)) < 0.5,
        "a third": rng.random(len(nuclei)) < 0.34,
        "no right half": x < MIDDLE[0],
        "chequers": (x // 60 + y // 60) % 2 == 0,
    }[case]
    quality = judge(scene, nuclei[kept])
    assert quality.passed, quality.failures
    assert quality.distance < 0.4 * quality.chance
    for name, change in WRONG.items():
        quality = judge(scene, nuclei[kept], change)
        assert not quality.passed, name
        assert quality.distance is None or quality.distance > 0.75 * quality.chance, name


def test_nuclei_of_another_section_fail_even_if_few(scene):
    other = ellipses(np.random.default_rng(99))
    for share in (1.0, 0.5, 0.25):
        assert not judge(scene, other[np.random.default_rng(1).random(len(other)) < share]).passed


def test_a_matrix_that_puts_most_of_the_section_on_glass_fails(scene):
    """Only one corner of the section meets tissue, and rightly so: that is not enough to judge all of it."""
    nuclei = scene.nuclei
    corner = (centres(nuclei) < (150, 120)).all(axis=1)
    elsewhere = shapely.transform(nuclei[~corner], lambda points: points + (420, 0))
    quality = judge(scene, np.concatenate([nuclei[corner], elsewhere]))
    assert not quality.passed
    assert any("min_inside" in failure for failure in quality.failures)


def test_fields_of_tissue_on_glass_are_judged_by_their_nuclei(tmp_path):
    fields = tuple(shapely.Point(x, y).buffer(30) for x, y in [(70, 80), (240, 70), (330, 220), (130, 230)])
    scene = make_scene(tmp_path, seed=4, angle=25, tissue=fields)
    quality = judge(scene, scene.nuclei)
    assert quality.passed, quality.failures
    assert quality.he_nuclei < 1.2 * len(scene.nuclei)
    for name, change in WRONG.items():
        assert not judge(scene, scene.nuclei, change).passed, name


def test_glass_has_no_nuclei_and_pale_ones_are_found():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :200]
    pale = 0.04 * ((x - 60.5) ** 2 + (y - 130.5) ** 2 < 8**2)  # a disc of 4 um radius, optical density
    noise = ndimage.gaussian_filter(rng.normal(0, 0.01, (200, 200)), 0.7)
    for glass in (0.0, 0.05, 0.2 * x / 200, 0.02 + noise):
        assert len(find_blobs(blob_responses(np.full((200, 200), glass, np.float32)))[0]) == 0
        found, strength = find_blobs(blob_responses((pale + glass).astype(np.float32)))
        assert found == pytest.approx(np.array([[61, 131]]), abs=0.6)
        assert 0.02 < strength[0] < 0.05


def fitted(seed, off, size=(400, 300), noise=0.6):
    """Gain (n,) of fitting H&E to DAPI nuclei, where the matrix was off by `off` um and nuclei are by `noise`."""
    rng = np.random.default_rng(seed)
    nuclei = rng.random((size[0] * size[1] // 150, 2)) * size
    blobs = nuclei + rng.normal(0, noise, nuclei.shape) + off * np.array([0.6, -0.8])
    update = fit_affine(blobs, nuclei, np.ones(len(nuclei)), stiffness=0.0)
    before, after = (np.linalg.norm(points - nuclei, axis=1) for points in (blobs, apply(update, blobs)))
    return compare(nuclei, before, after)


def test_a_gain_is_significant_if_there_was_an_error_and_only_then():
    assert not any(fitted(seed, 0.0).significant for seed in range(100))
    assert all(fitted(seed, 0.4).significant for seed in range(20))
    assert all(fitted(seed, 0.0).mean >= -0.01 for seed in range(20))  # the fit is to the same nuclei
    assert not any(fitted(seed, -3.0, size=(40, 40)).significant for seed in range(20))  # one square tells nothing


def test_a_loss_and_a_gain_in_one_corner_are_not_significant():
    rng = np.random.default_rng(0)
    places = rng.random((800, 2)) * (400, 300)
    near, far = rng.rayleigh(0.6, (2, 800))
    assert not compare(places, near, near + 0.5).significant
    assert not compare(places, near, near).significant
    corner = (places < 50).all(axis=1)
    assert not compare(places, np.where(corner, near + 3, near), near).significant
    assert compare(places, near + 0.2, near).significant
    assert not compare(places, near, far).significant
