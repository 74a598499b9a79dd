"""Outlines of nuclei: the same boxes from every format, nothing lost without being counted, other files refused."""

import gzip
import json
import zipfile

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely

from celldetr.runtime.errors import InputError
from celldetr.slides import geojson, outlines
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
    elif kind == "cells.json":  # CellViT
        cells = [{"centroid": [1.0, 2.0], "contour": shapely.get_coordinates(s).tolist(), "type": 1} for s in shapes]
        return json.dumps({"wsi_metadata": {"base_mpp": 0.25}, "processed_patches": ["0_0"], "cells": cells})
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
    elif kind == "gzip":
        path.write_bytes(gzip.compress(geojson_text("list", shapes).encode()))
    else:
        path.write_text(geojson_text(kind, shapes), encoding="utf-8")
    return path


def read(path, features=None, mpp=MPP, unit="px"):
    """Read a file; `features` are written to it first."""
    if features is not None:
        path.write_text(json.dumps(features), encoding="utf-8")
    return read_nucleus_file(path, image_mpp=MPP, mpp=mpp, unit=unit)


KINDS = ["geoparquet", "wkb", "renamed", "collection", "list", "qupath cells", "all in one", "lines", "zip", "gzip"]
KINDS += ["cells.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_boxes_or_is_refused_if_cut_off(tmp_path, kind):
    path = write(kind, tmp_path)
    found = read(path, mpp=2 * MPP)
    order = np.lexsort(found.nuclei.boxes.T[:2])
    expected = TRUTH[np.lexsort(TRUTH.T[:2])] / 2
    np.testing.assert_allclose(found.nuclei.boxes[order], expected, atol=1e-9)
    np.testing.assert_allclose(np.sort(shapely.area(found.nuclei.outlines)), np.sort(shapely.area(SHAPES)) / 4)
    assert (found.nuclei.labels == -1).all()  # classes in the file are not used
    assert not sum(found.dropped.values())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match=str(path)):
        read(path)


def lost(found):
    """Count what was dropped: first words of the reasons that occurred -> count."""
    return {reason.split(",")[0]: count for reason, count in found.dropped.items() if count}


def test_detections_of_cellvit_are_their_boxes(tmp_path):
    cells = [{"bbox": [[y0, x0], [y1, x1]], "centroid": [5, 5], "type": 1} for x0, y0, x1, y1 in TRUTH.tolist()]
    bad = [None, [], [1, 2, 3, 4], [[1, 2]], [[1, 2], [3, "4"]], [[1, 2], [3, 4], [5, 6]], {"x": [1]}]
    none = [{"bbox": box, "centroid": [5, 5]} for box in bad]
    for order in ([*cells, *none, cells[0]], [*none, *cells]):  # the last one is read in another way
        (tmp_path / "n").write_text(json.dumps({"wsi_metadata": {"a": [1]}, "cells": order}))
        found = read(tmp_path / "n")
        np.testing.assert_array_equal(found.nuclei.boxes, TRUTH)
        assert lost(found)["points and lines"] == len(bad)


def test_outlines_in_um_are_scaled_and_the_wrong_unit_is_noticed(tmp_path):
    um = write("geoparquet", tmp_path, shapely.transform(SHAPES, lambda corners: corners * MPP))
    np.testing.assert_allclose(read(um, unit="um").nuclei.boxes, TRUTH, atol=1e-9)
    small = write("geoparquet", tmp_path, shapely.transform(SHAPES, lambda corners: corners * MPP / 2))
    with pytest.raises(InputError, match=f"{small}.*nuclei_unit"):
        read(small)
    with pytest.raises(InputError, match="nuclei_unit"):
        read(write("geoparquet", tmp_path), unit="um")
    scanned = write("geoparquet", tmp_path, shapely.transform(SHAPES, lambda corners: corners - [300, 170]))
    found = read_nucleus_file(scanned, image_mpp=MPP, mpp=2 * MPP, unit="qupath", origin=(300, 170))
    np.testing.assert_allclose(found.nuclei.boxes, TRUTH / 2, atol=1e-9)


def test_bad_outlines_are_counted_and_the_others_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(geojson, "_BATCH", 7)
    bow = shapely.Polygon([(500, 700), (540, 740), (540, 700), (500, 735)])
    flat = shapely.Polygon([(1, 1), (5, 1), (9, 1)])
    bad = [shapely.Polygon(), None, flat, shapely.Point(3, 4), shapely.LineString([(0, 0), (5, 5)])]
    shapes = [*SHAPES, bow, *bad]
    pd.DataFrame({"geometry": [*shapely.to_wkb(shapes), b"\x01\x02"]}).to_parquet(tmp_path / "n")
    features = [feature(shape) if shape is not None else {"geometry": None} for shape in [*shapes, None]]
    for found in (read(tmp_path / "n"), read(tmp_path / "j", features)):
        assert lost(found) == {"outlines that are empty": 3, "points and lines": 2, "outlines without area": 1}
        assert found.repaired == 1
        assert len(found.nuclei) == len(SHAPES) + 1
        assert (np.abs(found.nuclei.boxes - [500, 700, 540, 740]).max(axis=1) < 1e-9).any()


@pytest.mark.parametrize("form", ["feature", "parquet"])
def test_parts_of_a_multipolygon_are_nuclei_unless_they_touch(tmp_path, form):
    pieces = [shapely.box(0, 0, 10, 20), shapely.box(13, 0, 23, 20)]  # 0.75 um apart
    nuclei = [shapely.box(30, 0, 50, 20), shapely.box(60, 0, 80, 20)]  # 2.5 um
    row = [shapely.box(x, 50, x + 20, 70) for x in range(0, 300, 22)]  # 0.5 um, but 75 um long
    shapes = [shapely.MultiPolygon(pieces + nuclei), shapely.MultiPolygon(row), SHAPES[0]]
    if form == "parquet":
        pd.DataFrame({"geometry": shapely.to_wkb(shapes)}).to_parquet(tmp_path / "n")
    found = read(tmp_path / "n", [feature(shape) for shape in shapes] if form == "feature" else None)
    expected = np.array([(0, 0, 23, 20), *(shape.bounds for shape in [*nuclei, *row, SHAPES[0]])])
    boxes = found.nuclei.boxes
    np.testing.assert_allclose(boxes[np.lexsort(boxes.T)], expected[np.lexsort(expected.T)])
    assert not lost(found)


def test_of_a_qupath_export_only_nuclei_are_taken(tmp_path):
    def of_kind(kind, shape, **more):
        return feature(shape, properties={"objectType": kind}, **more)

    cells = [of_kind("cell", shape.buffer(6), nucleusGeometry=shapely.geometry.mapping(shape)) for shape in SHAPES[1:]]
    tissue = of_kind("annotation", shapely.box(0, 0, 1000, 620))
    others = [of_kind("annotation", shapely.box(0, 0, 90, 90)), feature(shapely.box(90, 0, 150, 60))]
    others[1] |= {"id": "PathTileObject", "properties": {}}  # QuPath 0.2
    features = [tissue, *others, of_kind("cell", SHAPES[0]), *cells]
    found = read(tmp_path / "n", features)
    np.testing.assert_array_equal(found.nuclei.boxes, TRUTH[1:])
    cell, large = "cells without an outline of the nucleus", "outlines larger than a nucleus"
    assert lost(found) == {"tiles": 2, cell: 1, large: 1}
    asked = read_nucleus_file(tmp_path / "n", image_mpp=MPP, mpp=MPP, cells=True)
    np.testing.assert_array_equal(asked.nuclei.boxes, TRUTH)
    with pytest.raises(InputError, match=f"1 {cell}, 1 {large}.*cell_outlines"):
        read(tmp_path / "n", features[:4])
    by_hand = read(tmp_path / "n", [of_kind("annotation", shape) for shape in SHAPES])  # CellViT calls nuclei so
    assert len(by_hand.nuclei) == len(SHAPES)


def test_all_documents_of_a_file_are_read(tmp_path):
    half = len(SHAPES) // 2
    bare = [json.dumps(shapely.geometry.mapping(shape)) for shape in SHAPES]
    together = json.dumps(shapely.geometry.mapping(shapely.GeometryCollection([*SHAPES])))
    texts = {
        "two collections": geojson_text("collection", SHAPES[:half]) + geojson_text("collection", SHAPES[half:]),
        "a list": f"[{geojson_text('collection', SHAPES[:half])}, {geojson_text('list', SHAPES[half:])}]",
        "sequence": "".join(f"\x1e{json.dumps(feature(shape))}\n" for shape in SHAPES),
        "geometries": "\n".join(bare),
        "collection of geometries": together,
        "its feature": f'{{"type": "Feature", "geometry": {together}}}',
    }
    for kind, text in texts.items():
        (tmp_path / "n").write_text(text)
        np.testing.assert_array_equal(read(tmp_path / "n").nuclei.boxes, TRUTH, err_msg=kind)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "GeoParquet"),
        (b"", "GeoParquet"),
        (b'{"type": "Feature", "geometry": null}', "no outline.*1 outlines that are empty.*expected polygons"),
        (b'{"type": "Point", "coordinates": [1, 2]}', "1 points and lines.*expected polygons"),
        (b'{"cells": [{"centroid": [1, 2], "type": 1}]}', "1 points and lines.*expected polygons"),
        (b'{"type": "Feature", "geometry": null}\n{"type": "Fea', "premature EOF.*complete"),
        (b'{"type": "FeatureCollection", "features": []}', "no features"),
        (b'{"mag": 40, "nuc": {"1": {"bbox": [1, 2]}}}', "keys: mag, nuc.*expected features"),
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
    found = read(tmp_path / "n", [feature(ring), feature(pair)])
    np.testing.assert_allclose(found.nuclei.boxes, np.array([[100, 100, 160, 140], [600, 100, 660, 140]]))
    np.testing.assert_allclose(shapely.area(found.nuclei.outlines), ring.area)
    assert lost(found) == {"nuclei that are in the file already": 1}


def test_memory_has_limits(tmp_path, monkeypatch):
    ring = [[np.cos(angle) * 40, np.sin(angle) * 40] for angle in np.linspace(0, 6, 100_001)]
    huge = {"type": "MultiPolygon", "coordinates": [[ring], [ring[::10_000]]]}
    assert lost(read(tmp_path / "n", [{"geometry": huge}])) == {"outlines that are empty": 1}
    pd.DataFrame({"geometry": shapely.to_wkb([shapely.Polygon(ring), SHAPES[0]])}).to_parquet(tmp_path / "n")
    assert lost(read(tmp_path / "n")) == {"outlines that are empty": 1}
    monkeypatch.setattr(outlines, "_MOST_IN_FILE", 1000)
    with pytest.raises(InputError, match="more than 1,000 corners"):
        read(write("geoparquet", tmp_path))


@pytest.mark.parametrize(
    ("kind", "coordinates"),
    [
        ("MultiPolygon", [[[0, 0], [40, 0], [40, 40]]]),  # of a Polygon
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
    assert lost(found) == {"outlines that are empty": 1}
    assert len(found.nuclei) == 1
