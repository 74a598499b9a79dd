"""References: drawn cells and genes are those of the file; values that are no raw counts are refused."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.runtime.errors import CellDETRError, InputError
from celldetr.runtime.provenance import sha256
from celldetr.xenium.celltypes.counts import read_rows, why_not_raw
from celldetr.xenium.celltypes.genes import shared_genes, symbols_and_ids
from celldetr.xenium.celltypes.reference import prepare_reference, read_reference, write_reference

MAPPING = {"CD4": "T", "CD8": "T", "tumour": "Malignant", "fibro": "Fibroblast", "doublet": "-"}
SIZES = {"CD4": 60, "CD8": 6, "tumour": 40, "fibro": 15, "doublet": 5}
GENES = 80


def raw_counts(cells, seed=0, depth=400):
    """Draw counts as droplets give them: depths that differ, most genes seen never or once."""
    generator = np.random.default_rng(seed)
    share = generator.dirichlet(np.full(GENES, 0.5))
    return generator.poisson(generator.lognormal(np.log(depth), 0.5, (cells, 1)) * share).astype(np.float32)


def data(counts=None, labels=None):
    names = np.repeat(list(SIZES), list(SIZES.values())) if labels is None else labels
    names = np.random.default_rng(5).permutation(names)
    counts = raw_counts(len(names)) if counts is None else counts
    obs = pd.DataFrame({"kind": pd.Categorical(names)}, index=[f"c{i}" for i in range(len(names))])
    var = pd.DataFrame(index=[f"G{i}" for i in range(counts.shape[1])])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


def prepare(path, table, mapping=MAPPING, label_column="kind", cells=20, seed=1):
    table.write_h5ad(path)
    return prepare_reference(path, mapping, label_column=label_column, cells_per_type=cells, seed=seed)


def normalised(counts, target=1e4):
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * target


def test_sampled_rows_are_those_of_the_file_and_come_back_from_theirs(tmp_path):
    table = data()
    reference, summary = prepare(tmp_path / "a.h5ad", table)
    rows = reference.obs_names.astype(int)
    np.testing.assert_array_equal(reference.X.toarray(), table.X.toarray()[rows])
    assert list(reference.obs["label"]) == list(table.obs["kind"].iloc[rows])
    assert [MAPPING[name] for name in reference.obs["label"]] == list(reference.obs["type"])
    assert summary["counts_from"] == "X"
    write_reference(tmp_path / "r.h5ad", reference)
    again = read_reference(tmp_path / "r.h5ad")
    assert (again.X != reference.X).nnz == 0
    assert again.obs.equals(reference.obs)
    assert {name: int(number) for name, number in again.uns["composition"].items()} == reference.uns["composition"]
    assert list(prepare(tmp_path / "a.h5ad", table)[0].obs_names) == list(reference.obs_names)
    assert list(prepare(tmp_path / "a.h5ad", table, seed=2)[0].obs_names) != list(reference.obs_names)
    (tmp_path / "r.h5ad").write_text("<html>")
    with pytest.raises(InputError, match="cannot be read"):
        read_reference(tmp_path / "r.h5ad")


def test_sample_is_balanced_and_has_every_label(tmp_path):
    reference, summary = prepare(tmp_path / "a.h5ad", data(), {**MAPPING, "Schwann": "-"})
    assert summary["unused_labels"] == ["Schwann"]
    assert summary["sampled"] == {**dict.fromkeys(ST_TYPES, 0), "T": 20, "Malignant": 20, "Fibroblast": 15}
    assert summary["labels"]["CD8"]["sampled"] >= 5  # an even share although it is rare
    assert summary["labels"]["doublet"]["sampled"] == 0
    assert "NK" in summary["missing_types"]
    # the composition is that of the file, not that of the sample
    composition = {"T": 66, "Malignant": 40, "Fibroblast": 15}
    assert reference.uns["composition"] == {**dict.fromkeys(ST_TYPES, 0), **composition}
    json.dumps(summary)
    held = reference.obs.groupby("type", observed=True)["held_out"].sum()
    assert dict(held) == {"T": 4, "Malignant": 4, "Fibroblast": 3}  # a fifth
    assert summary["held_out"] == 11


@pytest.mark.parametrize("place", ["raw", "counts", "raw_counts"])
def test_raw_counts_are_found_beside_normalised_values(tmp_path, place):
    table = data()
    raw = table.copy()
    if place == "raw":
        table.raw = raw  # of more genes than X
        table = table[:, 10:].copy()
    else:
        table.layers[place] = raw.X
    table.X = sparse.csr_matrix(np.log1p(normalised(table.X.toarray())))
    reference, summary = prepare(tmp_path / "a.h5ad", table)
    assert summary["counts_from"] == {"raw": "raw/X"}.get(place, f"layers/{place}")
    np.testing.assert_array_equal(reference.X.toarray(), raw.X.toarray()[reference.obs_names.astype(int)])
    assert list(reference.var_names) == list(raw.var_names)


def test_of_several_raw_counts_those_of_most_genes_are_taken(tmp_path):
    table = data()
    table.layers["counts"] = table.X.copy()
    table.raw = table[:, :30].copy()
    table.X = sparse.csr_matrix(np.log1p(normalised(table.X.toarray())))
    reference, summary = prepare(tmp_path / "a.h5ad", table)
    assert summary["counts_from"] == "layers/counts"
    assert reference.n_vars == GENES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda counts: np.log1p(normalised(counts)), "not whole, .*log-transformed"),
        (lambda counts: np.rint(normalised(counts)), "normalised to one total"),
        (lambda counts: counts * (2 + np.arange(len(counts)) % 7)[:, None], "no gene has a count of one"),
        (lambda counts: counts - 1, "negative"),
        (lambda counts: counts * 0, "all zero"),
    ],
)
def test_values_that_are_not_raw_counts_are_refused(tmp_path, change, words):
    table = data()
    table.X = sparse.csr_matrix(change(table.X.toarray()).astype(np.float32))
    with pytest.raises(InputError, match=words):
        prepare(tmp_path / "a.h5ad", table)


@pytest.mark.parametrize("depth", [60, 1000, 20_000])
def test_honest_counts_pass_and_rounding_after_scaling_up_or_down_is_noticed(depth):
    counts = raw_counts(200, depth=depth)
    assert why_not_raw(sparse.csr_matrix(counts)) is None
    for target in (100, 10_000, 100_000) if depth > 60 else ():
        scaled = sparse.csr_matrix(np.rint(normalised(counts, target)))
        assert "normalised to one total" in (why_not_raw(scaled) or "passed")


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_rows_are_read_from_every_layout(tmp_path, monkeypatch, layout):
    counts = raw_counts(50)
    anndata.AnnData(layout(counts)).write_h5ad(tmp_path / "a.h5ad")
    rows = np.array([0, 3, 4, 5, 30, 49])
    monkeypatch.setattr("celldetr.xenium.celltypes.counts._BLOCK", 4)  # several blocks
    with h5py.File(tmp_path / "a.h5ad") as file:
        np.testing.assert_array_equal(read_rows(file["X"], rows, counts.shape).toarray(), counts[rows])
    if layout is np.asarray:
        return
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:  # as older programs wrote it
        for name in list(file["X"].attrs):
            del file["X"].attrs[name]
        np.testing.assert_array_equal(read_rows(file["X"], rows, counts.shape).toarray(), counts[rows])
        with pytest.raises(InputError, match="without the attribute encoding-type, .*write the file again"):
            read_rows(file["X"], rows, (50, 50))


def without(*names):
    return {name: kind for name, kind in MAPPING.items() if name not in names}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mapping": without("CD8", "fibro")}, r"'fibro' \(15 cells\), 'CD8' \(6 cells\)"),
        ({"mapping": dict.fromkeys(MAPPING, "-") | {"CD4": "T"}}, "1 types"),
        ({"label_column": "cell"}, "expected one of kind: correct column label_column of the references sheet"),
        ({"cells": 1}, "cells_per_type: got 1, expected at least 2"),
    ],
)
def test_settings_that_do_not_fit_the_file_are_explained(tmp_path, settings, words):
    with pytest.raises(CellDETRError, match=words):
        prepare(tmp_path / "a.h5ad", data(), **settings)


def test_another_version_of_the_data_is_refused(tmp_path):
    data().write_h5ad(tmp_path / "a.h5ad")
    settings = {"label_column": "kind", "cells_per_type": 20, "seed": 1}
    _, summary = prepare_reference(tmp_path / "a.h5ad", MAPPING, **settings, cells=126)
    assert summary["sha256"] == sha256(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="got 126 cells, expected 127 .*another version"):
        prepare_reference(tmp_path / "a.h5ad", MAPPING, **settings, cells=127)


def test_missing_labels_are_counted_and_other_files_refused(tmp_path):
    table = data()
    table.obs.loc[table.obs_names[:7], "kind"] = np.nan
    with pytest.raises(InputError, match="7 of 126 cells have no label"):
        prepare(tmp_path / "a.h5ad", table)
    (tmp_path / "b.h5ad").write_text("<html>")
    with pytest.raises(InputError, match="expected an .h5ad"):
        prepare_reference(tmp_path / "b.h5ad", MAPPING, label_column="kind", cells_per_type=9, seed=0)


def test_ensembl_ids_become_symbols_and_duplicates_are_summed(tmp_path):
    table = data()
    ids = [f"ENSG{i:011d}" for i in range(GENES)]
    names = [f"S{i}" for i in range(GENES)]
    names[3] = f"S1_{ids[3]}"  # as CELLxGENE tells symbols apart
    names[4] = "S1"
    table.var = pd.DataFrame({"feature_name": pd.Categorical(names)}, index=[f"{name}.{7}" for name in ids])
    reference, summary = prepare(tmp_path / "a.h5ad", table)
    rows = table.X.toarray()[reference.obs_names.astype(int)]
    assert summary["summed_symbols"] == ["S1"]
    assert reference.n_vars == GENES - 2
    np.testing.assert_array_equal(reference[:, "S1"].X.toarray().ravel(), rows[:, [1, 3, 4]].sum(axis=1))
    np.testing.assert_array_equal(reference[:, "S9"].X.toarray().ravel(), rows[:, 9])
    assert reference.var.loc["S9", "gene_ids"] == ids[9]


def test_ensembl_ids_without_symbols_are_refused():
    genes = pd.DataFrame({"length": [1, 2]}, index=["ENSG00000000001", "ENSG00000000002.4"])
    with pytest.raises(InputError, match="feature_name"):
        symbols_and_ids(genes, "a")
    genes["gene_name"] = ["A", None]
    assert symbols_and_ids(genes, "a") == (["A", "ENSG00000000002"], ["ENSG00000000001", "ENSG00000000002"])


def panel_of(symbols, ids):
    return anndata.AnnData(
        sparse.csr_matrix((1, len(symbols)), dtype=np.float32), var=pd.DataFrame({"gene_ids": ids}, index=symbols)
    )


def test_shared_genes_by_symbol_or_by_id():
    ids = [f"ENSG{i:011d}" for i in range(6)]
    cells = panel_of(["A", "B", "C", "NegControlProbe_1", "a", "D"], ids)
    same = panel_of(["C", "X", "A", "NegControlProbe_1"], [ids[2], "ENSG00000000077", ids[0], ids[3]])
    found = shared_genes(cells, same, 2)
    assert (found.names, found.by) == (("A", "C"), "symbol")
    np.testing.assert_array_equal(found.second, [2, 0])
    renamed = panel_of(["C2", "B2", "A"], [f"{ids[2]}.3", ids[1], ids[0]])
    found = shared_genes(cells, renamed, 2)
    assert (found.names, found.by) == (("A", "B", "C"), "gene id")
    np.testing.assert_array_equal(found.second, [2, 1, 0])
    cells.var["gene_ids"] = [f"{name}.11" for name in ids]  # versions tell nothing apart
    assert shared_genes(cells, renamed, 2).names == ("A", "B", "C")
    unknown = panel_of(["A", "C", "X", "Y"], [""] * 4)  # ids that neither knows are not the same
    assert shared_genes(panel_of(["A", "C", "D", "E"], [""] * 4), unknown, 2).by == "symbol"
    assert shared_genes(panel_of(["A", "C", "D", "E"], [""] * 4), unknown, 2).names == ("A", "C")


def test_too_few_shared_genes_show_examples():
    cells = panel_of(["Cd3e", "Epcam", "Ms4a1"], [""] * 3)
    other = panel_of(["CD3E", "EPCAM", "Ms4a1"], [""] * 3)
    with pytest.raises(InputError, match=r"got 1 genes in common of 3 .*Cd3e.* and 3 .*CD3E.*at least 50") as error:
        shared_genes(cells, other, 50)
    assert "min_shared_genes" in str(error.value)
