"""Regions of a slide: polygons in px of level 0, cut at its edge; what cannot be one is refused."""

import json

import geopandas
import numpy as np
import pytest
import shapely
from slide_files import write_image

from celldetr.cells.region import read_region
from celldetr.runtime.errors import InputError
from celldetr.slides.outline_check import Keys
from celldetr.slides.pyramid import open_pyramid

MPP = 0.5
ORIGIN = (40, 30)
SHAPES = [shapely.box(10, 20, 110, 90), shapely.Point(200, 100).buffer(30)]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    pixels = np.full((192, 320, 3), 240)
    with open_pyramid(write_image(tmp_path_factory.mktemp("slide") / "s.tif", pixels), MPP) as image:
        yield image


def feature(shape, kind="annotation"):
    geometry = shapely.geometry.mapping(shape)
    return {"type": "Feature", "id": f"{shape.wkt}", "geometry": geometry, "properties": {"objectType": kind}}


def write(path, shapes, kind="annotation"):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature(shape, kind) for shape in shapes]}))
    return path


@pytest.mark.parametrize("kind", ["annotation", "", "geoparquet"])
def test_the_polygons_of_a_file_are_the_region(tmp_path, image, kind):
    path = write(tmp_path / "r", SHAPES, kind)
    if kind == "geoparquet":
        geopandas.GeoDataFrame(geometry=SHAPES).to_parquet(path)
    found = read_region(path, image)
    assert shapely.get_type_id(found).tolist() == [shapely.GeometryType.POLYGON] * 2
    assert shapely.equals_exact(found, SHAPES, 1e-9, normalize=True).all()


@pytest.mark.parametrize(
    ("unit", "move"),
    [("px", lambda xy: xy), ("um", lambda xy: xy * MPP), ("qupath", lambda xy: xy - ORIGIN)],
)
def test_where_qupath_counts_from_must_be_stated_if_it_is_elsewhere(tmp_path, image, monkeypatch, unit, move):
    path = write(tmp_path / "r", shapely.transform(np.array(SHAPES, object), move))
    if unit == "px":
        read_region(path, image)
    monkeypatch.setattr(image, "origin", ORIGIN)
    with pytest.raises(InputError, match=r"r: .*begins at 40, 30 px.*set region_unit to qupath.*\(cells sheet\)"):
        read_region(path, image, keys=Keys("cells sheet"))
    found = read_region(path, image, unit=unit)
    np.testing.assert_allclose(shapely.bounds(found), shapely.bounds(SHAPES))


def test_annotations_count_among_other_objects_and_points_do_not(tmp_path, image, caplog):
    others = [feature(shapely.box(150, 150, 160, 160), "detection"), feature(shapely.Point(5, 5)), feature(SHAPES[0])]
    (tmp_path / "r").write_text(json.dumps(others))
    found = read_region(tmp_path / "r", image)
    np.testing.assert_allclose(shapely.bounds(found), [SHAPES[0].bounds])
    assert "left out: 1 detection, 1 points and lines" in caplog.text


def test_a_region_is_mended_and_cut_at_the_edge(tmp_path, image, caplog):
    bow = shapely.Polygon([(10, 10), (60, 60), (60, 10), (10, 60)])
    over = shapely.box(250, 100, 450, 400)
    found = read_region(write(tmp_path / "r", [bow, over]), image)
    assert shapely.is_valid(found).all()
    np.testing.assert_allclose(shapely.area(found).sum(), 2 * 625 + 70 * 92)
    assert "10.7 % of a region lie on the slide" in caplog.text


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [SHAPES[0], shapely.box(400, 0, 500, 90)],
            r"outside of the slide \(320 x 192 px.*0 to 500, 90 px.*region-unit",
        ),
        ([shapely.box(-9, -9, 0, 0)], "outside of the slide"),
        ([shapely.Point(5, 5)], "no polygon in 1 features"),
        ([shapely.Polygon(), SHAPES[0]], "empty or unreadable regions"),
        ([shapely.Polygon([(1, 1), (5, 1), (9, 1)])], "regions without area"),
        ([], "no features"),
    ],
)
def test_what_is_no_region_of_the_slide_is_refused(tmp_path, image, shapes, message):
    with pytest.raises(InputError, match=f"{tmp_path / 'r'}: got .*{message}"):
        read_region(write(tmp_path / "r", shapes), image)


@pytest.mark.parametrize("content", [b"x,y,diameter_um\n10,20,9\n", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00"])
def test_a_table_of_cells_and_an_image_are_no_region(tmp_path, image, content):
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(InputError, match=r"r: got a file that starts with .*expected polygons as GeoJSON"):
        read_region(tmp_path / "r", image)
