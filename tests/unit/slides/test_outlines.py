"""Outlines of nuclei: the same boxes from every format, nothing lost without being counted, other files refused."""

import json
import zipfile

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely

from celldetr.runtime.errors import InputError
from celldetr.slides import geojson
from celldetr.slides.outlines import read_nucleus_file

MPP = 0.25
CENTRES = np.stack(np.meshgrid(np.arange(50, 1000, 60), np.arange(50, 600, 60)), -1).reshape(-1, 2) + 0.5
SHAPES = shapely.buffer(shapely.points(CENTRES), np.random.default_rng(0).uniform(10, 18, len(CENTRES)))
TRUTH = shapely.bounds(SHAPES)


def feature(shape, **more):
    """Make a feature as QuPath writes it."""
    properties = {"objectType": "detection", "classification": {"name": "Tumor", "color": [200, 0, 0]}}
    return {"type": "Feature", "id": "x", "geometry": shapely.geometry.mapping(shape), "properties": properties, **more}


def geojson_text(kind, shapes):
    features = [feature(shape) for shape in shapes]
    if kind == "collection":
        return json.dumps({"type": "FeatureCollection", "bbox": [0, 0, 1, 1], "features": features, "name": "n"})
    if kind == "qupath cells":
        features = [feature(s.buffer(6), nucleusGeometry=shapely.geometry.mapping(s)) for s in shapes]
    elif kind == "all in one":  # CellViT: a MultiPolygon with all nuclei of a class
        features = [feature(shapely.MultiPolygon(part)) for part in (list(shapes[::2]), list(shapes[1::2]))]
    return "\n".join(map(json.dumps, features)) if kind == "lines" else json.dumps(features)


def write(kind, folder, shapes=SHAPES):
    path = folder / "nuclei"
    frame = geopandas.GeoDataFrame({"class": ["Neoplastic"] * len(shapes)}, geometry=list(shapes))
    if kind == "geoparquet":
        frame.to_parquet(path)
    elif kind == "wkb":
        pd.DataFrame({"class": "Dead", "geometry": shapely.to_wkb(list(shapes))}).to_parquet(path)
    elif kind == "renamed":
        frame.rename_geometry("outline").assign(geometry=b"thumbnail").to_parquet(path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a_cellvit_seg.geojson", geojson_text("list", shapes))
    else:
        path.write_text(geojson_text(kind, shapes), encoding="utf-8")
    return path


def read(path, features=None, mpp=MPP, unit="px"):
    """Read a file; `features` are written to it first."""
    if features is not None:
        path.write_text(json.dumps(features), encoding="utf-8")
    return read_nucleus_file(path, image_mpp=MPP, mpp=mpp, unit=unit)


KINDS = ["geoparquet", "wkb", "renamed", "collection", "list", "qupath cells", "all in one", "lines", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_boxes_or_is_refused_if_cut_off(tmp_path, kind):
    path = write(kind, tmp_path)
    found = read(path, mpp=2 * MPP)
    order = np.lexsort(found.nuclei.boxes.T[:2])
    expected = TRUTH[np.lexsort(TRUTH.T[:2])] / 2
    np.testing.assert_allclose(found.nuclei.boxes[order], expected, atol=1e-9)
    np.testing.assert_allclose(np.sort(shapely.area(found.nuclei.outlines)), np.sort(shapely.area(SHAPES)) / 4)
    assert (found.nuclei.labels == -1).all()  # classes in the file are not used
    assert set(found.dropped.values()) == {0}
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match=str(path)):
        read(path)


def test_outlines_in_um_are_scaled_and_the_wrong_unit_is_noticed(tmp_path):
    um = write("geoparquet", tmp_path, shapely.transform(SHAPES, lambda corners: corners * MPP))
    np.testing.assert_allclose(read(um, unit="um").nuclei.boxes, TRUTH, atol=1e-9)
    small = write("geoparquet", tmp_path, shapely.transform(SHAPES, lambda corners: corners * MPP / 2))
    with pytest.raises(InputError, match=f"{small}.*nuclei_unit"):
        read(small)
    with pytest.raises(InputError, match="nuclei_unit"):
        read(write("geoparquet", tmp_path), unit="um")


def test_bad_outlines_are_counted_and_the_others_kept(tmp_path):
    bow = shapely.Polygon([(500, 700), (540, 740), (540, 700), (500, 735)])
    pieces = shapely.MultiPolygon([SHAPES[0], shapely.Point(80, 50).buffer(8)])
    flat = shapely.Polygon([(1, 1), (5, 1), (9, 1)])
    bad = [shapely.Polygon(), None, flat, shapely.Point(3, 4), shapely.LineString([(0, 0), (5, 5)])]
    shapes = [*SHAPES[1:], bow, pieces, *bad]
    pd.DataFrame({"geometry": [*shapely.to_wkb(shapes), b"\x01\x02"]}).to_parquet(tmp_path / "n")
    features = [feature(shape) if shape is not None else {"geometry": None} for shape in [*shapes, None]]
    for found in (read(tmp_path / "n"), read(tmp_path / "j", features)):
        assert list(found.dropped.values()) == [3, 2, 1]
        assert found.repaired == 1
        assert len(found.nuclei) == len(SHAPES) + 1
        boxes = found.nuclei.boxes
        assert (np.abs(boxes - [500, 700, 540, 740]).max(axis=1) < 1e-9).any()
        assert (np.abs(boxes - pieces.bounds).max(axis=1) < 1e-9).any()  # one nucleus in two pieces


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "GeoParquet"),
        (b"", "GeoParquet"),
        (b'{"type": "Feature", "geometry": null}', "no outline.*expected polygons"),
        (b'{"type": "Feature", "geometry": null}\n{"type": "Fea', "premature EOF.*complete"),
        (b'{"type": "FeatureCollection", "features": []}', "no features"),
        (b'{"mag": 40, "nuc": {"1": {"bbox": [1, 2]}}}', "keys: mag, nuc.*FeatureCollection"),
        (b'[{"type": "Feature", "geometry": null}, 3]', "got number, expected a feature"),
        (b'[{"type": "Feature", "geometry": null}, nonsense]', "null}, nonsense"),
        (b"PAR1 cut", "complete"),
        (b"PK\x03\x04 cut", "get it again"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "n").write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){tmp_path / 'n'}.*{message}"):
        read(tmp_path / "n")


def test_a_missing_file_or_column_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none")
    pd.DataFrame({"x": [1.0], "label": ["a"]}).to_parquet(tmp_path / "n")
    with pytest.raises(InputError, match="columns: x, label"):
        read(tmp_path / "n")


def test_the_order_of_keys_and_heights_do_not_matter(tmp_path):
    features = []
    for shape in SHAPES:
        nucleus = {"coordinates": [[[*corner, 7.5] for corner in shape.exterior.coords]], "type": "Polygon"}
        cell = shapely.geometry.mapping(shape.buffer(6))
        features.append({"nucleusGeometry": nucleus, "geometry": cell, "properties": {"geometry": {"a": [1]}}})
    features[0] = {"nucleusGeometry": None, "geometry": features[0]["nucleusGeometry"]}
    found = read(tmp_path / "n", {"features": features, "type": "FeatureCollection"}).nuclei
    np.testing.assert_array_equal(found.boxes, TRUTH)


def test_holes_belong_to_their_polygon(tmp_path):
    ring = shapely.Polygon(shapely.box(100, 100, 160, 140).exterior, [shapely.box(102, 102, 120, 138).exterior])
    pair = shapely.MultiPolygon([ring, shapely.affinity.translate(ring, 500, 0)])
    found = read(tmp_path / "n", [feature(ring), feature(pair)]).nuclei
    np.testing.assert_allclose(found.boxes, np.array([[100, 100, 160, 140]] * 2 + [[600, 100, 660, 140]]))
    np.testing.assert_allclose(shapely.area(found.outlines), ring.area)


@pytest.mark.parametrize("count", [13, 14, 18])
def test_a_large_multipolygon_is_read_polygon_by_polygon(tmp_path, monkeypatch, count):
    monkeypatch.setattr(geojson, "_BATCH", 7)
    monkeypatch.setattr(geojson, "_PIECES", 5)
    row = shapely.MultiPolygon([shapely.Point(40 * i + 50, 50).buffer(15) for i in range(count)])
    features = json.loads(json.dumps([feature(row), feature(SHAPES[5])]))
    found = read(tmp_path / "n", features)
    assert len(found.nuclei) == count + 1  # the last two of 14 are no nucleus in pieces
    assert set(found.dropped.values()) == {0}
    features[0]["geometry"]["coordinates"][3][0][7] = "x"
    found = read(tmp_path / "n", features)
    assert len(found.nuclei) == count
    assert list(found.dropped.values()) == [1, 0, 0]


def test_outlines_come_before_the_end_of_their_feature_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(geojson, "_BATCH", 7)
    monkeypatch.setattr(geojson, "_PIECES", 5)
    path = write("all in one", tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    batches = geojson.read_geojson(path)
    assert len(next(batches)) == 7
    with pytest.raises(InputError, match="premature EOF"):
        list(batches)


@pytest.mark.parametrize(
    ("kind", "coordinates"),
    [
        ("MultiPolygon", [[[0, 0], [40, 0], [40, 40]], [[80, 0], [120, 0], [120, 40]]]),  # of a Polygon
        ("Polygon", [[[[0, 0], [40, 0], [40, 40]]]]),  # of a MultiPolygon
        ("Polygon", [[[0, 0], [40, 0]]]),
        ("Polygon", [[[0, 0], [40, 0], [40]]]),
        ("Polygon", [[[0, 0], [40, 0], [40, 40], 5]]),
        ("Polygon", [[[0, 0], [40, 0], [40, [40, 0]], [0, 40]]]),
        ("Polygon", [[[0, 0], [40, 0], [40, None], [0, 40]]]),
        ("Polygon", [{"0": [[0, 0], [40, 0], [40, 40]]}]),
        ("Polygon", "none"),
    ],
)
def test_coordinates_of_another_form_are_unreadable(tmp_path, kind, coordinates):
    other = {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}}
    found = read(tmp_path / "n", [other, feature(SHAPES[0])])
    assert list(found.dropped.values()) == [1, 0, 0]
    assert len(found.nuclei) == 1
