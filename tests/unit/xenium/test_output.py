"""Reading Xenium output folders of all versions, and saving a registered sample: what was planted comes back."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
import zarr
from scipy.spatial import cKDTree

from celldetr.example.xenium.sample import AffinePlan, write_xenium
from celldetr.runtime.errors import InputError
from celldetr.xenium.output import READ_MEMBERS, choose_members, dapi_path, read_counts, read_nuclei, read_pixel_size
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.spatial import write_spatialdata

VERSIONS = {"1.0.1": True, "1.5.0": True, "2.0.0": False, "3.0.0": True, "4.0.0": True}  # False: no label_id


@pytest.fixture(scope="module", params=VERSIONS)
def truth(request, tmp_path_factory):
    """Write a small sample of a version."""
    return write_xenium(
        tmp_path_factory.mktemp(request.param),
        seed=3,
        size_um=(90, 70),
        version=request.param,
        label_ids=VERSIONS[request.param],
        rim_um=0,
        he_mpp=0.5,
        affine=AffinePlan(rotation_deg=20, shift_um=(5, 9)),
        alignment=None,
    )


@pytest.fixture
def outs(tmp_path):
    """Write a folder of version 3 that a test may damage."""
    return write_xenium(tmp_path / "raw", seed=5, size_um=(60, 60), rim_um=0, he_mpp=0.5, alignment=None).outs


def test_counts_and_nuclei_come_back(truth):
    counts, found_nuclei = read_counts(truth.outs), read_nuclei(truth.outs)
    assert read_pixel_size(truth.outs) == 0.2125
    assert counts.obs_names.tolist() == truth.cell_ids.tolist()
    assert counts.var_names.tolist() == list(truth.genes)
    assert (truth.counts != counts.X).nnz == 0
    assert counts.var["gene_ids"].str.startswith("ENSG").all()
    # a cell may have several nuclei or none; the file lists the nuclei by cell
    assert found_nuclei["cell_id"].tolist() == truth.cell_ids[truth.nucleus_cell].tolist()
    for polygon, planted in zip(found_nuclei.geometry, truth.nuclei_um, strict=True):
        assert np.abs(shapely.get_coordinates(polygon)[:-1] - planted).max() < 1e-4  # um


def test_the_dapi_image_is_found_in_every_layout(truth):
    names = [path.relative_to(truth.outs).as_posix() for path in truth.outs.rglob("*") if path.is_file()]
    chosen = choose_members(names)
    assert dapi_path(truth.outs).relative_to(truth.outs).as_posix() == chosen[-1]
    assert "transcripts.parquet" not in chosen
    assert all((truth.outs / name).is_file() for name in chosen)


@pytest.mark.parametrize("truth", ["1.0.1", "2.0.0", "4.0.0"], indirect=True)
def test_a_saved_sample_is_aligned(truth, tmp_path):
    ids = truth.cell_ids
    write_spatialdata(
        tmp_path / "a.zarr", truth.outs, truth.he_image, truth.matrix, pd.DataFrame({"type": truth.types}, index=ids)
    )
    sample = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert {"he", "dapi"} <= set(sample.images)
    assert sample.tables["table"].obs["type"].tolist() == truth.types.tolist()
    shapes = spatialdata.transform(sample.shapes["nucleus_boundaries"], to_coordinate_system="global")
    got = shapely.get_coordinates(shapes.geometry.centroid) * truth.pixel_size
    nearest, _ = cKDTree(truth.nuclei_um.mean(axis=1)).query(got)
    assert len(got) == len(truth.nuclei_um)
    assert np.median(nearest) < 0.5
    motion = spatialdata.transformations.get_transformation(sample.images["he"])
    assert np.allclose(motion.to_affine_matrix(("x", "y"), ("x", "y")), truth.matrix)


def test_outlines_and_transcripts_follow_the_field_onto_the_he(tmp_path):
    options = {"size_um": (90, 70), "rim_um": 0, "he_mpp": 0.5, "alignment": None}
    truth = write_xenium(tmp_path, seed=3, affine=AffinePlan(rotation_deg=20, shift_um=(5, 9)), **options)
    rng, number = np.random.default_rng(0), 300
    spots = pd.DataFrame({"transcript_id": np.arange(number, dtype=np.uint64), "cell_id": truth.cell_ids[0]})
    spots["feature_name"] = rng.choice(truth.genes, number)
    for axis, name in enumerate(("x_location", "y_location", "z_location")):
        spots[name] = (rng.random(number) * (90, 70, 5)[axis]).astype(np.float32)
    spots.assign(overlaps_nucleus=np.uint8(0), qv=np.float32(40)).to_parquet(truth.outs / "transcripts.parquet")
    values = np.stack([np.full((9, 9), 3.0), np.full((9, 9), -2.0)])
    field = DisplacementField(x=-100, y=-100, spacing=50, coefficients=values)
    cells = pd.DataFrame({"type": truth.types}, index=truth.cell_ids.tolist())
    write_spatialdata(tmp_path / "a.zarr", truth.outs, truth.he_image, truth.matrix, cells, field)
    sample = spatialdata.read_zarr(tmp_path / "a.zarr")
    back = np.linalg.inv(truth.matrix)
    for name in ("nucleus_boundaries", "cell_boundaries"):
        plain, moved = (shapely.get_coordinates(sample.shapes[key].geometry) for key in (name, f"{name}_he"))
        expected = (plain + (3, -2)) / truth.pixel_size @ back[:2, :2].T + back[:2, 2]
        assert np.allclose(moved, expected, atol=1e-3)
        motion = spatialdata.transformations.get_transformation(sample.shapes[f"{name}_he"])
        assert np.allclose(motion.to_affine_matrix(("x", "y"), ("x", "y")), truth.matrix)
    points = sample.points["transcripts"].compute()
    expected = (points[["x", "y"]].to_numpy() + (3, -2)) / truth.pixel_size @ back[:2, :2].T + back[:2, 2]
    assert np.allclose(points[["x_he", "y_he"]], expected, atol=1e-2)
    assert "global" in spatialdata.transformations.get_transformation(sample.points["transcripts"], get_all=True)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("experiment.xenium", read_pixel_size),
        ("cell_feature_matrix.h5", read_counts),
        ("nucleus_boundaries.parquet", read_nuclei),
    ],
)
def test_a_missing_or_damaged_file_is_named(outs, name, read):
    (outs / name).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=rf"{name}: .*(get it again|file of a Xenium run)"):
        read(outs)
    (outs / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: no such file"):
        read(outs)


def test_counts_of_another_run_with_the_same_ids_are_refused(outs):
    path = outs / "cells.parquet"
    cells = pd.read_parquet(path)
    cells.assign(transcript_counts=cells["transcript_counts"].sample(frac=1, random_state=1).to_numpy()).to_parquet(
        path
    )
    with pytest.raises(InputError, match=r"cell_feature_matrix.h5: got counts of other cells.* 0\.\d\d, expected 0.8"):
        read_counts(outs)
    cells.assign(cell_id=[f"other{number}" for number in range(len(cells))]).to_parquet(path)
    with pytest.raises(InputError, match=r"got counts of other cells.*: 0 of \d+ ids"):
        read_counts(outs)


def change_nuclei(outs, change):
    """Change the table of outlines and read it again."""
    path = outs / "nucleus_boundaries.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    return read_nuclei(outs)


def test_corners_are_grouped_by_nucleus_wherever_their_rows_are(outs):
    whole = read_nuclei(outs)

    def in_halves(table):
        return table.iloc[np.argsort(table.groupby("label_id").cumcount() > 4, kind="stable")]

    found = change_nuclei(outs, in_halves)
    assert found["cell_id"].tolist() == whole["cell_id"].tolist()
    assert found.geom_equals(whole).all()


def test_outlines_of_too_few_corners_are_empty(outs, caplog):
    whole = read_nuclei(outs)

    def cut(table):
        table.loc[5, "vertex_x"] = np.nan
        label = table["label_id"].iloc[-1]
        return table.drop(index=table.index[table["label_id"] == label][2:])

    found = change_nuclei(outs, cut)
    assert len(found) == len(whole)
    assert np.flatnonzero(found.is_empty).tolist() == [0, len(whole) - 1]
    assert f"2 of {len(whole)} nuclei have fewer than 3 finite corners" in caplog.text
    assert found.geometry[1:-1].geom_equals(whole.geometry[1:-1]).all()


def test_corners_without_an_id(outs):
    def nameless(table):
        return table.assign(cell_id=table["cell_id"].where(table["label_id"] != 1, None))

    found = change_nuclei(outs, nameless)
    assert found["cell_id"].iloc[0] == ""
    assert not found.is_empty.any()
    with pytest.raises(InputError, match=r"\d+ corners without cell_id, expected one for each"):
        change_nuclei(outs, lambda table: table.drop(columns="label_id"))
    with pytest.raises(InputError, match="1 corners without label_id"):
        change_nuclei(outs, lambda table: table.assign(label_id=[None, *range(1, len(table))]))


def test_a_shuffled_table_of_corners_is_refused(outs):
    with pytest.raises(InputError, match="not in their order"):
        change_nuclei(outs, lambda table: table.sample(frac=1, random_state=1))


def test_an_imported_segmentation(outs, tmp_path):
    """Proseg, imported by Xenium Ranger: only `polygon_sets/0` in cells.zarr.zip; it may have nuclei or not."""
    whole = read_counts(outs)
    source = zarr.open_group(zarr.storage.ZipStore(outs / "cells.zarr.zip", mode="r"), mode="r")
    with zarr.storage.ZipStore(tmp_path / "cells.zarr.zip", mode="w") as store:
        copy = zarr.open_group(store, mode="w", zarr_format=2)
        for name in ("cell_id", "cell_summary", "polygon_sets/0/cell_index", "masks/0"):
            copy.create_array(name, data=source[name][:], attributes=dict(source[name].attrs))
    shutil.copy(tmp_path / "cells.zarr.zip", outs)
    assert (read_counts(outs).X != whole.X).nnz == 0
    assert len(read_nuclei(outs)) > 0
    with pytest.raises(InputError, match="not an imported segmentation: get the original"):
        write_spatialdata(tmp_path / "a.zarr", outs, outs.parent / "drawn_he_image.ome.tif", np.eye(3), pd.DataFrame())
    with pytest.raises(InputError, match="imported into Xenium without nuclei is not supported"):
        change_nuclei(outs, lambda table: table[:0])


def test_an_implausible_pixel_size_is_refused(tmp_path):
    (tmp_path / "experiment.xenium").write_text(json.dumps({"pixel_size": 212.5}))
    with pytest.raises(InputError, match=r"pixel_size: got 212\.5, expected um per pixel"):
        read_pixel_size(tmp_path)


def test_a_folder_without_dapi_is_refused(outs):
    shutil.rmtree(outs / "morphology_focus")
    with pytest.raises(InputError, match="got no DAPI image"):
        dapi_path(outs)
    with pytest.raises(InputError, match=r"morphology_focus/ch0000_dapi\.ome\.tif or"):
        choose_members([path.name for path in outs.iterdir()])
    with pytest.raises(InputError, match=r"got no nucleus_boundaries\.parquet, .*imported into Xenium without nuclei"):
        choose_members([*READ_MEMBERS[:4], READ_MEMBERS[-1], "morphology_mip.ome.tif"])
