"""Users' own cells: as in the file, whatever its kind; what does not fit is refused; which detections agree."""

import gzip
import json
import logging
import re

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from cell_files import write_cells
from slide_files import drawn_slide

from celldetr.cells.given import agreement, read_given_cells
from celldetr.cells.qupath import write_geojson
from celldetr.cells.table import CellFile
from celldetr.runtime.errors import InputError
from celldetr.slides import outline_check
from celldetr.slides.outline_check import Keys

MPP = 0.4
ORIGIN = (300, 170)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Draw a slide: its image, and the outlines (n,) of its nuclei, px of level 0."""
    with drawn_slide(tmp_path_factory.mktemp("slide"), MPP) as found:
        yield found


@pytest.fixture
def few_windows(monkeypatch):
    """Compare few windows with the slide, to save time."""
    monkeypatch.setattr(outline_check, "_WINDOWS", 3)


def moved(outlines, move):
    return shapely.transform(outlines, move)


def ids_of(count):
    """Make ids as in Xenium, in no order; two are numbers, one begins with 0."""
    ids = [f"aaa{chr(97 + i % 26)}{i * 7919 % 9973}-1" for i in range(count)]
    return [*ids[:-3], "007", "12", "NA"]


def feature(shape, **more):
    properties = {"objectType": "detection", "classification": {"name": "Tumor", "color": [200, 0, 0]}}
    return {"type": "Feature", "geometry": shapely.geometry.mapping(shape), "properties": properties, **more}


def corners_of(outlines, ids):
    """Table of corners in um, as Xenium writes boundaries."""
    corners, owner = shapely.get_coordinates(outlines, return_index=True)
    values = {"cell_id": np.array(ids, object)[owner], "vertex_x": corners[:, 0] * MPP, "vertex_y": corners[:, 1] * MPP}
    return pd.DataFrame(values).astype({"vertex_x": "float64", "vertex_y": "float64"})


def write(kind, path, outlines, ids):
    """Write the cells; return the settings with which they are read."""
    x0, y0, x1, y1 = shapely.bounds(outlines).T
    boxes = pd.DataFrame({"x0": x0, "y0": y0, "x1": x1, "y1": y1, "cell_id": ids, "class": "Tumor"})
    frame = geopandas.GeoDataFrame({"cell_id": ids, "name": "Tumor"}, geometry=list(outlines))
    if kind.startswith("qupath"):
        features = [feature(shape, id=name) for shape, name in zip(outlines, ids, strict=True)]
        if kind == "qupath cells":
            for one, shape in zip(features, outlines, strict=True):
                one |= {"nucleusGeometry": one["geometry"], "geometry": shapely.geometry.mapping(shape.buffer(4))}
        text = json.dumps({"type": "FeatureCollection", "features": features}).encode()
        path.write_bytes(gzip.compress(text) if kind == "qupath gzip" else text)
    elif kind == "geoparquet":
        frame.to_parquet(path)
    elif kind == "geoparquet index":
        frame.set_index("cell_id").drop(columns="name").to_parquet(path)
    elif kind == "wkb":
        pd.DataFrame({"id": ids, "shape": shapely.to_wkb(outlines)}).to_parquet(path)
    elif kind == "xenium":
        corners_of(outlines, ids).to_parquet(path)
        return {"unit": "um"}
    elif kind == "xenium csv":
        path.write_bytes(gzip.compress(corners_of(outlines, ids).to_csv(index=False).encode()))
        return {"unit": "um"}
    elif kind == "boxes csv":
        boxes.to_csv(path, index=False)
    elif kind == "boxes tsv":
        boxes.rename(columns={"x0": "xmin", "y0": "ymin", "x1": "xmax", "y1": "ymax"}).to_csv(path, sep="\t")
    elif kind == "boxes parquet":
        boxes.assign(width=x1 - x0, height=y1 - y0, left=x0, top=y0).drop(columns=["x0"]).to_parquet(path)
    return {}


KINDS = ["qupath", "qupath cells", "qupath gzip", "geoparquet", "geoparquet index", "wkb", "xenium", "xenium csv"]
KINDS += ["boxes csv", "boxes tsv", "boxes parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_cells_in_order_with_their_ids(tmp_path, slide, few_windows, kind):
    image, outlines = slide
    ids = ids_of(len(outlines))
    settings = write(kind, tmp_path / "cells", outlines, ids)
    found = read_given_cells(tmp_path / "cells", image, name="s", **settings)
    assert found.ids.tolist() == ids
    np.testing.assert_allclose(found.boxes, shapely.bounds(outlines), atol=1e-9)
    if not kind.startswith("boxes"):
        np.testing.assert_allclose(shapely.area(found.outlines), shapely.area(outlines))
    data = (tmp_path / "cells").read_bytes()
    (tmp_path / "cells").write_bytes(data[: len(data) * 2 // 3 - 7])
    with pytest.raises(InputError, match=str(tmp_path)):  # cut off
        read_given_cells(tmp_path / "cells", image, name="s", **settings)


@pytest.mark.parametrize(
    ("names", "times", "unit"),
    [
        (("x", "y"), 1.0, "px"),
        (("x_centroid", "y_centroid"), MPP, "um"),
        (("x_um", "y_um"), MPP, "px"),
        (("Centroid X µm", "Centroid Y µm"), MPP, "px"),
        (("Centroid X px", "Centroid Y px"), 1.0, "px"),
    ],
)
def test_points_become_circles(tmp_path, slide, few_windows, names, times, unit):
    image, outlines = slide
    x0, y0, x1, y1 = shapely.bounds(outlines).T
    centres = np.stack([x0 + x1, y0 + y1], axis=1) / 2
    table = pd.DataFrame(dict(zip(names, (centres * times).T, strict=True)) | {"Object ID": ids_of(len(centres))})
    table.to_csv(tmp_path / "points.tsv", sep="\t", index=False)
    found = read_given_cells(tmp_path / "points.tsv", image, name="s", unit=unit, diameter_um=6.0)
    assert found.ids.tolist() == ids_of(len(centres))
    np.testing.assert_allclose(found.boxes, np.concatenate([centres - 3 / MPP, centres + 3 / MPP], axis=1))
    own = np.linspace(4, 9, len(centres))
    table.assign(diameter_um=own).to_parquet(tmp_path / "points")
    found = read_given_cells(tmp_path / "points", image, name="s", unit=unit)
    np.testing.assert_allclose(found.boxes[:, 2] - found.boxes[:, 0], own / MPP)
    with pytest.raises(InputError, match="without the size.*diameter_um"):
        read_given_cells(tmp_path / "points.tsv", image, name="s", unit=unit)


@pytest.mark.parametrize("kind", ["cells.json", "a list per type", "geojson", "csv", "parquet", "range"])
def test_cells_without_ids_are_numbered_from_one_or_as_pandas_does(tmp_path, slide, few_windows, kind, caplog):
    caplog.set_level(logging.INFO)
    image, outlines = slide
    path, count = tmp_path / "cells", len(outlines)
    order = np.arange(count)
    x0, y0, x1, y1 = shapely.bounds(outlines).T
    boxes = pd.DataFrame({"x0": x0, "y0": y0, "x1": x1, "y1": y1})
    if kind == "cells.json":
        cells = [{"centroid": [1, 2], "contour": shapely.get_coordinates(shape).tolist()} for shape in outlines]
        path.write_text(json.dumps({"wsi_metadata": {}, "cells": cells}))
    elif kind == "a list per type":
        order = np.concatenate([np.arange(0, count, 2), np.arange(1, count, 2)])
        lists = [feature(shapely.MultiPolygon(list(outlines[i::2])), id=f"{i}") for i in (0, 1)]
        for one in lists:
            one["properties"]["objectType"] = "annotation"
        path.write_text(json.dumps(lists))
    elif kind == "geojson":
        path.write_text("\n".join(json.dumps(feature(shape)) for shape in outlines))
    elif kind == "csv":
        boxes.to_csv(path, index=False)
    elif kind == "parquet":
        boxes.to_parquet(path, index=False)
    else:
        boxes.to_parquet(path)
    found = read_given_cells(path, image, name="s")
    first = 0 if kind == "range" else 1
    assert found.ids.tolist() == [str(i) for i in range(first, count + first)]
    np.testing.assert_allclose(found.boxes, shapely.bounds(outlines[order]), atol=1e-9)
    assert ("numbered in the order of the file" in caplog.text) == (kind != "range")


def test_our_own_files_are_read_back(tmp_path, slide, monkeypatch):
    monkeypatch.setattr(slide[0], "origin", ORIGIN)
    write_cells(tmp_path / "c.parquet", 400, mpp=MPP, width=0, origin=ORIGIN)
    write_geojson(CellFile(tmp_path / "c.parquet"), tmp_path / "c.geojson.gz")
    boxes = shapely.bounds(np.concatenate([*CellFile(tmp_path / "c.parquet").outlines()]))
    for name, unit in (("c.parquet", "px"), ("c.geojson.gz", "qupath")):
        found = read_given_cells(tmp_path / name, slide[0], name="s", unit=unit, check_outlines=False)
        assert found.ids.tolist() == [str(i) for i in range(1, 401)]
        np.testing.assert_allclose(found.boxes, boxes, atol=0.006)


def test_of_a_table_of_qupath_the_cells_of_one_image_are_taken(tmp_path, slide, few_windows, caplog):
    image, outlines = slide
    x0, y0, x1, y1 = shapely.bounds(outlines).T * MPP
    table = pd.DataFrame({"Image": "a.svs", "Object type": "Cell", "Name": "Tumor", "Object ID": ids_of(len(x0))})
    table["Centroid X µm"], table["Centroid Y µm"] = (x0 + x1) / 2, (y0 + y1) / 2
    table.loc[7, "Object type"] = "Annotation"
    table.to_csv(tmp_path / "t", sep="\t", index=False)
    found = read_given_cells(tmp_path / "t", image, name="s", diameter_um=7)
    assert found.ids.tolist() == [name for i, name in enumerate(table["Object ID"]) if i != 7]
    assert "left out: 1 annotation" in caplog.text
    table.loc[9, "Image"] = "b.svs"
    table.to_csv(tmp_path / "t", sep="\t", index=False)
    with pytest.raises(InputError, match=r"cells of several images \(a.svs, b.svs\); keep the rows of this slide"):
        read_given_cells(tmp_path / "t", image, name="s", diameter_um=7)


def test_a_cell_in_pieces_is_one_cell(tmp_path, slide, few_windows):
    image, outlines = slide
    pair = shapely.MultiPolygon([outlines[0], shapely.affinity.translate(outlines[0], 45, 0)])
    shapes = [pair, *outlines[1:]]
    ids = [f"c{i}" for i in range(len(shapes))]
    (tmp_path / "g").write_text(json.dumps([feature(shape, id=name) for shape, name in zip(shapes, ids, strict=True)]))
    corners = corners_of(np.array([outlines[0], pair.geoms[1], *outlines[1:]]), ["c0", *ids]).assign(label_id=1)
    corners.loc[len(shapely.get_coordinates(outlines[0])) :, "label_id"] = 2
    corners.sample(frac=1, random_state=0).sort_index(kind="stable").to_parquet(tmp_path / "x")
    for name, unit in (("g", "px"), ("x", "um")):
        found = read_given_cells(tmp_path / name, image, name="s", unit=unit)
        assert found.ids.tolist() == ids
        np.testing.assert_allclose(found.boxes[0], pair.bounds)
        np.testing.assert_allclose(found.outlines[0].area, pair.area)


def test_only_what_qupath_calls_something_else_is_left_out_and_counted(tmp_path, slide, few_windows, caplog):
    image, outlines = slide
    features = [feature(shape, id=f"{i}") for i, shape in enumerate(outlines)]
    for kind in ("annotation", "tile", "tile"):
        features.insert(
            3, feature(shapely.box(0, 0, 900, 900), id=f"x{len(features)}", properties={"objectType": kind})
        )
    (tmp_path / "g").write_text(json.dumps(features))
    found = read_given_cells(tmp_path / "g", image, name="s")
    assert found.ids.tolist() == [f"{i}" for i in range(len(outlines))]
    assert re.search("left out: 2 tile, 1 annotation", caplog.text)
    cells = [one | {"properties": {"objectType": "cell"}} for one in features]
    (tmp_path / "g").write_text(json.dumps(cells[:1] + features[1:]))
    with pytest.raises(InputError, match="cells without an outline of the nucleus: feature '0'; set --cell-outlines"):
        read_given_cells(tmp_path / "g", image, name="s")
    found = read_given_cells(tmp_path / "g", image, name="s", cell_outlines=True)
    assert len(found) == len(outlines)
    (tmp_path / "g").write_text(json.dumps(features[3:6]))
    with pytest.raises(InputError, match="360 um wide"):
        read_given_cells(tmp_path / "g", image, name="s")


@pytest.mark.parametrize(
    ("form", "fault", "message"),
    [
        ("boxes", lambda xy: xy * 0.7, r"multiplied by about 1\.4"),
        ("points", lambda xy: xy * MPP, r"multiplied by about 2\.(49|5).*px of (0\.99\d|1) um"),
        ("points", lambda xy: xy + [64, 0], "moved by -6[345], -?[01] px"),
        ("boxes", lambda xy: xy[:, ::-1], "with x and y swapped"),
        ("outlines", lambda xy: xy - ORIGIN, r"moved by 300, 170 px.*unit qupath"),
        ("boxes", lambda xy: xy * 20, "126 um wide"),
    ],
    ids=range(6),
)
def test_cells_that_do_not_fit_are_refused_and_the_remedy_named(tmp_path, slide, monkeypatch, form, fault, message):
    image, outlines = slide
    monkeypatch.setattr(image, "origin", ORIGIN)
    path, settings = tmp_path / "cells", {}
    wrong = moved(outlines, fault)
    x0, y0, x1, y1 = shapely.bounds(wrong).T
    if form == "outlines":
        pd.DataFrame({"geometry": shapely.to_wkb(wrong)}).to_parquet(path)
    elif form == "boxes":
        pd.DataFrame({"x0": x0, "y0": y0, "x1": x1, "y1": y1}).to_csv(path, index=False)
    else:
        pd.DataFrame({"x": (x0 + x1) / 2, "y": (y0 + y1) / 2}).to_csv(path, index=False)
        settings = {"diameter_um": 7.0}
    with pytest.raises(InputError, match=f"{path}: got (?s:.*)({message}).*nuclei_unit.*cells sheet"):
        read_given_cells(path, image, name="s", keys=Keys("cells sheet"), **settings)


def test_cells_that_qupath_counts_from_the_scanned_part_are_moved(tmp_path, slide, monkeypatch):
    image, outlines = slide
    monkeypatch.setattr(image, "origin", ORIGIN)
    counted = moved(outlines, lambda xy: xy - ORIGIN)
    (tmp_path / "g").write_text(json.dumps([feature(shape, id=f"{i}") for i, shape in enumerate(counted)]))
    x0, y0, x1, y1 = shapely.bounds(counted).T * MPP
    table = pd.DataFrame({"Centroid X µm": (x0 + x1) / 2, "Centroid Y µm": (y0 + y1) / 2})
    table.to_csv(tmp_path / "t", sep="\t", index=False)
    found = read_given_cells(tmp_path / "g", image, name="s", unit="qupath")
    np.testing.assert_allclose(found.boxes, shapely.bounds(outlines))
    points = read_given_cells(tmp_path / "t", image, name="s", unit="qupath", diameter_um=7)
    np.testing.assert_allclose(points.boxes[:, :2] + points.boxes[:, 2:], found.boxes[:, :2] + found.boxes[:, 2:])


def test_cells_that_do_not_fit_are_taken_if_asked_to_and_those_outside_are_kept(tmp_path, slide, caplog):
    image, outlines = slide
    beside = moved(outlines, lambda xy: xy + [40, 0])
    beside[5] = shapely.affinity.translate(beside[5], 1e5, 0)
    write("geoparquet", tmp_path / "cells", beside, ids_of(len(beside)))
    found = read_given_cells(tmp_path / "cells", image, name="s", check_outlines=False)
    assert found.ids.tolist() == ids_of(len(beside))
    assert "do not fit the slide, and are taken as --check-outlines is no" in caplog.text


def test_bad_cells_are_named(tmp_path, slide):
    image, outlines = slide
    path = tmp_path / "cells"
    flat = shapely.Polygon([(500, 500), (520, 500), (540, 500)])
    hole = shapely.Polygon([(500, 500), (520, 500), (np.nan, 520)])
    for bad, message in {
        flat: "cells without area: cell 'b'",
        shapely.Polygon(): "empty or unreadable outlines: cell 'b'",
        None: "empty or unreadable outlines: cell 'b'",
        hole: "empty or unreadable outlines: cell 'b'",
        shapely.Point(500, 500): "points or lines: cell 'b'",
        shapely.box(0, 0, 900, 900): "more than 200 um: cell 'b'",
    }.items():
        shapes = [*outlines[:5], bad, *outlines[5:]]
        ids = [f"c{i}" for i in range(len(outlines))]
        pd.DataFrame({"cell_id": [*ids[:5], "b", *ids[5:]], "geometry": shapely.to_wkb(shapes)}).to_parquet(path)
        with pytest.raises(InputError, match=f"{path}: got .*({message})"):
            read_given_cells(path, image, name="s")
    pd.DataFrame({"cell_id": ["a", "b", "a"], "geometry": shapely.to_wkb(outlines[:3])}).to_parquet(path)
    with pytest.raises(InputError, match="ids that occur twice: cell 'a'; give each cell its own id"):
        read_given_cells(path, image, name="s")
    path.write_text(json.dumps([feature(outlines[0], id="a"), feature(outlines[1])]))
    with pytest.raises(InputError, match="no id: feature 2; give each feature an id, or none"):
        read_given_cells(path, image, name="s")
    (bare := feature(outlines[0], id="a"))["geometry"]["coordinates"] = [[[0, 0], [1]]]
    path.write_text(json.dumps([bare, feature(outlines[1], id="b")]))
    with pytest.raises(InputError, match="empty or unreadable outlines: feature 'a'"):
        read_given_cells(path, image, name="s")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with b''.*expected cells as GeoJSON"),
        ("x0,y0,x1,y1\n", "got no cell in 0"),
        ("x0,y0,x1,y1\n1,2,9,oops\n1,2,9,9\n", "no number in column x0 or y0 or x1 or y1: row 1;"),
        ("x0,y0,x1,y1\n1,2,9,9\n9,9,1,2\n", "boxes without area.*: row 2;"),
        ("x0,y0,x1,y1,cell_id\n1,2,9,9,a\n1,2,9,9,\n", "no id in column cell_id: row 2;"),
        ("x,y,width,height\n1,2,3,4\n", "may be a corner or the centre; name the columns left and top"),
        ("row,column\n1,2\n", "got columns row, column; none says where a cell is; expected x0, y0, x1, y1 | .*"),
        ("x;y\n1;2\n", "got columns x;y"),
        ("x0,y0,x1,y1\nr1,1,2,9,9\n", "Expected 4 columns, got 5"),  # as R writes row names
        ("type,x0,y0,x1,y1\na,1,2,9,9\na, b,1,2,9,9\n", "Expected 5 columns, got 6"),
        ("x0,y0,x1,y1,x0\n1,2,9,9,4\n", "columns x0 twice"),
        ("x,y,diameter_um\n1,2,0\n", "a diameter_um of 0 or less: row 1"),
        ("cell_id,vertex_x,vertex_y\na,1,2\na,1,3\nb,1,1\nb,2,1\nb,2,2\n", "fewer than 3 corners: cell 'a';"),
        ("cell_id,vertex_x,vertex_y\n,1,2\n", "no id in column cell_id"),
        ("II*\0 label image", "cannot be read as a label image"),
        ("\x89PNG\r\n\x1a\n\0\0", "cannot be read as a label image"),
        ("\xff\xd8\xff\0 a JPEG", "starts with .*expected cells as"),
        ('{"type": "FeatureCollection", "features": []}', "no features"),
    ],
)
def test_other_files_are_refused(tmp_path, slide, text, message):
    (tmp_path / "cells").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"(?s){tmp_path / 'cells'}: .*{message}".replace(" | ", r" \| ")):
        read_given_cells(tmp_path / "cells", slide[0], name="s")


def test_settings_that_contradict_the_file_are_refused(tmp_path, slide):
    image, outlines = slide
    write("geoparquet", tmp_path / "cells", outlines, ids_of(len(outlines)))
    with pytest.raises(InputError, match="diameter_um, which is for points; leave diameter_um out"):
        read_given_cells(tmp_path / "cells", image, name="s", diameter_um=7)
    pd.DataFrame({"Centroid X px": [500.0], "Centroid Y px": [500.0]}).to_csv(tmp_path / "p", index=False)
    with pytest.raises(InputError, match="columns in px, and --nuclei-unit um; leave it out"):
        read_given_cells(tmp_path / "p", image, name="s", unit="um", diameter_um=7)
    with pytest.raises(InputError, match="cannot be read"):
        read_given_cells(tmp_path / "none", image, name="s")
    pd.DataFrame({"x": [500.0], "y": [500.0], "id": [1.5]}).to_parquet(tmp_path / "p")
    with pytest.raises(InputError, match="no id in column id: row 1; .*text, or a whole number"):
        read_given_cells(tmp_path / "p", image, name="s", diameter_um=7)
    pd.DataFrame({"x": [500.0], "y": [500.0]}).to_csv(tmp_path / "p", index=False)
    with pytest.raises(InputError, match="50 um wide"):
        read_given_cells(tmp_path / "p", image, name="s", diameter_um=50)


def boxes_at(centres, size=8.0):
    centres = np.asarray(centres, float).reshape(-1, 2)
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def test_a_detection_agrees_with_one_cell_only_and_the_nearest_first():
    given = boxes_at([[0, 0], [6, 0], [100, 0], [200, 0]])
    found = boxes_at([[104, 0], [2, 0], [206, 0]])
    assert agreement(given, found, 5).tolist() == [1, -1, 0, -1]
    assert agreement(given, found, 6).tolist() == [1, -1, 0, 2], "a pair at the radius counts"


@pytest.mark.parametrize(("given", "found"), [(0, 0), (3, 0), (0, 3)])
def test_nothing_agrees_with_nothing(given, found):
    assert agreement(np.zeros((given, 4)), np.zeros((found, 4)), 5).tolist() == [-1] * given


def test_scattered_detections_agree_with_their_own_cells():
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(np.arange(60), np.arange(60)), axis=-1).reshape(-1, 2) * 30.0
    order = rng.permutation(len(centres))
    found = centres[order] + rng.uniform(-6, 6, centres.shape)
    assert (order[agreement(boxes_at(centres), boxes_at(found), 12)] == np.arange(len(centres))).all()
