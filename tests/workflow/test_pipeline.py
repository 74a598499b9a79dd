"""What a finished run of the whole workflow holds: tables, samples, slides, provenance, logs, the report."""

import gzip
import json
import re

import anndata
import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata
import torch
from small_run import OTHERS, ROOT, SMALL

from celldetr.cells.table import CellFile
from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.model.weights import load_model
from celldetr.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def results(finished):
    return finished.work / "results"


def measured(path):
    """Rows of a table that were measured, by experiment."""
    table = pd.read_csv(path, sep="\t", keep_default_na=False)
    assert {"paper", "measured"} <= set(table["source"])
    return table[table["source"] == "measured"].set_index("experiment")


def test_table_1_holds_published_and_measured_rows(results):
    table = measured(results / "table1.tsv")
    assert list(table["system"]) == [*("HoverNet" for _ in OTHERS), "Deformable DETR", "CellDETR-P"]
    assert {"Neoplastic_P", "Necrotic_F", "Detection_F"} <= set(table.columns)


def test_table_2_holds_the_linear_probe_and_the_frozen_features(results):
    assert list(measured(results / "table2.tsv").index) == ["ssl_probe"]
    table = pd.read_csv(results / "table2.tsv", sep="\t", keep_default_na=False)
    frozen = table[~table["source"].isin(["paper", "measured"])]
    names = ["Nearest neighbours", "Logistic regression"]
    assert list(frozen["system"]) == [*names, *(f"{name}, random (seed 42) weights" for name in names)]
    assert (frozen["Detection_F"] == "NA").all()
    assert (frozen["Neoplastic_F"].astype(float) > 0).any()


def test_table_3_holds_zero_shot_without_necrotic_nuclei_and_finetuning(results):
    table = measured(results / "table3.tsv")
    assert list(table.index) == ["st_zero_shot", "st_finetune"]
    assert table.loc["st_zero_shot", "Necrotic_F"] == "NA"
    assert table.loc["st_zero_shot", "note"] == "Necrotic: the model has no such class"
    assert table.loc["st_finetune", "Necrotic_F"] != "NA"
    scores = pd.read_csv(results / "scores" / "st_pretrain" / "split1.tsv", sep="\t")
    assert set(scores["class"]) == {"Detection", *ST_TYPES}


def test_slides_give_patches_without_labels(results):
    for slide in ("drawn_slide_1", "drawn_slide_2"):
        store = open_store(results / "slides" / slide / f"{slide}.zarr")
        assert store.classes == ()
        assert (store.labels == -1).all()
    split = pd.read_csv(results / "slides" / "split.tsv", sep="\t")
    assert set(split["part"]) == {"train", "val", "unused"}
    assert (split["part"] != "unused").sum() == SMALL["slides"]["total"]


def test_the_linear_probe_trains_the_class_head_alone(results):
    models = [load_model(results / "models" / name / "split1" / "model.pt") for name in ("ssl_pretrain", "ssl_probe")]
    before, after = (model.state_dict() for model in models)
    shared = [name for name in after if name in before]
    assert {name.split(".")[0] for name in after if name not in before} == {"class_head"}
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_xenium_samples_are_registered_labelled_and_split_without_shared_tissue(results):
    folder = results / "xenium"
    for sample, origin in (("drawn_1", "file, refined"), ("drawn_2", "estimated")):
        record = json.loads((folder / sample / "registration.json").read_text(encoding="utf-8"))
        assert record["origin"] == origin
        assert record["quality"]["distance"] < 1.5
        store = open_store(folder / sample / f"{sample}.zarr")
        assert store.classes == ST_TYPES
        assert 0.4 < (store.labels >= 0).mean() < 1
    split = pd.read_csv(folder / "split.tsv", sep="\t")
    assert set(split["part"]) - {"unused"} == {"train", "val", "test"}
    assert open_store(folder / "test.zarr").n_patches == (split["part"] == "test").sum()


def test_a_section_of_sthelar_is_a_sample_like_the_others(results):
    store = open_store(results / "xenium" / "drawn_s0" / "drawn_s0.zarr")
    assert store.classes == ST_TYPES
    assert store.attrs["image"]["mpp"] == pytest.approx(0.274, rel=0.03)  # measured
    split = pd.read_csv(results / "xenium" / "split.tsv", sep="\t")
    assert (split["store"] == "drawn_s0").sum() == store.n_patches
    assert "drawn_s0" in set(pd.read_csv(results / "figures" / "figure5a.tsv", sep="\t")["sample"])


def test_a_sample_is_saved_as_spatialdata(results):
    saved = results / "xenium" / "drawn_1" / "spatialdata.zarr"
    assert {"images", "shapes", "tables"} <= {path.name for path in saved.iterdir()}


SLIDES_OF_CELLS = {"drawn_slide_1": True, "drawn_slide_2": False}
"""Slide -> whether its cells are given."""


@pytest.mark.parametrize("slide", SLIDES_OF_CELLS)
def test_all_files_of_cells_hold_the_same_cells(results, slide):
    cells = CellFile(results / "cells" / f"{slide}.parquet")
    table = cells.frame()
    assert table.index.is_unique
    assert len(table) > 50
    assert (cells.info.given, cells.info.model["seen"]) == (SLIDES_OF_CELLS[slide], False)
    embeddings = np.concatenate(list(cells.embeddings()))
    adata = anndata.read_h5ad(results / "cells" / f"{slide}.h5ad")
    assert list(adata.obs_names) == list(table.index)
    np.testing.assert_array_equal(adata.X, embeddings)
    np.testing.assert_allclose(adata.obsm["spatial"], table[["x_um", "y_um"]])
    assert [*adata.obs["type"].astype(object).fillna("")] == [*table["type"].astype(object).fillna("")]
    with gzip.open(results / "cells" / f"{slide}.geojson.gz") as file:
        features = json.load(file)["features"]
    centres = [shapely.geometry.shape(feature["geometry"]).envelope.centroid for feature in features]
    np.testing.assert_allclose(shapely.get_coordinates(centres) * cells.info.mpp, table[["x_um", "y_um"]], atol=0.1)
    saved = spatialdata.read_zarr(results / "cells" / f"{slide}.zarr")
    (saved_table,) = saved.tables.values()
    assert list(saved_table.obs_names) == list(table.index)
    assert slide in (results / "cells" / f"{slide}.html").read_text(encoding="utf-8")


def test_given_cells_are_all_there_with_their_outlines(results):
    given = geopandas.read_parquet(results.parent / "example-input" / "slides" / "drawn_slide_1_cells.parquet")
    cells = CellFile(results / "cells" / "drawn_slide_1.parquet")
    outlines = pd.Series(np.concatenate(list(cells.outlines())), cells.frame().index)[given["cell_id"]]
    assert len(cells) == len(given)
    assert shapely.hausdorff_distance(outlines.to_numpy(), given.geometry.to_numpy()).max() < 0.01
    assert (cells.frame()["status"] == "read").all()


def test_found_cells_lie_on_drawn_nuclei(results):
    """The model has learnt little in two epochs: what it finds is on the tissue."""
    drawn = geopandas.read_parquet(results.parent / "example-input" / "slides" / "drawn_slide_2.parquet")
    cells = CellFile(results / "cells" / "drawn_slide_2.parquet")
    found = cells.frame()
    assert cells.info.counts["cells"] == len(found)
    width, height = (side * cells.info.mpp for side in cells.info.size)
    assert found["x_um"].between(0, width).all()
    assert found["y_um"].between(0, height).all()
    tissue = shapely.box(*drawn.total_bounds).buffer(20 / cells.info.mpp)
    centres = shapely.points(found[["x_um", "y_um"]].to_numpy() / cells.info.mpp)
    assert shapely.contains(tissue, centres).mean() > 0.95


def test_stores_hold_every_image_and_the_test_fold_is_held_out(results):
    split = pd.read_csv(results / "pannuke" / "split1.tsv", sep="\t")
    assert set(split.loc[split["part"] == "test", "store"]) == {"fold2"}
    assert set(split.loc[split["part"] != "test", "store"]) == {"fold1", "fold3"}
    for fold, count in zip((1, 2, 3), SMALL["example"]["images"], strict=True):
        assert open_store(results / "pannuke" / f"fold{fold}.zarr").n_patches == count
        assert (split["store"] == f"fold{fold}").sum() == count


def test_provenance_stands_beside_models_and_tables(results):
    for path in (
        results / "table1.provenance.json",
        results / "models" / "celldetr_p" / "split1" / "provenance.json",
        results / "models" / "st_pretrain" / "split1" / "provenance.json",
        results / "xenium" / "drawn_1" / "registration.provenance.json",
        results / "xenium" / "drawn_1" / "cells.provenance.json",
    ):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"settings", "versions", "git_revision", "inputs", "wall_seconds"} <= set(record)


def test_every_rule_wrote_its_log_and_benchmark(finished):
    rules = [path.stem for path in finished.jobs.glob("*.pickle")]
    assert len(rules) > 30
    for rule in rules:
        _, job = finished.job(rule)
        assert len(job.log) == 1
        assert (finished.work / job.log[0]).is_file()
        assert (finished.work / job.log[0].replace("logs/", "benchmarks/").replace(".log", ".tsv")).is_file()


def test_results_readme_names_every_file_and_column(results):
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([^`\n]+)`", text))
    free = {*PANNUKE_CLASSES, *ST_TYPES, ""}
    written = {path.name for path in results.iterdir() if path.is_dir()}
    assert {name for name in written if not any(said.startswith(f"{name}/") for said in names)} == set()
    for path in [*results.rglob("*.tsv"), *results.rglob("*.parquet")]:
        folders = path.relative_to(results).parts[:-1]
        if {"raw", "benchmarks", "logs"} & set(folders) or any(name.endswith(".zarr") for name in folders):
            continue
        columns = pq.read_schema(path).names if path.suffix == ".parquet" else read_columns(path)
        plain = {re.sub(r"(_(lo|hi)|^(fraction|score)_\w+|^[A-Z]\w+_[PRF])$", "", column) for column in columns}
        assert plain - names - free == set(), path


def read_columns(path):
    return path.read_text(encoding="utf-8").splitlines()[0].split("\t")


def test_report_is_one_file(finished, tmp_path):
    done = finished.snakemake("--report", tmp_path / "report.html")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "report.html").stat().st_size > 100_000
