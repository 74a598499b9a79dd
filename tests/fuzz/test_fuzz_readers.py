"""Files that users bring: a damaged one is refused by name with our own error, or gives usable values."""

import io
import json
import zipfile

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse
from strategies import DEEP, NUMBERS, damages, dump, mutations, refused, tries

from celldetr.cells.given_files import read_objects
from celldetr.cells.label_image import read_label_image
from celldetr.example.xenium.sample import write_xenium
from celldetr.pannuke.archive import NpyMember
from celldetr.slides import geojson
from celldetr.slides.outline_check import Keys
from celldetr.slides.outlines import read_nucleus_file
from celldetr.xenium.celltypes.reference import prepare_reference
from celldetr.xenium.output import read_counts, read_nuclei, read_pixel_size
from celldetr.xenium.registration.alignment import read_alignment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def read_damaged(path, content, read):
    """Write and read a file; return the result, or None if it was refused by name."""
    path.write_bytes(content)
    error, found = refused(read, path)
    assert error is None or str(path) in str(error), error
    return found


KEYPOINTS = "fixedX,fixedY,alignmentX,alignmentY\n" + "".join(
    f"{x},{y},{2 * x + y},{2 * y - x}\n" for x, y in ((0, 0), (900, 10), (30, 700), (800, 600))
)
MATRIX = "2.1,-0.2,30\n0.2,2.1,-10\n0,0,1\n"


@tries(80)
@given(data=st.data(), text=st.sampled_from([KEYPOINTS, MATRIX]), damage=st.one_of(st.none(), damages()))
def test_alignments(folder, data, text, damage):
    rows = [line.split(",") for line in text.splitlines()]
    if damage is None:
        row = data.draw(st.sampled_from(rows))
        place = data.draw(st.integers(0, len(row) - 1))
        row[place] = str(data.draw(st.one_of(NUMBERS, st.sampled_from(["1e308", "-1e308", "", "x", "5e-324", '"']))))
    content = ("\n".join(map(",".join, rows)) + "\n").encode()
    found = read_damaged(folder / "alignment.csv", damage(content) if damage else content, read_alignment)
    if found is not None:
        assert np.isfinite(found.matrix).all()
        assert np.isfinite(np.linalg.inv(found.matrix)).all()
        assert np.isfinite(found.residuals).all()


def square(x, y, side=30.0):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {"type": "Feature", "properties": {"a": 1}, "geometry": {"type": "Polygon", "coordinates": [square(10, 20)]}},
        {"geometry": {"type": "MultiPolygon", "coordinates": [[square(100, 20)], [square(900, 40)]]}},
        {
            "geometry": {"type": "Polygon", "coordinates": []},
            "nucleusGeometry": {"type": "Point", "coordinates": [1, 2]},
        },
        {"geometry": None},
    ],
}


def outlines(path):
    return read_nucleus_file(path, image_mpp=0.25, mpp=0.25)


def check_nuclei(found):
    if found is not None:
        boxes = found.nuclei.boxes
        assert np.isfinite(boxes).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@tries(140)
@given(data=st.data(), damage=st.one_of(st.none(), damages()))
def test_geojson(folder, data, damage):
    content = damage(dump(GEOJSON)) if damage else dump(data.draw(mutations(GEOJSON, most=3))[0])
    check_nuclei(read_damaged(folder / "a.geojson", content, outlines))


LIST = [
    {"type": "Feature", "id": "x", "geometry": shapely.geometry.mapping(shapely.Point(9, 9).buffer(5))},
    {"type": "Feature", "id": 7, "properties": {"objectType": "cell", "cell_id": "a"}, **GEOJSON["features"][0]},
    {"type": "Feature", "properties": None, **GEOJSON["features"][1], "nucleusGeometry": None},
    {"type": "Feature", "id": "PathCellObject", **GEOJSON["features"][0], "nucleusGeometry": {"type": "Point"}},
    {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[1, 2, 3], [4, 5, 6]]}},
    {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[*corner, 1] for corner in square(5, 5)]]}},
]


def batches_of(path):
    found = [([*shapely.to_wkb(shapes)], kinds.tolist(), ids) for shapes, kinds, ids in geojson.read_geojson(path)]
    return [sum(parts, []) for parts in zip(*found, strict=True)]


@tries(150)
@given(
    data=st.data(),
    damage=st.one_of(st.none(), st.none(), damages()),
    head=st.sampled_from(["features", "cells", "other", None]),
    indent=st.sampled_from([None, 1]),
    block=st.sampled_from([16, 300, 1 << 20]),
)
def test_features_read_in_blocks_are_those_read_one_by_one(folder, data, damage, head, indent, block):
    features = LIST if damage else data.draw(mutations(LIST, most=2))[0]
    content = json.dumps(features if head is None else {"type": "x", head: features, "name": "n"}, indent=indent)
    path = folder / "a.geojson"
    path.write_bytes(damage(content.encode()) if damage else content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geojson, "_BLOCK", block)
        patch.setattr(geojson, "_HEAD", block + 300)
        fast = refused(batches_of, path)
        patch.setattr(geojson, "_fast_outlines", lambda stream: [])
        slow = refused(batches_of, path)
    if "integer overflow" not in str(slow[0]):  # orjson reads such a number
        assert fast[1] == slow[1]
        assert (fast[0] is None) == (slow[0] is None)


LONG = b'[{"geometry": {"type": "Polygon", "coordinates": [[[1, 2], [3, ' + b"9" * 5000 + b"], [5, 6]]]}}]"


@pytest.mark.parametrize("text", [DEEP, b'{"features": ' + DEEP, b'{"features": [' * 5000, LONG])
def test_deep_or_long_geojson(folder, text):
    assert read_damaged(folder / "a.geojson", text, outlines) is None


@pytest.fixture(scope="module")
def outline_files(folder):
    """Bytes of the same outlines as Parquet with WKB, as GeoParquet, and as zipped GeoJSON."""
    polygons = [shapely.Polygon(square(50 * i, 70 * i)) for i in range(20)]
    table = pa.table({"geometry": pa.array(shapely.to_wkb(polygons).tolist(), pa.binary())})
    geo = {"primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}, "version": "1.0.0"}
    files = {}
    for name, metadata in (("plain", None), ("geo", {"geo": json.dumps(geo)})):
        pq.write_table(table.replace_schema_metadata(metadata), folder / "a.parquet")
        files[name] = (folder / "a.parquet").read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.geojson", json.dumps(GEOJSON))
    files["zip"] = buffer.getvalue()
    return files


@tries(120)
@given(name=st.sampled_from(["plain", "geo", "zip"]), damage=damages())
def test_parquet_and_zipped_outlines(folder, outline_files, name, damage):
    check_nuclei(read_damaged(folder / "a.outlines", damage(outline_files[name]), outlines))


@tries(40)
@given(geo=st.one_of(mutations({"primary_column": "g", "columns": {"g": {"encoding": "WKB"}}}).map(lambda m: m[0])))
def test_metadata_of_geoparquet(folder, geo):
    table = pa.table({"g": pa.array([shapely.Polygon(square(0, 0)).wkb, b"broken", None], pa.binary())})
    path = folder / "geo.parquet"
    pq.write_table(table.replace_schema_metadata({"geo": dump(geo)}), path)
    check_nuclei(read_damaged(path, path.read_bytes(), outlines))


@pytest.fixture(scope="module")
def cell_files(folder):
    """Bytes of tables of cells: boxes, points, and corners."""
    boxes = pd.DataFrame({"x0": [1.0, 30], "y0": [2.0, 4], "x1": [20.0, 50], "y1": [24.0, 20], "cell_id": ["a", "b"]})
    points = pd.DataFrame({"x": [1.0, 30], "y": [2.0, 4], "diameter_um": [6.0, 7], "id": [3, 4]})
    corners = pd.DataFrame(
        {"cell_id": list("aaabbb"), "vertex_x": [1, 5, 5, 8, 9, 9.0], "vertex_y": [1, 1, 4, 8, 8, 9]}
    )
    files = {}
    for name, table in {"boxes": boxes, "points": points, "corners": corners}.items():
        table.to_parquet(folder / "a.parquet")
        files |= {name: (folder / "a.parquet").read_bytes(), f"{name} as text": table.to_csv(index=False).encode()}
    return files


@tries(100)
@given(data=st.data(), kind=st.sampled_from(["boxes", "points", "corners"]), damage=st.one_of(st.none(), damages()))
def test_tables_of_cells(folder, cell_files, data, kind, damage):
    if damage is None:
        rows = [line.split(",") for line in cell_files[f"{kind} as text"].decode().splitlines()]
        row = data.draw(st.sampled_from(rows))
        odd = st.one_of(
            NUMBERS, st.sampled_from(["1e308", "-1e308", "", "x", "5e-324", '"', "nan", "inf", "1_0", "0x9"])
        )
        row[data.draw(st.integers(0, len(row) - 1))] = str(data.draw(odd))
        content = ("\n".join(map(",".join, rows)) + "\n").encode()
    else:
        content = damage(cell_files[data.draw(st.sampled_from([kind, f"{kind} as text"]))])
    found = read_damaged(folder / "a.cells", content, lambda path: read_objects(path, um=0.5))
    if found is not None:
        assert len(found.ids) == len(found.shapes) == len(found.kinds)
        assert all(isinstance(name, str) and name for name in found.ids)
        assert (shapely.is_empty(found.shapes) | np.isfinite(shapely.bounds(found.shapes)).all(axis=1)).all()


def packed(header, body=b"\x01" * 64, version=1):
    """Bytes of an archive with one .npy of a given header."""
    text = header + b" " * (16 - len(header) % 16) + b"\n"
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY" + bytes([version, 0]) + length + text + body)
    return buffer.getvalue()


def read_all(path):
    with NpyMember(path, "a.npy") as member:
        parts = [member.read() for _ in range(min(len(member), 100))]
        member.finish()
        return np.concatenate(parts) if parts else np.empty(member.shape)


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16), }"
HEADERS = st.one_of(
    st.tuples(
        st.sampled_from(["'|u1'", "'<f8'", "'|O'", "'<U3'", "[('a', '<i4')]", "'<M8[ns]'", "1", "'zz'", "'|V0'"]),
        st.sampled_from(["False", "True", "None"]),
        st.sampled_from(
            ["(4, 16)", "()", "(-4, 16)", "(4, -16)", "(2,) * 70", f"({10**30}, {10**30})", "(1.5,)", "4", "(0, 4)"]
        ),
    ).map(lambda parts: "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format(*parts).encode()),
    st.binary(max_size=40),
    st.sampled_from([b"(" * 300, b"{'a': ", b"  x\n y", b"'''", b"9" * 5000, b"\\", b"(1)(2)", b"-" * 5000]),
)


@tries(100)
@given(header=HEADERS, version=st.sampled_from([1, 2, 3]))
def test_headers_of_arrays(folder, header, version):
    read_damaged(folder / "a.zip", packed(header, version=version), read_all)


@tries(80)
@given(damage=damages())
def test_damaged_archives(folder, damage):
    whole = packed(HEADER)
    found = read_damaged(folder / "a.zip", damage(whole), read_all)
    assert found is None or np.array_equal(found, np.full((4, 16), 1, np.uint8))


@pytest.fixture(scope="module")
def reference(folder):
    """Bytes of an annotated scRNA-seq reference."""
    counts = np.random.default_rng(6).poisson(2.0, (60, 30)).astype(np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(["CD4", "tumour", "CD8"] * 20)}, index=[f"c{i}" for i in range(60)])
    table = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(30)]))
    table.write_h5ad(folder / "whole.h5ad")
    assert prepare(folder / "whole.h5ad")[0].n_obs > 0
    return (folder / "whole.h5ad").read_bytes()


def prepare(path):
    mapping = {"CD4": "T", "CD8": "T", "tumour": "Malignant"}
    return prepare_reference(path, mapping, label_column="kind", cells_per_type=10, seed=1)


@tries(12)
@given(share=st.floats(0, 1, exclude_max=True))
def test_references_that_end_early(folder, reference, share):
    assert read_damaged(folder / "a.h5ad", reference[: int(share * len(reference))], prepare) is None


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    made = write_xenium(tmp_path_factory.mktemp("x"), seed=5, size_um=(60, 60), rim_um=0, he_mpp=0.5, alignment=None)
    return made.outs


@tries(80)
@given(data=st.data(), damage=st.one_of(st.none(), damages()))
def test_damaged_specifications(folder, outs, data, damage):
    content = (outs / "experiment.xenium").read_bytes()
    content = (
        damage(content) if damage else dump(data.draw(mutations({"pixel_size": 0.2125, "analysis_sw_version": "x"}))[0])
    )
    (folder / "specs").mkdir(exist_ok=True)
    path = folder / "specs" / "experiment.xenium"
    found = read_damaged(path, content, lambda path: read_pixel_size(path.parent))
    assert found is None or 0.01 < found < 10


@tries(80)
@given(damage=damages())
def test_damaged_nuclei(folder, outs, damage):
    (folder / "nuclei").mkdir(exist_ok=True)
    path = folder / "nuclei" / "nucleus_boundaries.parquet"
    content = damage((outs / path.name).read_bytes())
    found = read_damaged(path, content, lambda path: read_nuclei(path.parent))
    assert found is None or np.isfinite(found.bounds.to_numpy()).all()


ODD_COLUMNS = st.sampled_from(
    [pa.array([None] * 8, pa.float64()), pa.array(["x"] * 8), pa.array([[1.0]] * 8), pa.array([float("nan")] * 8)]
    + [pa.array([True] * 8), pa.array([10**9] * 8), pa.array([None, "a"] * 4), pa.array([b"\xff"] * 8)]
)


@tries(40)
@given(name=st.sampled_from(["cell_id", "vertex_x", "vertex_y", "label_id"]), column=ODD_COLUMNS)
def test_nuclei_with_odd_columns(folder, name, column):
    (folder / "nuclei").mkdir(exist_ok=True)
    corner = pa.array([0.0, 1, 1, 0, 0.0, 1, 1, 0])
    columns = {"cell_id": pa.array(["a"] * 4 + ["b"] * 4), "vertex_x": corner, "vertex_y": pa.array([0.0, 0, 1, 1] * 2)}
    path = folder / "nuclei" / "nucleus_boundaries.parquet"
    pq.write_table(pa.table({**columns, name: column}), path)
    read_damaged(path, path.read_bytes(), lambda path: read_nuclei(path.parent))


@tries(12)
@given(share=st.floats(0, 1, exclude_max=True))
def test_counts_that_end_early(folder, outs, share):
    (folder / "counts").mkdir(exist_ok=True)
    content = (outs / "cell_feature_matrix.h5").read_bytes()
    path = folder / "counts" / "cell_feature_matrix.h5"
    assert read_damaged(path, content[: int(share * len(content))], lambda path: read_counts(path.parent)) is None


LABELS = np.kron(np.arange(12).reshape(3, 4), np.ones((9, 9))).astype(np.uint16)


def label_file(kind):
    """Return the bytes of a label image."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, LABELS)
    elif kind == "png":
        Image.fromarray(LABELS).save(file, format="png")
    else:
        tifffile.imwrite(file, LABELS, tile=(16, 16), compression="zlib")
    return file.getvalue()


@tries(60)
@given(content=st.sampled_from([label_file(kind) for kind in ("npy", "png", "tif")]), damage=damages())
def test_label_images(folder, content, damage):
    def read(path):
        return read_label_image(path, (36, 27), 1.0, nuclei_mpp=None, most_um=30.0, keys=Keys())

    found = read_damaged(folder / "labels", damage(content), read)
    if found is not None:
        assert len(found) == len(set(found.ids))
        assert shapely.is_valid(found.shapes).all()
        assert shapely.area(found.shapes).sum() <= LABELS.size
