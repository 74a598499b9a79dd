"""Reading Xenium output folders of all versions, and saving a registered sample: what was planted comes back."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from scipy.spatial import cKDTree

from celldetr.example.xenium.sample import AffinePlan, write_xenium
from celldetr.runtime.errors import InputError
from celldetr.xenium.output import choose_members, dapi_path, read_counts, read_nuclei, read_pixel_size
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


@pytest.mark.parametrize("name", ["experiment.xenium", "cells.parquet", "cell_feature_matrix.h5", "cells.zarr.zip"])
def test_a_missing_or_damaged_file_is_named(outs, name):
    (outs / name).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"get it again|file of a Xenium run"):
        read_counts(outs), read_pixel_size(outs)
    (outs / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: no such file"):
        read_counts(outs), read_pixel_size(outs)


def test_a_damaged_table_of_nuclei_is_named(outs):
    table = pd.read_parquet(outs / "nucleus_boundaries.parquet")
    table.loc[5, "vertex_x"] = np.nan
    table.to_parquet(outs / "nucleus_boundaries.parquet", index=False)
    with pytest.raises(InputError, match="expected finite polygons"):
        read_nuclei(outs)
    table[:0].to_parquet(outs / "nucleus_boundaries.parquet", index=False)
    assert len(read_nuclei(outs)) == 0  # a section without nuclei is legal
    table.drop(columns="vertex_y").to_parquet(outs / "nucleus_boundaries.parquet", index=False)
    with pytest.raises(InputError, match=r"nucleus_boundaries\.parquet: cannot be read"):
        read_nuclei(outs)


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
