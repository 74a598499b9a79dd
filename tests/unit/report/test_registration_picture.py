"""The picture of a registration: nothing hides a number, and each enlarged square is of one region."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from matplotlib.quiver import Quiver
from scipy.spatial import cKDTree
from xenium_scene import PIXEL, make_scene

from celldetr.config.xenium import RegistrationSettings
from celldetr.report.registration import registration_figure
from celldetr.xenium.registration.affine import affine, scaling
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.gate import check
from celldetr.xenium.registration.nuclei import DapiNuclei
from celldetr.xenium.registration.result import Registration

SETTINGS = RegistrationSettings(regions=3, window=120)


@pytest.fixture(scope="module", params=["right", "wrong"])
def drawn(tmp_path_factory, request):
    scene = make_scene(tmp_path_factory.mktemp("scene"), seed=4, angle=25, scale=1.288)
    matrix = scene.matrix if request.param == "right" else affine(np.eye(2), (60, 30)) @ scene.matrix
    nuclei = DapiNuclei(scene.nuclei)
    quality = check(scaling(PIXEL) @ matrix, scene.he, nuclei, nuclei.regions(SETTINGS), SETTINGS)
    assert quality.passed == (request.param == "right")
    found = Registration(matrix=matrix, pixel_size=PIXEL, origin="file", quality=quality, warnings=("look here",))
    figure = registration_figure(found, scene.he, scene.nuclei, SETTINGS, name="lung")
    figure.draw_without_rendering()
    return found, figure


def boxes_of(parts):
    return [part.get_window_extent() for part in parts]


def test_no_square_lies_over_the_number_of_a_region(drawn):
    found, figure = drawn
    section = figure.axes[1]
    squares = [part for part in section.patches if isinstance(part, Rectangle) and part.get_width() == 90]
    numbers = [text for text in section.texts if text.get_bbox_patch() is not None]
    expected = ["-" if region.distance is None else f"{region.distance:.1f}" for region in found.quality.regions]
    assert sorted(text.get_text() for text in numbers) == sorted(expected)
    assert len(squares) == 3
    tags = [text for text in section.texts if text.get_bbox_patch() is None and text.get_text() in "123"]
    assert not [1 for number in boxes_of(numbers) for other in boxes_of([*squares, *tags]) if number.overlaps(other)]


def test_no_label_or_title_is_cut_off_at_the_edge_of_the_picture(drawn):
    _, figure = drawn
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    shown = [box for text, box in zip(texts, boxes_of(texts), strict=True) if text.get_text()]
    assert len(shown) > 10
    edges = figure.bbox.extents
    assert all((box.extents[:2] >= edges[:2]).all() and (box.extents[2:] <= edges[2:]).all() for box in shown)


def test_an_enlarged_square_lies_in_one_region_and_says_whether_it_fails(drawn):
    found, figure = drawn
    for axes in figure.axes[3:]:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        owners = [
            region
            for region in found.quality.regions
            if region.cell[0] <= left + 0.5 < right - 0.5 <= region.cell[2]
            and region.cell[1] <= top + 0.5 < bottom - 0.5 <= region.cell[3]
        ]
        assert len(owners) == 1
        assert ("region fails" in axes.get_title()) == (not owners[0].passed)
        assert len(axes.collections[0].get_paths()) > 5


def test_the_lines_above_say_the_verdict_the_reasons_and_the_warnings(drawn):
    found, figure = drawn
    lines = [text.get_text() for text in figure.axes[0].texts]
    assert (lines[0] == "lung: registration passes (file)") == found.quality.passed
    assert set(found.quality.failures) <= set(lines)
    assert lines[-1] == "Warning: look here"
    assert f"{found.quality.he_nuclei:,} H&E nuclei" in figure.axes[2].get_title()


def test_a_refusal_stands_above_the_panels_as_the_user_reads_it_in_the_log(drawn, tmp_path):
    found, _ = drawn
    scene = make_scene(tmp_path, seed=4, angle=25, scale=1.288)
    text = "lung: no registration passes\nWhy: far\nWhat to do: " + "look " * 60
    figure = registration_figure(found, scene.he, scene.nuclei, SETTINGS, name="lung", refusal=text)
    lines = [line.get_text() for line in figure.axes[0].texts]
    assert len(lines) == 4
    assert " ".join(lines) == text.replace("\n", " ").strip()


def test_the_longest_arrow_is_as_long_as_the_picture_says(drawn, tmp_path):
    """Displacements of 3 um to the right and 4 um down, and where nuclei lie."""
    found, _ = drawn
    scene = make_scene(tmp_path, seed=4, angle=25, scale=1.288)
    values = np.stack([np.full((16, 16), 3.0), np.full((16, 16), 4.0)])
    field = DisplacementField(x=-200, y=-200, spacing=50, coefficients=values)
    figure = registration_figure(
        found.model_copy(update={"field": field}), scene.he, scene.nuclei, SETTINGS, name="lung"
    )
    assert "the longest is 5.0 um" in figure.axes[1].get_title()
    (arrows,) = [part for part in figure.axes[1].collections if isinstance(part, Quiver)]
    assert (arrows.U > 0).all()
    assert (arrows.V > 0).all()  # y points down, as that of the axes
    assert cKDTree(DapiNuclei(scene.nuclei).centroids).query(arrows.XY)[0].max() < 15
