"""Outlines of nuclei against the DAPI image of their own folder: right ones are silent, others are told or refused."""

import numpy as np
import pytest
import shapely
from xenium_scene import EXTENT, PIXEL, make_scene

from celldetr.config.xenium import RegistrationSettings
from celldetr.example.xenium.sample import write_xenium
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.output import dapi_path, read_nuclei
from celldetr.xenium.registration.affine import affine, apply, inverse, rotation, scaling
from celldetr.xenium.registration.alignment import Alignment
from celldetr.xenium.registration.messages import refusal
from celldetr.xenium.registration.nuclei import DapiNuclei
from celldetr.xenium.registration.own_image import check_outlines
from celldetr.xenium.registration.register import register

SETTINGS = RegistrationSettings(regions=3, window=120, angle_step=15)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene"), seed=4, angle=25, scale=1.288)


def warnings(dapi, outlines, settings=SETTINGS):
    nuclei = DapiNuclei(outlines)
    return check_outlines(dapi, nuclei, nuclei.regions(settings), PIXEL, settings)


def moved(outlines, matrix):
    """Move outlines by a matrix (3, 3) about the middle of the section, um."""
    middle = affine(np.eye(2), EXTENT / 2)
    return shapely.transform(outlines, lambda points: apply(middle @ matrix @ inverse(middle), points))


def shift(x, y):
    return affine(np.eye(2), (x, y))


def said(text):
    """Read the shift in x and y, um, that a warning tells."""
    return [float(word) for word in text.replace("(", " ").split() if word[0] in "+-"]


def find(scene, outlines):
    matrix = Alignment(scene.matrix, np.empty(0))
    return register(scene.he, scene.dapi, outlines, PIXEL, matrix, SETTINGS, name="lung", seed=0)


@pytest.mark.parametrize("version", ["1.5.0", "3.0.0", "4.0.0"])
@pytest.mark.parametrize("size", [(60, 60), (300, 200)])
def test_drawn_samples_are_silent(tmp_path, version, size):
    drawn = write_xenium(tmp_path, seed=5, size_um=size, version=version)
    with open_pyramid(dapi_path(drawn.outs), plane=0) as dapi:
        outlines = read_nuclei(drawn.outs).geometry.to_numpy()
        assert warnings(dapi, outlines, RegistrationSettings()) == []
        wrong = shapely.transform(outlines, lambda points: points + (3, -4))
        [text] = warnings(dapi, wrong, RegistrationSettings())
        assert said(text) == pytest.approx((3, -4), abs=0.2)


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.15])  # share of the nuclei that Xenium segments
@pytest.mark.parametrize("wider", [-1, 0, 2])  # um
def test_few_and_wide_outlines_are_silent(scene, kept, wider):
    rng = np.random.default_rng(3)
    outlines = scene.nuclei[rng.random(len(scene.nuclei)) < kept]
    jittered = shapely.transform(shapely.buffer(outlines, wider), lambda points: points + rng.normal(0, 0.3, 2))
    assert warnings(scene.dapi, jittered) == []


@pytest.mark.parametrize("by", [(5, 0), (-3, 4), (-8, -6), (24, 32)])
def test_a_shift_is_told_with_its_size(scene, by):
    [text] = warnings(scene.dapi, moved(scene.nuclei, shift(*by)))
    assert said(text) == pytest.approx(by, abs=0.6)
    assert "in SpatialData the cells lie beside this image" in text


def test_a_wrong_size_and_a_turn_are_told(scene):
    [text] = warnings(scene.dapi, moved(scene.nuclei, scaling(1.03)))
    assert 1.025 < float(text.split(" times its size")[0].split()[-1]) < 1.035
    [text] = warnings(scene.dapi, moved(scene.nuclei, affine(rotation(2))))
    assert float(text.split(" degrees")[0].split()[-1]) == pytest.approx(2, abs=0.2)


def test_a_sample_with_shifted_outlines_is_registered_and_told(scene):
    outlines = moved(scene.nuclei, shift(3, 4))
    found = find(scene, outlines)
    assert found.quality.passed
    [text] = [text for text in found.warnings if text.startswith("DAPI image dapi4.tif")]
    assert "um beside it (+" in text
    truth = shapely.get_coordinates(shapely.centroid(scene.nuclei)) / PIXEL
    placed = apply(found.um_to_he(), found.on_affine(shapely.get_coordinates(shapely.centroid(outlines))))
    off = np.linalg.norm(placed - apply(inverse(scene.matrix), truth), axis=1) * found.he_mpp
    assert np.median(off) < 1  # boxes follow the outlines
    right = find(scene, scene.nuclei)
    assert right.warnings == ()
    refused = refusal("lung", right.attempts, None, scene.he, scene.dapi, PIXEL, SETTINGS, [text])
    assert f"Why: {text}" in refused


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda points: points[:, ::-1], "x and y are swapped"),
        (lambda points: (EXTENT[0], 0) + points * (-1, 1), "they are mirrored from left to right"),
        (lambda points: (0, EXTENT[1]) + points * (1, -1), "they are mirrored from top to bottom"),
    ],
)
def test_swapped_and_mirrored_outlines_are_refused(scene, change, what):
    with pytest.raises(InputError, match=f"lung: got outlines of nuclei .* only if {what}"):
        find(scene, shapely.transform(scene.nuclei, change))


def test_outlines_of_another_section_are_told(scene, tmp_path):
    [text] = warnings(scene.dapi, make_scene(tmp_path, seed=9).nuclei)
    assert "are found in it in 0 of" in text


def test_a_window_alone_does_not_prove_that_outlines_are_swapped(scene):
    """In sections of one or two windows outlines of another section fit by chance, one way or another."""
    one = SETTINGS.model_copy(update={"regions": 1})
    swapped = shapely.transform(scene.nuclei, lambda points: points[:, ::-1])
    assert len(DapiNuclei(swapped).regions(one)) < 4
    [text] = warnings(scene.dapi, swapped, one)
    assert "windows" in text
