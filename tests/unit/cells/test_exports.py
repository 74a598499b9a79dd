"""Files of cells for other tools: the same cells in all of them, as these tools read them."""

import contextlib
import gzip
import json
import re
import resource
import uuid

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scanpy
import shapely
import spatialdata
from cell_files import write_cells
from slide_files import write_image
from spatialdata.transformations import get_transformation

from celldetr.cells.cellvit import write_cellvit
from celldetr.cells.h5ad import write_h5ad
from celldetr.cells.qupath import write_geojson
from celldetr.cells.spatialdata_zarr import read_spatialdata, write_spatialdata
from celldetr.cells.table import STATUSES, CellFile, named
from celldetr.cells.table import writer as cell_writer
from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.runtime.errors import InputError
from celldetr.slides.geojson import read_geojson
from celldetr.slides.outlines import read_nucleus_file

COUNT, WIDTH, ORIGIN, MPP = 300, 8, (700, 1300), 0.25
FULL = {"slide": "s1", "model": {"file": "a.pt", "seen": None}, "settings": {"outputs": ["h5ad", "geojson"], "b/c": 1}}
FULL |= {"counts": {"tiles damaged": 2}, "provenance": {"versions": {"torch": "2"}, "mixed": [1, "a"], "none": []}}
LOST = {3: 1, 7: 2}  # row of a given cell that was not read -> its status
OUR_ID = str(uuid.UUID(int=5))
IDS = {0: OUR_ID, 1: 'a "quoted" \\ µ id', 2: "PathTileObject", 3: "00012"}


def changed(path, **columns):
    """Replace columns of a file of cells."""
    table = pq.read_table(path)
    with cell_writer(path, table.schema) as file:
        for name, values in columns.items():
            field = table.schema.field(name)
            table = table.set_column(table.schema.get_field_index(name), field, [pa.array(values, field.type)])
        file.write_table(table)
    return CellFile(path)


@pytest.fixture
def cells(tmp_path):
    """Given cells on a slide that was scanned in part, two of them not read, with outlines of all kinds."""
    path = tmp_path / "in" / "s1.parquet"
    path.parent.mkdir()
    write_cells(path, COUNT, width=WIDTH, given=True, origin=ORIGIN, mpp=MPP, size=(900, 1100), **FULL)
    frame, table = CellFile(path).frame(), pq.read_table(path)
    lost = np.isin(np.arange(COUNT), list(LOST))
    none = {name: pa.array(frame[name].to_numpy(), pa.float32(), mask=lost) for name in frame if "score" in name}
    types = frame["type"].cat.codes.to_numpy().copy()
    types[lost] = -1
    status = np.zeros(COUNT, int)
    status[list(LOST)] = list(LOST.values())
    outlines = shapely.from_wkb(table["geometry"].to_numpy())
    outlines[10] = outlines[10].centroid.buffer(10)
    outlines[11] = shapely.MultiPolygon([outlines[11], shapely.affinity.translate(outlines[11], 30)])
    outlines[12] = shapely.Polygon(outlines[12].exterior, [outlines[12].buffer(-3).exterior])
    corners = shapely.get_coordinates(outlines[13])[:4]
    outlines[13] = shapely.Polygon(corners[[0, 2, 1, 3]])  # crosses itself
    ids = frame.index.to_series().reset_index(drop=True)
    ids.update(pd.Series(IDS))
    return changed(
        path,
        cell_id=ids.tolist(),
        geometry=shapely.to_wkb(outlines).tolist(),
        type=named(types, PANNUKE_CLASSES),
        status=named(status, STATUSES),
        embedding=[None if lost[row] else value for row, value in enumerate(table["embedding"].to_pylist())],
        **none,
    )


def check_table(found, cells, dtype):
    """Compare an AnnData with the file that it was made of."""
    frame = cells.frame()
    embeddings = np.concatenate(list(cells.embeddings()))
    assert found.X.dtype == dtype
    np.testing.assert_array_equal(found.X, embeddings.astype(dtype))
    assert np.flatnonzero(np.isnan(found.X).any(axis=1)).tolist() == list(LOST)
    np.testing.assert_array_equal(found.obsm["spatial"], frame[["x_um", "y_um"]])
    same = frame.drop(columns=["x_um", "y_um"])
    pd.testing.assert_frame_equal(found.obs[list(same)], same, check_names=False)
    assert list(found.obs["type"].cat.categories) == list(PANNUKE_CLASSES)
    assert found.uns["type_colors"].tolist() == ["#FF9A1F", "#4FC8FF", "#19DDA0", "#F7EC3C", "#555555"]
    assert (found.uns["slide"], found.uns["mpp"], found.uns["model"]) == ("s1", MPP, {"file": "a.pt"})
    assert found.uns["settings"]["b_c"] == 1
    assert found.uns["settings"]["outputs"].tolist() == ["h5ad", "geojson"]
    assert found.uns["counts"] == {"tiles damaged": 2}
    assert found.uns["provenance"] == {"versions": {"torch": "2"}, "mixed": '[1, "a"]', "none": "[]"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_h5ad_holds_what_the_parquet_does(cells, tmp_path, caplog, dtype):
    write_h5ad(cells, tmp_path / "a.h5ad", dtype)
    assert "2 of 300 given cells" in caplog.text
    check_table(anndata.read_h5ad(tmp_path / "a.h5ad"), cells, dtype)
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(backed[5:9].X, np.concatenate(list(cells.embeddings()))[5:9].astype(dtype))
    assert "spatial" not in backed.uns  # squidpy would take cells for spots of a grid
    backed.file.close()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "neighbours"), [("float16", None), ("float32", "pynndescent")])  # of many cells
def test_scanpy_finds_the_planted_types(tmp_path, dtype, neighbours):
    write_cells(tmp_path / "a.parquet", 600, width=32)
    write_h5ad(CellFile(tmp_path / "a.parquet"), tmp_path / "a.h5ad", dtype)
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    scanpy.pp.neighbors(found, transformer=neighbours)
    scanpy.tl.umap(found, maxiter=20)
    scanpy.tl.leiden(found, resolution=0.5, flavor="igraph", n_iterations=2)
    typed = found[found.obs["type"].notna()]
    shares = pd.crosstab(typed.obs["leiden"], typed.obs["type"], normalize="index").max(axis=1)
    assert shares.min() > 0.8
    assert np.isfinite(found.obsm["X_umap"]).all()


def test_squidpy_joins_neighbouring_cells(tmp_path):
    squidpy = pytest.importorskip("squidpy")
    write_cells(tmp_path / "a.parquet", 100, width=2)
    write_h5ad(CellFile(tmp_path / "a.parquet"), tmp_path / "a.h5ad")
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    squidpy.gr.spatial_neighbors(found, radius=(0, 12))
    distances = found.obsp["spatial_distances"]
    assert 0 < distances.data.max() <= 12


def read_as_qupath(path):
    """Return the features of a file; fail where the reader of QuPath 0.4 to 0.6 would, or would drop something."""
    with gzip.open(path) as file:
        content = json.loads(file.read(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert content["type"] == "FeatureCollection"
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", feature["id"])
        assert feature["geometry"]["type"] in ("Polygon", "MultiPolygon")
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid  # else the reduction to two decimals raises
        assert shape.area > 0
        corners = feature["geometry"]["coordinates"]
        for polygon in [corners] if feature["geometry"]["type"] == "Polygon" else corners:
            assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in polygon)
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert isinstance(properties["name"], str)
        if "classification" in properties:
            assert set(properties["classification"]) == {"name", "color"}
            assert all(0 <= value <= 255 and type(value) is int for value in properties["classification"]["color"])
        assert all(type(value) in (int, float) for value in properties["measurements"].values())
        assert all(isinstance(value, str) for value in properties.get("metadata", {}).values())
    return content["features"]


def test_geojson_holds_the_cells_in_the_frame_of_qupath(cells, tmp_path):
    write_geojson(cells, tmp_path / "a.geojson.gz")
    features, frame = read_as_qupath(tmp_path / "a.geojson.gz"), cells.frame()
    assert [feature["properties"]["name"] for feature in features] == list(frame.index)
    assert len({feature["id"] for feature in features}) == COUNT
    assert features[0]["id"] == OUR_ID
    for row, feature in enumerate(features):
        properties, cell = feature["properties"], frame.iloc[row]
        found = pd.Series(properties["measurements"])
        wanted = {"Nucleus score": cell["nucleus_score"], "Width µm": cell["width_um"], "Height µm": cell["height_um"]}
        wanted = pd.Series(wanted | {f"Score {name}": cell[f"score_{name}"] for name in PANNUKE_CLASSES}, dtype=float)
        wanted = wanted.dropna()
        np.testing.assert_allclose(found[wanted.index], wanted, atol=0.0051)
        assert len(found) == len(wanted) == (2 if row in LOST else 8)
        kind = properties.get("classification", {"name": None})
        assert kind["name"] == (None if pd.isna(cell["type"]) else cell["type"])
        assert properties.get("metadata") == ({"status": STATUSES[LOST[row]]} if row in LOST else None)
    colours = {
        tuple(f["properties"]["classification"].values())[0]: f["properties"]
        for f in features
        if "classification" in f["properties"]
    }
    assert colours["neoplastic"]["classification"]["color"] == [255, 154, 31]
    shapes = np.concatenate(list(cells.outlines()))
    found = shapely.transform([shapely.geometry.shape(f["geometry"]) for f in features], lambda xy: xy + ORIGIN)
    np.testing.assert_allclose(shapely.bounds(found), shapely.bounds(shapes), atol=0.0051)
    good = np.arange(COUNT) != 13
    np.testing.assert_allclose(shapely.area(found)[good], shapely.area(shapes)[good], atol=0.5)
    (batch,) = read_geojson(tmp_path / "a.geojson.gz")
    assert batch[2] == list(frame.index)
    write_geojson(cells, tmp_path / "b.geojson.gz")
    assert (tmp_path / "a.geojson.gz").read_bytes() == (tmp_path / "b.geojson.gz").read_bytes()


def test_cells_come_back_from_geojson_at_their_place(tmp_path):
    write_cells(tmp_path / "a.parquet", COUNT, width=0, origin=ORIGIN, mpp=MPP)
    cells = CellFile(tmp_path / "a.parquet")
    write_geojson(cells, tmp_path / "a.geojson.gz")
    found = read_nucleus_file(tmp_path / "a.geojson.gz", image_mpp=MPP, mpp=MPP)
    assert not sum(found.dropped.values())
    truth = shapely.bounds(np.concatenate(list(cells.outlines())))
    np.testing.assert_allclose(found.nuclei.boxes + np.tile(ORIGIN, 2), truth, atol=0.0051)


def test_the_viewer_of_cellvit_gets_all_cells_of_a_type_as_one(cells, tmp_path, monkeypatch):
    plain = CellFile.batches
    monkeypatch.setattr(CellFile, "batches", lambda self, columns, rows=70: plain(self, columns, 70))
    write_cellvit(cells, tmp_path / "a.geojson")
    features = json.loads((tmp_path / "a.geojson").read_bytes())  # a list: the viewer goes through it
    kinds = cells.frame()["type"].cat.add_categories("untyped").fillna("untyped").to_numpy()
    assert [one["properties"]["classification"]["name"] for one in features] == [*PANNUKE_CLASSES, "untyped"]
    assert features[0]["properties"]["classification"]["color"] == [255, 154, 31]
    shapes = np.concatenate(list(cells.outlines()))
    for feature in features:
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "MultiPolygon")
        wanted = shapely.get_parts(shapes[kinds == feature["properties"]["classification"]["name"]])
        polygons = feature["geometry"]["coordinates"]
        assert all(len(polygon) == 1 for polygon in polygons)
        found = [shapely.Polygon(polygon[0]) for polygon in polygons]
        np.testing.assert_allclose(shapely.bounds(found), shapely.bounds(wanted), atol=0.0051)
    found = read_nucleus_file(tmp_path / "a.geojson", image_mpp=MPP, mpp=MPP)
    assert len(found.nuclei) == COUNT + 1 - found.dropped["outlines without area"]


def test_geojson_is_written_batch_by_batch(tmp_path, monkeypatch):
    write_cells(tmp_path / "a.parquet", 40_000, width=0)
    written, plain = [], gzip.GzipFile.write
    monkeypatch.setattr(gzip.GzipFile, "write", lambda self, data: (written.append(len(data)), plain(self, data))[1])
    write_geojson(CellFile(tmp_path / "a.parquet"), tmp_path / "a.geojson.gz")
    assert max(written) < sum(written) / 2
    with gzip.open(tmp_path / "a.geojson.gz") as file:
        lines = file.read().splitlines()
    assert len(lines) == 40_000 + 2  # one line each
    assert json.loads(lines[20_000].rstrip(b","))["properties"]["name"] == "20000"


def test_batches_that_have_been_read_leave_the_memory(tmp_path):
    write_cells(tmp_path / "a.parquet", 80_000, width=64)  # five row groups of 4 MB
    before, peak = pa.total_allocated_bytes(), 0
    for batch in CellFile(tmp_path / "a.parquet").embeddings():
        peak = max(peak, pa.total_allocated_bytes() - before)
        del batch
    assert peak < 14e6


def test_spatialdata_holds_outlines_table_and_image_in_one_frame(cells, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (1100, 900, 3), np.uint8)
    slide = write_image(tmp_path / "a.tif", pixels)
    write_spatialdata(cells, tmp_path / "a.zarr", "float16", slide)
    found = spatialdata.read_zarr(tmp_path / "a.zarr")
    check_table(found["table"], cells, "float16")
    assert list(found["cells"].index) == list(found["table"].obs["cell_id"]) == list(cells.frame().index)
    shapes = np.concatenate(list(cells.outlines()))
    assert all(shapely.equals_identical(found["cells"].geometry.to_numpy(), shapes))
    assert found["table"].uns["spatialdata_attrs"]["region"] == "cells"
    assert set(found.coordinate_systems) == {"global", "um"}
    in_um = spatialdata.transform(found["cells"], to_coordinate_system="um")
    good = np.delete(np.arange(COUNT), [11])  # a MultiPolygon is wider than its first part
    centres = shapely.bounds(in_um.geometry.to_numpy()).reshape(-1, 2, 2).mean(axis=1)
    np.testing.assert_allclose(centres[good], found["table"].obsm["spatial"][good], atol=1e-6)
    matched = spatialdata.match_sdata_to_table(found, table_name="table")
    assert len(matched["cells"]) == COUNT
    assert set(found.images) == {"he"}
    read = found["he"]["scale0"].image
    np.testing.assert_array_equal(read.transpose("y", "x", "c"), pixels)
    for frame, mpp in (("global", 1), ("um", MPP)):
        for element in (read, found["cells"]):
            matrix = get_transformation(element, frame).to_affine_matrix(("x", "y"), ("x", "y"))
            np.testing.assert_allclose(matrix, np.diag([mpp, mpp, 1]))
    write_image(slide, pixels[:, :-1])
    for said in ("got a slide of 899 x 1100 px, expected 900 x 1100", ""):
        for link in (False, True):
            with pytest.raises(InputError, match=f"a.tif: {said}"):
                write_spatialdata(cells, tmp_path / "b.zarr", image=slide, link=link)
            assert not (tmp_path / "b.zarr").exists()
        slide.write_bytes(b"none")


def test_a_linked_slide_is_read_from_its_own_file(cells, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (1100, 900, 3), np.uint8)
    (tmp_path / "slides").mkdir()
    (tmp_path / "cells").mkdir()
    slide = write_image(tmp_path / "slides" / "a.tif", pixels, levels=3)
    path = tmp_path / "cells" / "a.zarr"
    write_spatialdata(cells, path, image=slide, link=True)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < pixels.nbytes / 10
    plain = spatialdata.read_zarr(path)
    assert not plain.images
    assert plain.attrs["slide"]["file"] == "../../slides/a.tif"
    monkeypatch.chdir(path.parent)
    found = dict[str, spatialdata.SpatialData]()
    exec(plain.attrs["slide"]["open"], found)  # noqa: S102
    sdata = found["sdata"]
    levels = [sdata["he"][scale].image for scale in sdata["he"]]
    assert [tuple(level.shape[1:]) for level in levels] == [(1100, 900), (550, 450), (275, 225)]
    np.testing.assert_array_equal(levels[0].transpose("y", "x", "c"), pixels)
    coarse = pixels.reshape(275, 4, 225, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(levels[2].transpose("y", "x", "c"), coarse, atol=1.01)
    for frame, mpp in (("global", 1), ("um", MPP)):
        for step, level in zip((1, 2, 4), levels, strict=True):
            matrix = get_transformation(level, frame).to_affine_matrix(("x", "y"), ("x", "y"))
            np.testing.assert_allclose(matrix, np.diag([step * mpp, step * mpp, 1]))
        extent = spatialdata.get_extent(sdata["he"], coordinate_system=frame)
        assert (extent["x"], extent["y"]) == ((0, 900 * mpp), (0, 1100 * mpp))
    part = spatialdata.bounding_box_query(
        sdata["he"], ("x", "y"), min_coordinate=[10, 20], max_coordinate=[14, 28], target_coordinate_system="um"
    )
    np.testing.assert_array_equal(part["scale0"].image.transpose("y", "x", "c"), pixels[80:112, 40:56])
    (tmp_path / "slides").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"a\.zarr: its slide is not at .*a\.tif; give its place"):
        read_spatialdata(path)
    assert "he" in read_spatialdata(path, tmp_path / "moved" / "a.tif").images
    with pytest.raises(InputError, match="other.tif: got a slide of 899 x 1100 px, .* as of .*a.zarr"):
        read_spatialdata(path, write_image(tmp_path / "other.tif", pixels[:, :-1]))
    write_spatialdata(cells, tmp_path / "none.zarr")
    with pytest.raises(InputError, match="none.zarr: got no link to a slide"):
        read_spatialdata(tmp_path / "none.zarr", slide)


WRITERS = {"a.h5ad": write_h5ad, "a.geojson.gz": write_geojson, "a.zarr": write_spatialdata}
WRITERS |= {"a.cellvit.geojson": write_cellvit}


@pytest.mark.parametrize("count", [0, 5])
def test_files_of_no_cells_and_of_a_model_without_classes_and_embeddings(tmp_path, count):
    write_cells(tmp_path / "a.parquet", count, width=0 if count else WIDTH, classes=("only",))
    cells = CellFile(tmp_path / "a.parquet")
    for name, write in WRITERS.items():
        write(cells, tmp_path / name)
    table = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert table.shape == (count, 0 if count else WIDTH)
    assert len(table.obs["type"].cat.categories) == len(cells.info.classes)
    assert len(read_as_qupath(tmp_path / "a.geojson.gz")) == count
    data = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert data["table"].shape == table.shape
    assert not data.images


@pytest.mark.parametrize("kinds", [[-1, -1, -1], [4, -1, 2]])
def test_types_without_cells(tmp_path, kinds):
    write_cells(tmp_path / "a.parquet", 3, width=2)
    cells = changed(tmp_path / "a.parquet", type=named(np.array(kinds), PANNUKE_CLASSES))
    for name, write in WRITERS.items():
        write(cells, tmp_path / name)
    expected = [PANNUKE_CLASSES[kind] if kind >= 0 else None for kind in kinds]
    classes = [
        feature["properties"].get("classification", {}).get("name")
        for feature in read_as_qupath(tmp_path / "a.geojson.gz")
    ]
    assert classes == expected
    table, shown = anndata.read_h5ad(tmp_path / "a.h5ad"), spatialdata.read_zarr(tmp_path / "a.zarr")["table"]
    for found in (table, shown):
        assert [None if pd.isna(kind) else kind for kind in found.obs["type"]] == expected
    assert list(table.obs["type"].cat.categories) == list(PANNUKE_CLASSES)
    colours = dict(zip(table.obs["type"].cat.categories, table.uns["type_colors"], strict=True))
    used = list(shown.obs["type"].cat.categories)  # others would shift the colours in spatialdata-plot
    assert set(used) == set(expected) - {None}
    assert list(shown.uns["type_colors"]) == [colours[kind] for kind in used]


@contextlib.contextmanager
def file_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [2_000, 60_000])
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, name, size):
    (tmp_path / "in").mkdir()
    write_cells(tmp_path / "in" / "a.parquet", 3000, width=64)
    cells = CellFile(tmp_path / "in" / "a.parquet")
    with pytest.raises(OSError, match=name) as found, file_limit(size):
        WRITERS[name](cells, tmp_path / name)
    assert found.value.errno == 27
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
