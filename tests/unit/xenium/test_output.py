"""Reading Xenium output folders of all versions, and saving a registered sample: what was planted comes back."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import spatialdata

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
def outs(tmp_path, request):
    """Return a copy of a folder of version 3 that a test may damage."""
    made = write_xenium(tmp_path / "raw", seed=5, size_um=(60, 60), rim_um=0, he_mpp=0.5, alignment=None)
    return made.outs


def test_counts_and_nuclei_come_back(truth):
    counts, found_nuclei = read_counts(truth.outs), read_nuclei(truth.outs)
    assert read_pixel_size(truth.outs) == 0.2125
    assert counts.obs_names.tolist() == truth.cell_ids.tolist()
    assert counts.var_names.tolist() == list(truth.genes)
    assert (truth.counts != counts.X).nnz == 0
    assert counts.var["gene_ids"].str.startswith("ENSG").all()
    cells = truth.cell_ids[truth.nucleus_cell]
    assert sorted(found_nuclei["cell_id"]) == sorted(cells)  # a cell may have several nuclei or none
    areas = {name: [] for name in truth.cell_ids}
    for name, polygon in zip(cells, truth.nuclei_um, strict=True):
        areas[name].append(polygon.mean(axis=0))
    for name, nuclei in found_nuclei.groupby("cell_id"):
        found = np.array([[p.x, p.y] for p in nuclei.geometry.representative_point()])
        planted = np.array(areas[name])
        assert len(found) == len(planted)
        assert np.hypot(*(np.sort(found, axis=0) - np.sort(planted, axis=0)).T).max() < 4


def test_the_dapi_image_is_found_in_every_layout(truth):
    names = [path.relative_to(truth.outs).as_posix() for path in truth.outs.rglob("*") if path.is_file()]
    chosen = choose_members(names)
    assert dapi_path(truth.outs).relative_to(truth.outs).as_posix() == chosen[-1]
    assert "transcripts.parquet" not in chosen
    assert all((truth.outs / name).is_file() for name in chosen)


def test_a_saved_sample_is_aligned(truth, tmp_path):
    ids = truth.cell_ids
    write_spatialdata(
        tmp_path / "a.zarr", truth.outs, truth.he_image, truth.matrix, pd.DataFrame({"type": truth.types}, index=ids)
    )
    sample = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert {"he", "dapi"} <= set(sample.images)
    assert sample.tables["table"].obs["type"].tolist() == truth.types.tolist()
    shapes = spatialdata.transform(sample.shapes["nucleus_boundaries"], to_coordinate_system="global")
    got = np.array([[p.x, p.y] for p in shapes.geometry.centroid]) * truth.pixel_size
    assert len(got) == len(truth.nuclei_um)
    want = np.array([polygon.mean(axis=0) for polygon in truth.nuclei_um])
    nearest = np.hypot(*(got[:, None] - want[None]).transpose(2, 0, 1)).min(axis=1)
    assert np.median(nearest) < 0.5
    matrix = spatialdata.transformations.get_transformation(sample.images["he"]).to_affine_matrix(
        ("x", "y"), ("x", "y")
    )
    assert np.allclose(matrix, truth.matrix)


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
    table.drop(columns="vertex_y").to_parquet(outs / "nucleus_boundaries.parquet", index=False)
    with pytest.raises(InputError, match=r"nucleus_boundaries\.parquet: cannot be read"):
        read_nuclei(outs)


def test_a_section_without_nuclei_is_legal(outs):
    table = pq.read_table(outs / "nucleus_boundaries.parquet")
    pq.write_table(table.slice(0, 0), outs / "nucleus_boundaries.parquet")
    assert len(read_nuclei(outs)) == 0


def test_an_implausible_pixel_size_is_refused(outs):
    specs = json.loads((outs / "experiment.xenium").read_text())
    (outs / "experiment.xenium").write_text(json.dumps({**specs, "pixel_size": 212.5}))
    with pytest.raises(InputError, match=r"pixel_size: got 212\.5, expected um per pixel"):
        read_pixel_size(outs)


def test_a_folder_without_dapi_is_refused(outs):
    shutil.rmtree(outs / "morphology_focus")
    with pytest.raises(InputError, match="got no DAPI image"):
        dapi_path(outs)
    with pytest.raises(InputError, match=r"morphology_focus/ch0000_dapi\.ome\.tif or"):
        choose_members([path.name for path in outs.iterdir()])


def test_counts_are_those_of_genes(outs):
    assert not read_counts(outs).var_names.str.contains("Control|codeword", case=False).any()
