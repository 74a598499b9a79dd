"""Cell types: planted types come back from both annotators; labels, thresholds and figures of quality."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.report.cell_types import cell_types_figure
from celldetr.report.style import save
from celldetr.runtime.errors import InputError
from celldetr.xenium.celltypes.annotate import annotate
from celldetr.xenium.celltypes.annotators import correlation, tacco_ot, two_passes
from celldetr.xenium.celltypes.labels import (
    FRACTIONS,
    REASONS,
    best,
    label_cells,
    read_cells,
    require_labels,
    withdraw,
    write_cells,
)
from celldetr.xenium.celltypes.profiles import on_genes, thin
from celldetr.xenium.celltypes.qc import agreement, marker_figures, quality, reannotate

GENES = 60
SETTINGS = CellTypeSettings()
TISSUE = {"Malignant": 0.6, "T": 0.2, "Fibroblast": 0.15, "NK": 0.05}


def profiles(kinds=TISSUE):
    """Shares of the genes in each type: a common base, five markers each; NK resembles T."""
    generator = np.random.default_rng(7)
    base = generator.dirichlet(np.full(GENES, 2.0))
    found = {}
    for place, kind in enumerate(kinds):
        share = base.copy()
        share[5 * place : 5 * place + 5] += 0.08
        if kind == "NK":
            share[5:8] += 0.06  # some markers of T
        found[kind] = share / share.sum()
    return found


def draw_cells(kinds, depth, seed):
    """Cells of known type (obs["truth"]) with Poisson counts around a lognormal depth."""
    generator = np.random.default_rng(seed)
    share = np.stack([profiles()[kind] for kind in kinds])
    counts = generator.poisson(share * generator.lognormal(np.log(depth), 0.4, (len(kinds), 1)))
    obs = pd.DataFrame({"truth": kinds}, index=[f"cell{i}" for i in range(len(kinds))])
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:011d}" for i in range(GENES)]}, index=[f"G{i}" for i in range(GENES)])
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def tissue(cells=800, depth=80, seed=1):
    kinds = np.random.default_rng(seed).choice(list(TISSUE), cells, p=list(TISSUE.values()))
    return draw_cells(kinds, depth, seed)


@pytest.fixture(scope="module")
def reference():
    """Balanced reference whose whole had another composition than the tissue."""
    kinds = np.repeat(list(TISSUE), 100)
    table = draw_cells(kinds, 600, 2)
    table.obs["type"] = pd.Categorical(kinds, categories=ST_TYPES)
    table.obs["label"] = kinds
    table.obs["held_out"] = np.arange(len(kinds)) % 5 == 0
    table.uns["composition"] = {**dict.fromkeys(ST_TYPES, 0), "T": 500, "NK": 400, "Malignant": 50, "Fibroblast": 50}
    return table


@pytest.fixture(scope="module")
def sample():
    return tissue()


@pytest.fixture(scope="module")
def annotation(sample, reference):
    return annotate(sample, reference, SETTINGS, seed=0)


def truth(cells):
    return cells.obs["truth"].map(ST_TYPES.index).to_numpy()


def transport(cells, reference, prior=TISSUE, lamb=0.1, seed=0):
    shares = pd.Series({**dict.fromkeys(ST_TYPES, 0.0), **prior})
    return tacco_ot(cells, reference, shares, lamb=lamb, seed=seed)


both = pytest.mark.parametrize("annotator", [transport, correlation])


@both
def test_planted_types_come_back(annotator, sample, reference):
    fractions = annotator(sample, reference)
    assert (best(fractions) == truth(sample)).mean() > 0.9
    assert list(fractions.columns) == list(ST_TYPES)
    np.testing.assert_allclose(fractions.sum(axis=1), 1, atol=1e-5)
    assert (fractions.drop(columns=list(TISSUE)) == 0).all().all()  # types that the reference lacks


@both
def test_order_changes_nothing_and_cells_without_counts_have_no_fractions(annotator, sample, reference):
    counts = sample.X[:300].tolil()
    counts[[3, 77]] = 0
    cells = anndata.AnnData(sparse.csr_matrix(counts), obs=sample.obs[:300], var=sample.var)
    fractions = annotator(cells, reference)
    assert list(np.flatnonzero(fractions.isna().all(axis=1))) == [3, 77]
    assert fractions.isna().any(axis=1).sum() == 2
    assert (best(fractions)[[3, 77]] == -1).all()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    np.testing.assert_allclose(annotator(cells[order].copy(), reference), fractions.iloc[order], atol=1e-3)


def test_cells_whose_genes_are_alike_have_no_correlation(reference):
    counts = np.ones((3, GENES), dtype=np.float32)
    counts[2, 7] = 9
    fractions = correlation(anndata.AnnData(sparse.csr_matrix(counts), var=reference.var), reference)
    assert list(fractions.isna().all(axis=1)) == [True, True, False]


def test_chunks_of_a_sample_give_the_types_of_the_whole(reference, monkeypatch):
    cells = tissue(700)
    # sorted by type: chunks in this order would have one type each
    cells = cells[np.argsort(cells.obs["truth"].to_numpy(), kind="stable")].copy()
    whole, similar = transport(cells, reference), correlation(cells, reference)
    monkeypatch.setattr("celldetr.xenium.celltypes.annotators.CHUNK_CELLS", 350)
    parts = transport(cells, reference, seed=3)
    pd.testing.assert_frame_equal(correlation(cells, reference), similar)
    assert (best(whole) == best(parts)).mean() > 0.97
    assert (best(parts) == truth(cells)).mean() > 0.9
    composition = [np.bincount(best(f), minlength=10) / len(cells) for f in (whole, parts)]
    np.testing.assert_allclose(composition[0], composition[1], atol=0.015)
    np.testing.assert_allclose(whole.to_numpy().mean(axis=0), parts.to_numpy().mean(axis=0), atol=0.015)


def test_composition_of_the_sample_is_the_better_prior(reference):
    cells = tissue(1200, depth=25, seed=4)
    here = on_genes(cells, np.arange(GENES), tuple(cells.var_names))
    errors = {}
    for prior in ("sample", "reference"):
        settings = CellTypeSettings(prior=prior)
        fractions, _, start = two_passes(here, reference, settings, 0)
        errors[prior] = (best(fractions) != truth(cells)).mean()
        assert start.sum() == pytest.approx(1)
    assert start["T"] > 2 * start["Malignant"]  # that of the whole reference, although its sample is balanced
    assert errors["sample"] < 0.8 * errors["reference"]


def test_a_type_without_counts_of_the_shared_genes_is_left_out(sample, reference, caplog):
    counts = reference.X.tolil()
    counts[(reference.obs["type"] == "NK").to_numpy()] = 0
    without = anndata.AnnData(sparse.csr_matrix(counts), obs=reference.obs, var=reference.var, uns=reference.uns)
    found = annotate(sample, without, SETTINGS, seed=0)
    assert "no counts of the shared genes in NK: no cell can get this type" in caplog.text
    assert (found.table["fraction_NK"] == 0).all()
    assert annotate(sample, without, CellTypeSettings(prior="reference"), seed=0).prior["NK"] == 0
    rest = sample.obs["truth"].to_numpy() != "NK"
    assert (best(found.table[list(FRACTIONS)]) == truth(sample))[rest].mean() > 0.9
    assert reannotate(without, sample.X.sum(axis=1).A1, SETTINGS, 0)["f1"]["NK"] == 0
    without.X = sparse.csr_matrix(without.shape, dtype=np.float32)
    with pytest.raises(InputError, match="counts of the shared genes in 0 types"):
        annotate(sample, without, SETTINGS, seed=0)


def test_lamb_holds_on_to_the_prior(sample, reference):
    prior = {"T": 0.7, "Malignant": 0.1, "Fibroblast": 0.1, "NK": 0.1}
    shares = [transport(sample[:400].copy(), reference, prior, lamb)["T"].mean() for lamb in (0.001, 10.0)]
    assert shares[0] < 0.4 < shares[1]


def table_of(rows):
    return pd.DataFrame(rows, columns=list(ST_TYPES), index=[f"c{i}" for i in range(len(rows))])


def row(**fractions):
    return [fractions.get(name, 0.0) for name in ST_TYPES]


def test_every_reason_for_no_label():
    rows = [
        row(T=0.7, NK=0.3),
        [np.nan] * 10,
        row(T=1.0),
        row(T=0.45, NK=0.2, B=0.2, Mast=0.15),
        row(T=0.55, NK=0.45),
        row(B=0.9, Plasma=0.1),
    ]
    fractions, second = table_of(rows), table_of([*rows[:5], row(Plasma=1.0)])
    transcripts = np.array([50, 50, 9, 50, 50, 50])
    table = label_cells(fractions, second, transcripts, SETTINGS)
    assert list(table["reason"]) == list(REASONS[:6])
    assert list(table["label"]) == [ST_TYPES.index("T"), -1, -1, -1, -1, -1]
    assert list(table["second_label"])[1:] == [-1, 0, 0, 0, ST_TYPES.index("Plasma")]
    loose = label_cells(fractions, second, transcripts, CellTypeSettings(require_agreement=False, min_margin=0.05))
    assert list(loose["label"])[4:] == [ST_TYPES.index("T"), ST_TYPES.index("B")]
    with pytest.raises(InputError, match=r"no cell of 6 gets a label \(no counts: 1, few transcripts: 5\)"):
        require_labels(label_cells(fractions, second, np.full(6, 2), SETTINGS))
    every = withdraw(table, np.ones(6, dtype=bool), REASONS[-1])
    assert list(every["reason"]) == [REASONS[-1], *REASONS[1:6]]
    assert (every["label"] == -1).all()


def test_labels_of_planted_cells_are_right(annotation, sample):
    table = annotation.table
    labelled = (table["label"] >= 0).to_numpy()
    assert labelled.mean() > 0.7
    assert (table["label"].to_numpy() == truth(sample))[labelled].mean() > 0.97
    assert list(table["cell_id"]) == list(sample.obs_names)
    np.testing.assert_array_equal(table["transcripts"], sample.X.sum(axis=1).A1.astype(int))
    assert annotation.prior["Malignant"] == pytest.approx(TISSUE["Malignant"], abs=0.06)


def test_control_probes_foreign_genes_and_held_out_cells_do_not_count(sample, reference, annotation):
    counts = sparse.csr_matrix(np.full((sample.n_obs, 2), 99, np.float32))
    var = pd.DataFrame({"gene_ids": ["", "ENSG00000999999"]}, index=["NegControlProbe_00042", "NEWGENE"])
    other = anndata.AnnData(counts, obs=sample.obs, var=var)
    extra = anndata.concat([sample, other], axis=1, merge="same")
    poisoned = reference.copy()
    known = poisoned.X.tolil()
    known[poisoned.obs["held_out"].to_numpy()] = 1000
    poisoned.X = sparse.csr_matrix(known)
    pd.testing.assert_frame_equal(annotate(extra, reference, SETTINGS, seed=0).table, annotation.table)
    loose = CellTypeSettings(min_precision=0.0, unknown_types=0)
    columns = ["second_label", *FRACTIONS]  # held-out cells may take labels, but never give any
    found = annotate(sample, poisoned, loose, seed=0).table[columns]
    pd.testing.assert_frame_equal(found, annotation.table[columns])


@pytest.mark.parametrize("factor", [0.5, -1])
def test_counts_of_the_sample_must_be_counts(sample, reference, factor):
    cells = anndata.AnnData(sparse.csr_matrix(sample.X * factor), obs=sample.obs, var=sample.var)
    with pytest.raises(InputError, match="expected raw counts"):
        annotate(cells, reference, SETTINGS, seed=0)


def test_the_table_comes_back_from_its_file(annotation, tmp_path):
    write_cells(tmp_path / "cells.parquet", annotation.table, {"settings": SETTINGS.to_dict()})
    pd.testing.assert_frame_equal(read_cells(tmp_path / "cells.parquet"), annotation.table)
    kept = json.loads(pq.read_schema(tmp_path / "cells.parquet").metadata[b"celldetr"])
    assert kept == {"classes": list(ST_TYPES), "settings": SETTINGS.to_dict()}
    first = (annotation.table["label"] >= 0).to_numpy().argmax()
    changed = annotation.table.assign(
        label=annotation.table["label"].where(np.arange(len(annotation.table)) != first, 9)
    )
    write_cells(tmp_path / "cells.parquet", changed, {})
    with pytest.raises(InputError, match=r"cells\.parquet: got labels that its fractions .* contradict"):
        read_cells(tmp_path / "cells.parquet")
    (tmp_path / "cells.parquet").write_text("no")
    with pytest.raises(InputError, match="cannot be read"):
        read_cells(tmp_path / "cells.parquet")


def test_thinning_reaches_the_depth_of_the_sample(reference):
    wanted = np.array([0.0, 40, 80, 1e9])
    thinned = thin(reference.X, wanted, np.random.default_rng(0))
    totals, before = (counts.sum(axis=1).A1 for counts in (thinned, reference.X))
    assert (totals <= before).all()
    untouched = totals == before  # a third drew more than they have
    assert 0.2 < untouched.mean() < 0.45
    assert totals[~untouched].mean() == pytest.approx(60, rel=0.1)
    # genes keep their shares
    shares = [counts.sum(axis=0).A1 / counts.sum() for counts in (thinned, reference.X)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.004)
    # but for genes that the sample's platform reads with another efficiency
    factors = np.where(np.arange(GENES) < 30, 1.0, 0.25)
    shares = [thin(reference.X, wanted[1:2], np.random.default_rng(0), f).sum(axis=0).A1 for f in (None, factors)]
    ratio = shares[1] / shares[0]
    assert ratio[30:].mean() / ratio[:30].mean() == pytest.approx(0.25, rel=0.1)
    assert shares[1].sum() == pytest.approx(shares[0].sum(), rel=0.05)


def test_reannotation_finds_held_out_types(reference, sample):
    counts = sample.X.sum(axis=1).A1
    found = reannotate(reference, counts, SETTINGS, 0)
    assert found["cells"] == 80
    assert found["macro_f1"] > 0.85
    assert found["f1"]["Mast"] is None
    assert np.sum(found["confusion"]) + found["without_counts"] == 80
    # cells without counts are not found
    counted = reference.X.tolil()
    counted[np.flatnonzero((reference.obs["type"] == "T") & reference.obs["held_out"])[::2]] = 0
    half = anndata.AnnData(sparse.csr_matrix(counted), obs=reference.obs, var=reference.var, uns=reference.uns)
    assert reannotate(half, counts, SETTINGS, 0)["f1"]["T"] == pytest.approx(2 / 3, abs=0.08)
    # labels that mean nothing cannot be found again
    shuffled = reference.copy()
    order = np.random.default_rng(0).permutation(shuffled.n_obs)
    shuffled.obs["type"] = shuffled.obs["type"].to_numpy()[order]
    assert reannotate(shuffled, counts, SETTINGS, 0)["macro_f1"] < 0.5


def test_agreement_counts_cells(annotation):
    found = agreement(annotation)
    assert found["overall"] > 0.8
    assert found["by_type"]["Mast"] is None
    flipped = annotation.table.assign(second_label=np.int8(ST_TYPES.index("Mast")))
    assert agreement(replace(annotation, table=flipped))["overall"] == 0


def test_markers_are_specific_to_their_type():
    shares = {"T": [0.3, 0.1, 0.0, 0.6], "NK": [0.29, 0.0, 0.11, 0.6], "B": [0.0, 0.0, 0.0, 1.0]}
    counts = np.random.default_rng(0).poisson(np.repeat(list(shares.values()), 50, axis=0) * 200)
    cells = anndata.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"type": np.repeat(list(shares), 50)}, index=[str(i) for i in range(150)]),
        var=pd.DataFrame(index=["BOTH", "OWN_T", "OWN_NK", "ALL"]),
    )
    labels = np.repeat([ST_TYPES.index(kind) for kind in shares], 50).astype(np.int8)
    labels[:10] = -1
    found = marker_figures(cells, cells, labels)
    first = {kind: found["genes"][found["of"].index(kind)] for kind in ("T", "NK")}
    assert first == {"T": "OWN_T", "NK": "OWN_NK"}
    column = found["genes"].index("OWN_T")
    expected = (counts[10:50, 1] > 0).mean()
    assert [row[column] for row in found["share"]] == pytest.approx([expected, 0.0, 0.0])


def test_figures_and_picture(annotation, sample, reference, tmp_path):
    figures = quality(sample, reference, annotation, SETTINGS, 0)
    json.dumps(figures, allow_nan=False)
    assert sum(figures["reasons"].values()) == sample.n_obs
    assert sum(figures["labels"].values()) == figures["reasons"]["labelled"]
    markers, kinds = figures["markers"], list(TISSUE)
    pairs = list(zip(markers["genes"], markers["of"], strict=True))
    assert all(kinds[int(gene[1:]) // 5] == kind for gene, kind in pairs)
    assert {("G8", "T"), ("G9", "T")} <= set(pairs)  # the other markers of T are those of NK, too
    shown = np.array(markers["mean"]).argmax(axis=0)  # the type that a gene marks shows it most
    assert [markers["types"][index] for index in shown] == markers["of"]
    save(cell_types_figure(figures, "test"), tmp_path / "qc.png")
    assert (tmp_path / "qc.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="got the suffix '', expected png or svg"):
        save(cell_types_figure(figures, "test"), tmp_path / "qc")


def test_the_picture_says_why_a_type_has_no_cells_and_hides_no_bar(annotation, sample, reference):
    figures = quality(sample, reference, annotation, SETTINGS, 0)
    figures["labels"] |= {"T": 0, "NK": 0}
    figures["precision"] |= {"T": None, "NK": 0.52}
    figures["unused_types"] = ["NK"]
    figures["composition"]["sample"] |= dict.fromkeys(ST_TYPES, 0.5)  # bars as high as the panel
    figure = cell_types_figure(figures, "test")
    figure.draw_without_rendering()
    labels, composition = ([text.get_text() for text in figure.axes[number].texts] for number in (0, 2))
    for texts in (labels, composition):
        assert [texts[ST_TYPES.index(name)] for name in ("T", "NK")] == ["0 cells", "not used: precision 0.52"]
        assert texts.count("not in the reference") == len(ST_TYPES) - len(TISSUE)
    panel = figure.axes[2]
    legend = panel.get_legend().get_window_extent()
    assert not [bar for bar in panel.patches if bar.get_window_extent().overlaps(legend)]
    assert not panel.title.get_window_extent().overlaps(legend)
