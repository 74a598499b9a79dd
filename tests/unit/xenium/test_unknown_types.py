"""Types that the reference lacks get no label; labels of types that it has stay; precision is estimated right."""

from functools import cache

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.example.xenium import expression
from celldetr.report.cell_types import cell_type_notes, cell_types_figure
from celldetr.xenium.celltypes.annotate import annotate
from celldetr.xenium.celltypes.labels import IMPRECISE, REASONS, UNKNOWN, UNLIKE, best
from celldetr.xenium.celltypes.likeness import gene_factors, likeness
from celldetr.xenium.celltypes.precision import estimate_precision
from celldetr.xenium.celltypes.qc import quality
from celldetr.xenium.patches import type_rows

SETTINGS = CellTypeSettings()
GENES = list(expression.PANEL)
PROFILES = expression.profiles(GENES)
TISSUE = dict(zip(ST_TYPES, (0.2, 0.12, 0.22, 0.06, 0.05, 0.11, 0.09, 0.06, 0.05, 0.04), strict=True))
FACTORS = np.exp(0.4 * np.random.default_rng(5).standard_normal(len(GENES)))  # of the sample's platform


def table(counts, **obs):
    index = [f"cell{number}" for number in range(counts.shape[0])]
    var = pd.DataFrame({"gene_ids": [expression.gene_id(gene) for gene in GENES]}, index=GENES)
    return anndata.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=pd.DataFrame(obs, index=index), var=var)


@cache
def sample(cells=1500, depth=60.0, seed=1, patient=0.0):
    """Cells of known type (obs["truth"]); their platform reads the genes with `FACTORS`.

    `patient` is the standard deviation by which the logarithms of the malignant cells' genes differ from the reference.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.choice(ST_TYPES, cells, p=list(TISSUE.values()))
    labels = np.array([next(k for k, v in expression.SUBTYPES.items() if v.type == kind) for kind in kinds])
    share = np.stack([PROFILES[label] for label in labels]) * FACTORS
    share[kinds == "Malignant"] *= np.exp(patient * np.random.default_rng(8).standard_normal(len(GENES)))
    mean = share / share.sum(axis=1, keepdims=True) * depth * rng.lognormal(0, 0.4, (cells, 1))
    return table(rng.poisson(mean * rng.gamma(4, 0.25, mean.shape)), truth=kinds)


@cache
def whole_reference(cells=120):
    """Deep cells of all labels of the ten types."""
    rng = np.random.default_rng(2)
    labels = [label for label, subtype in expression.SUBTYPES.items() if subtype.type != "-" for _ in range(cells)]
    mean = np.stack([PROFILES[label] for label in labels]) * rng.lognormal(6, 0.3, (len(labels), 1))
    kinds = [expression.SUBTYPES[label].type for label in labels]
    held = np.arange(len(labels)) % 5 == 0
    counts = rng.poisson(mean * rng.gamma(4, 0.25, mean.shape))
    found = table(counts, type=pd.Categorical(kinds, categories=ST_TYPES), label=labels, held_out=held)
    found.uns["composition"] = {kind: kinds.count(kind) for kind in ST_TYPES}
    return found


def without(kind):
    found = whole_reference()
    found = found[(found.obs["type"] != kind).to_numpy()].copy()
    found.uns["composition"] = {**found.uns["composition"], kind: 0}
    return found


def truth(cells):
    return cells.obs["truth"].map(ST_TYPES.index).to_numpy()


def certain(annotation):
    """Type of each cell that the thresholds alone would label (N,), -1 for the others."""
    withdrawn = annotation.table["reason"].isin([REASONS[0], UNKNOWN, UNLIKE, IMPRECISE]).to_numpy()
    return np.where(withdrawn, best(annotation.table.filter(like="fraction_")), -1)


@pytest.fixture(scope="module")
def complete():
    return annotate(sample(), whole_reference(), SETTINGS, 0)


def test_few_right_labels_are_lost_with_the_whole_reference(complete):
    right = certain(complete) == truth(sample())
    kept = (complete.table["label"] >= 0).to_numpy()
    assert right.mean() > 0.9
    assert kept[right].mean() > 0.95
    assert complete.unknown == []
    assert complete.missing == complete.unused == ()
    assert min(complete.precision.values()) > 0.95


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("T", "Malignant") else pytest.param(kind, marks=pytest.mark.slow) for kind in ST_TYPES],
)
def test_cells_of_a_type_that_the_reference_lacks_have_no_label(kind):
    cells = sample()
    found = annotate(cells, without(kind), SETTINGS, 0)
    own = cells.obs["truth"].to_numpy() == kind
    labelled = (found.table["label"] >= 0).to_numpy()
    assert (certain(found) >= 0)[own].mean() > 0.12  # what the thresholds alone would label
    assert labelled[own].mean() <= 0.02
    assert labelled[(certain(found) == truth(cells)) & ~own].mean() > 0.95
    assert found.missing == (kind,)
    assert len(found.unknown) == 1
    assert found.unknown[0]["cells"] == pytest.approx(own.sum(), rel=0.1)
    subtype = [gene for v in expression.SUBTYPES.values() if v.type == kind for gene in v.genes]
    assert set(found.unknown[0]["genes"][:4]) <= {*expression.MARKERS[kind], *expression.SHARED_MARKERS, *subtype}


def test_several_types_at_once_are_found():
    cells, lacking = sample(), ("T", "NK", "Malignant")
    reference = whole_reference()[~whole_reference().obs["type"].isin(lacking).to_numpy()].copy()
    found = annotate(cells, reference, SETTINGS, 0)
    own = cells.obs["truth"].isin(lacking).to_numpy()
    labelled = (found.table["label"] >= 0).to_numpy()
    assert labelled[own].mean() <= 0.02
    assert labelled[(certain(found) == truth(cells)) & ~own].mean() > 0.95
    numbers = sorted((item["cells"] for item in found.unknown), reverse=True)
    assert numbers == pytest.approx(cells.obs["truth"].value_counts()[["Malignant", "T", "NK"]].tolist(), rel=0.1)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_a_close_type_is_found_beside_one_that_differs_from_the_reference(drift):
    """NK cells half way to T, few beside many T cells at 25 transcripts; the sample's T differ, too, by `drift`."""
    rng = np.random.default_rng(1)
    shares = {**TISSUE, "T": 0.32, "NK": 0.04, "Malignant": 0.12}
    kinds = rng.choice(list(shares), 3000, p=list(shares.values()))
    profiles = {v.type: PROFILES[label] for label, v in reversed(expression.SUBTYPES.items())}
    profiles["T"] = profiles["T"] * np.exp(drift * np.random.default_rng(8).standard_normal(len(GENES)))
    profiles["NK"] = (profiles["NK"] + profiles["T"]) / 2
    share = np.stack([profiles[kind] for kind in kinds]) * FACTORS
    mean = share / share.sum(axis=1, keepdims=True) * 25 * rng.lognormal(0, 0.4, (3000, 1))
    cells = table(rng.poisson(mean * rng.gamma(4, 0.25, mean.shape)), truth=kinds)
    found = annotate(cells, without("NK"), SETTINGS, 0)
    labelled = (found.table["label"] >= 0).to_numpy()
    assert (certain(found) >= 0)[kinds == "NK"].mean() > 0.7
    assert labelled[kinds == "NK"].mean() <= 0.15
    assert labelled[(certain(found) == truth(cells)) & (kinds != "NK")].mean() > 0.95
    assert [item["near"] for item in found.unknown] == ["T"]


def test_cells_of_another_patient_keep_their_type():
    """Malignant cells whose genes are shifted by a standard deviation of 0.4 stay Malignant."""
    cells = sample(patient=0.4)
    own = cells.obs["truth"].to_numpy() == "Malignant"
    found = annotate(cells, whole_reference(), SETTINGS, 0)
    assert found.unknown == []
    assert (found.table["label"].to_numpy() == truth(cells))[own].mean() > 0.85


def test_the_search_for_other_types_can_be_switched_off():
    cells = sample()
    loose = replace_settings(unknown_types=0, unlike_share=0.0, min_precision=0.0)
    found = annotate(cells, without("T"), loose, 0)
    assert found.unknown == []
    assert set(found.table["reason"]) <= set(REASONS[:6])
    # without it, likeness alone finds most, but fewer of them
    found = annotate(cells, without("T"), replace_settings(unknown_types=0), 0)
    own = cells.obs["truth"].to_numpy() == "T"
    assert (found.table["label"] >= 0)[own].mean() < 0.3 * (certain(found) >= 0)[own].mean()
    assert UNLIKE in set(found.table["reason"])


def replace_settings(**changes):
    return CellTypeSettings.from_dict({**SETTINGS.to_dict(), **changes}, "settings")


def test_likeness_corrects_depth_and_platform():
    right = truth(sample()).astype(np.int8)
    scores = {}
    for depth in (15.0, 60.0, 240.0):
        cells = sample(depth=depth)
        factors = gene_factors(cells, right, whole_reference())
        assert np.corrcoef(np.log(factors), np.log(FACTORS))[0, 1] > 0.6
        scores[depth] = likeness(cells, right, right, whole_reference(), 5.0, 0).score
        assert 0.01 < (scores[depth] < -1).mean() < 0.09
        wrong = np.where(right == ST_TYPES.index("T"), ST_TYPES.index("NK"), right).astype(np.int8)
        taken = likeness(cells, wrong, wrong, whole_reference(), 5.0, 0).score[right == 0] < -1
        assert taken.mean() > (0.3 if depth < 20 else 0.9)
    medians = [np.median(score) for score in scores.values()]
    assert np.ptp(medians) < 0.4


def test_estimated_precision_is_that_of_the_sample():
    """NK cells are rare and hardly differ from T cells: most labels NK are wrong, and the estimate says so."""
    rng = np.random.default_rng(0)
    profile = {kind: PROFILES[label] for kind, label in (("T", "regulatory T cell"), ("B", "B cell"))}
    profile["NK"] = 0.85 * profile["T"] + 0.15 * PROFILES["natural killer cell"]

    def draw(kinds, depth):
        share = np.stack([profile[kind] for kind in kinds])
        return rng.poisson(share * depth * rng.lognormal(0, 0.3, (len(kinds), 1)))

    kinds = np.array(["T"] * 1500 + ["B"] * 400 + ["NK"] * 100)
    cells = table(draw(kinds, 25), truth=kinds)
    known = np.repeat(["T", "B", "NK"], 200)
    reference = table(
        draw(known, 500),
        type=pd.Categorical(known, categories=ST_TYPES), label=known, held_out=np.arange(600) % 4 == 0,
    )  # fmt: skip
    reference.uns["composition"] = {kind: 200 if kind in known else 0 for kind in ST_TYPES}
    settings = replace_settings(min_margin=0.0, min_fraction=0.3)
    found = annotate(cells, reference, settings, 0)
    labels = certain(found)
    actual = {kind: (truth(cells) == ST_TYPES.index(kind))[labels == ST_TYPES.index(kind)].mean() for kind in profile}
    assert actual["NK"] < 0.6 < 0.9 < actual["T"]
    for kind, value in actual.items():
        assert found.precision[kind] == pytest.approx(value, abs=0.15)
    assert found.unused == ("NK",)
    assert not (found.table["label"] == ST_TYPES.index("NK")).any()
    metadata = {"unused_types": found.unused, "missing_types": found.missing, "precision": found.precision}
    rows = type_rows(found.table, metadata)
    number = int((found.table["reason"] == IMPRECISE).sum())
    assert rows[0] == ("not used for training", f"NK: estimated precision {found.precision['NK']:.2f}", number)
    assert ("not in the reference", "Mast", 0) in rows
    notes = " ".join(cell_type_notes(quality(cells, reference, found, settings, 0)))
    assert "NK is not used for training: estimated precision" in notes
    assert "Not in the reference: Myeloid" in notes


def test_precision_without_labels_or_held_out_cells_is_none():
    reference = whole_reference().copy()
    counts, ones = np.full(10, 50.0), np.ones(len(GENES))
    assert set(estimate_precision(reference, np.zeros(10), counts, ones, SETTINGS, 0).values()) == {None}
    reference.obs["held_out"] = False
    assert set(estimate_precision(reference, np.ones(10), counts, ones, SETTINGS, 0).values()) == {None}


def test_few_cells_are_annotated_without_a_search():
    cells = sample()[:60].copy()
    found = annotate(cells, whole_reference(), SETTINGS, 0)
    assert found.unknown == []
    right = certain(found) == truth(cells)
    assert (found.table["label"] >= 0)[right].mean() > 0.9


def test_page_with_everything(complete, tmp_path):
    found = annotate(sample(), without("T"), SETTINGS, 0)
    figures = quality(sample(), without("T"), found, SETTINGS, 0)
    notes = cell_type_notes(figures)
    assert len(notes) == 2
    assert "Not in the reference: T" in notes[0]
    assert "of a type that the reference lacks (most similar: " in notes[1]
    figure = cell_types_figure(figures, "test")
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    for number in (0, 2, 6):  # labels, composition, agreement
        assert shown[number].count("not in the reference") == 1
    assert "T  (not in the reference)" in [text.get_text() for text in figure.axes[5].get_yticklabels()]
    whole = quality(sample(), whole_reference(), complete, SETTINGS, 0)
    assert cell_type_notes(whole) == []
    assert 0.0 < whole["unlike"]["T"] < 0.1
    strange = cell_type_notes({**whole, "unlike": {**whole["unlike"], "Malignant": 0.64}})
    assert strange == [
        "64% of the cells that would be Malignant are less like that type than reference cells as deep "
        "(xenium.cell_types.unlike_share): no label"
    ]
