"""Mappings of labels to the ten types: tables, and labels whose name or genes speak for another type."""

import itertools
from pathlib import Path

import pandas as pd
import pytest

from celldetr.config.classes import ST_TYPES
from celldetr.example.xenium.expression import REFERENCE_LABELS, write_reference
from celldetr.report.cell_types import cell_type_notes
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.xenium.celltypes.mapping import check_mapping, read_mapping, types_named
from celldetr.xenium.celltypes.reference import prepare_reference, read_reference
from celldetr.xenium.celltypes.reference import write_reference as write_prepared

CONFIG = Path(__file__).parents[3] / "config"
PAIRS = list(itertools.combinations(ST_TYPES, 2))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "drawn.h5ad"
    write_reference(path, seed=3)
    return path


def prepare(path, mapping):
    return prepare_reference(
        path, mapping, label_column="cell_type", cells_per_type=400, seed=0, mapping_file="types.tsv"
    )


@pytest.fixture(scope="module")
def reference(drawn):
    """Drawn reference with the right mapping."""
    found, summary = prepare(drawn, REFERENCE_LABELS)
    assert summary["warnings"] == []
    return found


def swapped(mapping, one, other):
    return {label: {one: other, other: one}.get(kind, kind) for label, kind in mapping.items()}


def told(reference, mapping):
    """Warnings, or the refusal."""
    try:
        return check_mapping(reference, mapping, "types.tsv")
    except InputError as error:
        return [str(error)]


def nameless(reference, change=str):
    """Give the labels names that say nothing, in reference and mapping, and change the gene symbols."""
    names = {label: f"cluster {number}" for number, label in enumerate(REFERENCE_LABELS)}
    found = reference.copy()
    found.obs["label"] = pd.Categorical([names[label] for label in reference.obs["label"]])
    found.var_names = [change(name) for name in found.var_names]
    return found, {names[label]: kind for label, kind in REFERENCE_LABELS.items()}


def test_every_swap_of_two_types_is_refused_or_told(reference):
    for one, other in PAIRS:
        texts = told(reference, swapped(REFERENCE_LABELS, one, other))
        assert texts, (one, other)
        assert "types.tsv: " in texts[0]
        assert one in texts[0]
        assert other in texts[0]
        if {one, other} != {"Malignant", "Epithelial"}:  # a label of epithelium may hold malignant cells
            assert "got swapped types" in texts[0]


@pytest.mark.parametrize("change", [str, str.capitalize])  # as human and as mouse genes are written
def test_every_swap_is_told_by_the_genes_alone(reference, change):
    found, mapping = nameless(reference, change)
    assert told(found, mapping) == []
    silent = [pair for pair in PAIRS if not told(found, swapped(mapping, *pair))]
    assert silent == [("Malignant", "Epithelial")]  # carcinomas have the markers of epithelium


def test_one_wrong_label_is_told_with_what_speaks_against_it(reference, drawn, tmp_path):
    texts = told(reference, {**REFERENCE_LABELS, "mast cell": "B"})
    assert len(texts) == 1
    assert texts[0].startswith(
        "types.tsv: the label 'mast cell' is mapped to B, but its name means Mast, and its cells"
    )
    assert "the markers of Mast (" in texts[0]
    assert "correct its row" in texts[0]
    prepared, summary = prepare(drawn, {**REFERENCE_LABELS, "mast cell": "B"})
    assert summary["warnings"] == texts
    write_prepared(tmp_path / "prepared.h5ad", prepared)
    assert read_reference(tmp_path / "prepared.h5ad").uns["warnings"].splitlines() == texts


def test_rows_that_are_shifted_by_one_are_told(drawn):
    kinds = list(REFERENCE_LABELS.values())
    mapping = dict(zip(REFERENCE_LABELS, [*kinds[1:], kinds[0]], strict=True))
    _, summary = prepare(drawn, mapping)
    moved = [label for label, kind in mapping.items() if kind not in ("-", REFERENCE_LABELS[label])]
    heard = [label for label in moved if any(repr(label) in text for text in summary["warnings"])]
    assert len(moved) == 10
    assert len(heard) >= 9
    assert len(summary["warnings"]) == len(heard)


def test_warnings_on_the_mapping_stand_in_the_picture():
    figures = {"reference_warnings": ["types.tsv: wrong"], "missing_types": [], "unknown_types": [], "unlike": {}}
    assert cell_type_notes({**figures, "unused_types": []}) == ["types.tsv: wrong"]


def test_types_that_are_joined_on_purpose_are_told_and_not_refused(reference):
    texts = check_mapping(reference, {**REFERENCE_LABELS, "plasma cell": "B", "natural killer cell": "T"}, "types.tsv")
    assert len(texts) == 2


def test_labels_of_few_cells_and_genes_that_are_missing_are_not_judged(reference):
    found, mapping = nameless(reference)
    wrong = swapped(mapping, "B", "Mast")
    few = found[found.obs.groupby("label", observed=True).cumcount() < 19]
    assert told(few.copy(), wrong) == []
    assert told(found[:, found.var_names.str.startswith("RP")].copy(), wrong) == []


@pytest.mark.parametrize(("label", "warnings"), [("cluster 8", 1), ("MEP", 0), ("Haematopoietic stem cell", 0)])
def test_progenitors_which_have_the_markers_of_mast_cells_are_not_judged_by_genes(reference, label, warnings):
    found = reference.copy()
    found.obs["label"] = found.obs["label"].astype(str).replace("mast cell", label)
    assert len(told(found, {**REFERENCE_LABELS, label: "Myeloid"})) == warnings


@pytest.mark.parametrize(
    ("label", "types"),
    [
        ("CD4-positive, alpha-beta T cell", "T"),
        ("CD8Tex", "T"),
        ("NKcells", "NK"),
        ("T cell NK-like", "T NK"),
        ("Cycling T/NK", "T NK"),
        ("Plasma/B", "B Plasma"),
        ("Naïve B-cells", "B"),
        ("plasmablast", "B Plasma"),
        ("plasmacytoid dendritic cell", "Myeloid"),
        ("follicular dendritic cell", ""),
        ("cDC2", "Myeloid"),
        ("DCIS 1", ""),
        ("basophil", "Myeloid Mast"),
        ("tumor-associated macrophage", "Myeloid"),
        ("cancer-associated fibroblast", "Fibroblast"),
        ("myCAF", "Fibroblast"),
        ("Tumor stroma", ""),
        ("Tumor-infiltrating lymphocytes", ""),
        ("B-cell lymphoma", "Malignant B"),
        ("NKX2-1+ tumor", ""),
        ("non-malignant epithelial", "Epithelial"),
        ("Nonmalignant epithelium", "Epithelial"),
        ("Normal Epithelial", "Epithelial"),
        ("Cancer Epithelial", "Malignant Epithelial"),
        ("Tumor ECs", ""),
        ("Tumor cells 2", "Malignant"),
        ("lung adenocarcinoma", ""),
        ("Tumor-adjacent normal", ""),
        ("Non-leukemic GMP", ""),
        ("Mono-like", ""),
        ("CD4+ ILC3", ""),
        ("CD8-alpha-low Langerhans cell", ""),
        ("CD8 TEM", "T"),
        ("CD4 Naive", "T"),
        ("Naive T", "T"),
        ("gamma-delta T", "T"),
        ("B memory", "B"),
        ("CD8 NK-like", "T NK"),
        ("follicular DC", ""),
        ("Endothelial/pericyte", "Fibroblast Endothelial"),
        ("Mast/pDC", "Myeloid Mast"),
        ("T-cell zone reticular", ""),
        ("epithelioid histiocyte", ""),
        ("mesothelial cell", ""),
        ("vein endothelial cell", "Endothelial"),
        ("Pericyte", ""),
        ("Stromal", ""),
        ("Cluster B", ""),
        ("Fibroblast B", "Fibroblast B"),
    ],
)
def test_what_names_mean(label, types):
    assert " ".join(types_named(label)) == types


@pytest.mark.parametrize("file", ["references/luca.tsv", "example/reference_types.tsv"])
def test_names_of_shipped_mappings_speak_for_their_types(file):
    mapping = read_mapping(CONFIG / file)
    wrong = [label for label, kind in mapping.items() if kind != "-" and kind not in (types_named(label) or [kind])]
    assert wrong == []


def test_mapping_table(tmp_path):
    path = tmp_path / "m.tsv"
    path.write_text("# comment\nlabel\ttype\nT cell CD4\tT\n\ndoublet\t-\n")
    assert read_mapping(path) == {"T cell CD4": "T", "doublet": "-"}
    shipped = read_mapping(CONFIG / "references" / "luca.tsv")
    assert set(shipped.values()) == {*ST_TYPES, "-"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name\ttype\n", "expected label and type"),
        ("label\ttype\nA\tTcell\n", "line 2: got the type 'Tcell'"),
        ("label\ttype\nA\tT\n# x\nA\tB\n", "line 4: got the label 'A' a second time"),
        ("label\ttype\nA T\n", "line 2"),
    ],
)
def test_wrong_mapping_tables(tmp_path, text, words):
    path = tmp_path / "m.tsv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_mapping(path)
