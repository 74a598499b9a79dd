"""Planted gene expression: types of cells, their transcripts, and the scRNA-seq reference that fits them.

Gene symbols are those of markers that the field uses; the identifiers are made up, in the form of Ensembl's.
"""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from celldetr.config.classes import ST_TYPES
from celldetr.example.styles import Array
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic
from celldetr.xenium.celltypes.mapping import CANONICAL_MARKERS

MARKERS: Mapping[str, tuple[str, ...]] = {
    **CANONICAL_MARKERS,
    "Malignant": ("MKI67", "TOP2A", "CEACAM6", "CEACAM5", "TACSTD2", "SOX4", "CLDN4", "ERBB2", "CCND1", "MUC1", "TP63"),
    "Epithelial": ("SFTPC", "SFTPB", "NAPSA", "AGER", "FOXJ1", "SCGB1A1", "SCGB3A1", "LAMP3", "NKX2-1", "CAPS"),
}
"""Genes that one type expresses far above the others."""

SHARED_MARKERS: Mapping[str, tuple[str, ...]] = {
    "PTPRC": ("T", "NK", "B", "Plasma", "Myeloid", "Mast"),
    "EPCAM": ("Malignant", "Epithelial"),
    "KRT7": ("Malignant", "Epithelial"),
    "KRT8": ("Malignant", "Epithelial"),
    "CDH1": ("Malignant", "Epithelial"),
    "GZMB": ("NK", "T"),
    "CCL5": ("NK", "T"),
    "CD8A": ("T", "NK"),
    "CD4": ("T", "Myeloid"),
    "HLA-DRA": ("Myeloid", "B"),
    "CD74": ("Myeloid", "B", "Epithelial"),
    "CD27": ("T", "Plasma", "B"),
    "VIM": ("Fibroblast", "Endothelial", "Myeloid"),
    "SPARC": ("Fibroblast", "Endothelial"),
    "CAV1": ("Endothelial", "Fibroblast"),
}
"""Genes that several types express."""

COMMON_GENES = ("ACTB", "B2M", "MALAT1", "TMSB4X", "EEF1A1", "FOS", "JUN", "HSPA1A", "NFKBIA", "SAT1", "CD44", "STAT1")
"""Genes that every cell expresses."""

PANEL: tuple[str, ...] = tuple(
    sorted({*(gene for genes in MARKERS.values() for gene in genes), *SHARED_MARKERS, *COMMON_GENES})
    + ["FOXP3", "CTLA4", "IL2RA", "CD8B", "POSTN", "MYH11", "CLEC9A", "CD1C", "S100A8", "CCL21"]
)
"""Genes that the instrument measures."""


@dataclass(frozen=True)
class Subtype:
    """One label of the reference."""

    type: str  # one of the ten types; "-" if no type stands for it
    tissue: float  # share of the type's cells in the tissue
    reference: float  # share of the cells of the reference
    genes: tuple[str, ...] = ()  # genes that it expresses above the rest of its type


SUBTYPES: Mapping[str, Subtype] = {
    "CD4-positive, alpha-beta T cell": Subtype("T", 0.45, 0.16, ("CD4", "IL7R")),
    "CD8-positive, alpha-beta T cell": Subtype("T", 0.35, 0.13, ("CD8A", "CD8B", "CCL5")),
    "regulatory T cell": Subtype("T", 0.20, 0.04, ("FOXP3", "CTLA4", "IL2RA")),
    "macrophage": Subtype("Myeloid", 0.60, 0.15, ("MARCO", "MRC1")),
    "classical monocyte": Subtype("Myeloid", 0.25, 0.08, ("S100A8", "CD14")),
    "conventional dendritic cell": Subtype("Myeloid", 0.15, 0.03, ("CLEC9A", "CD1C")),
    "malignant cell": Subtype("Malignant", 1.0, 0.09),
    "natural killer cell": Subtype("NK", 1.0, 0.06),
    "mast cell": Subtype("Mast", 1.0, 0.03),
    "lung fibroblast": Subtype("Fibroblast", 0.75, 0.03, ("DCN", "LUM")),
    "smooth muscle cell": Subtype("Fibroblast", 0.25, 0.02, ("ACTA2", "MYH11")),
    "pulmonary alveolar type 2 cell": Subtype("Epithelial", 0.55, 0.05, ("SFTPC", "LAMP3")),
    "ciliated columnar cell of tracheobronchial tree": Subtype("Epithelial", 0.45, 0.02, ("FOXJ1", "CAPS")),
    "vein endothelial cell": Subtype("Endothelial", 0.70, 0.02, ("PLVAP", "VWF")),
    "endothelial cell of lymphatic vessel": Subtype("Endothelial", 0.30, 0.01, ("CCL21",)),
    "B cell": Subtype("B", 1.0, 0.05),
    "plasma cell": Subtype("Plasma", 1.0, 0.03),
    "erythrocyte": Subtype("-", 0.0, 0.01),
}
"""Labels of the reference: names of the Cell Ontology. Its composition is not that of the tissue."""

REFERENCE_LABELS: Mapping[str, str] = {label: subtype.type for label, subtype in SUBTYPES.items()}
"""Label of the reference -> one of the ten types, or "-" for cells that are left out."""

CLASS_TYPES: Mapping[str, Mapping[str, float]] = {
    "neoplastic": {"Malignant": 1.0},
    "epithelial": {"Epithelial": 1.0},
    "connective": {"Fibroblast": 0.75, "Endothelial": 0.25},
    "inflammatory": {"T": 0.40, "Myeloid": 0.20, "B": 0.15, "Plasma": 0.12, "NK": 0.08, "Mast": 0.05},
    "necrotic": {"-": 1.0},
}
"""PanNuke class of a nucleus -> share of each type; necrotic cells have none."""

_PROFILE_SEED = 20250  # every sample and the reference share the expression profiles
_DEPTH, _DEPTH_SD = 60.0, 0.45  # transcripts of a cell: median and standard deviation of the logarithm
_NECROTIC_DEPTH = 2.0  # median transcripts of a necrotic cell
_DISPERSION = 0.4  # variance of a count beyond Poisson, in units of the squared mean
_SPILL, _NEIGHBOURS, _REACH = 0.08, 6, 30.0  # share of transcripts that come from 6 neighbours within 30 um
_SHALLOW = 0.03  # share of the cells with a tenth of the transcripts
_RED_GENES = ("HBA1", "HBA2", "HBB", "ALAS2")
_NOT_IN_REFERENCE = ("TCL1A", "HPGDS", "MFAP5")  # genes of the panel that the reference lacks
_TWICE = ("CD68", "VIM", "KRT7", "CCL5")  # symbols with a second, rarely read identifier


def gene_id(symbol: str) -> str:
    """Make up an identifier of a gene in the form of Ensembl's; the same in the sample and in the reference."""
    return f"ENSG{zlib.crc32(symbol.encode()):011d}"


def draw_types(rng: np.random.Generator, classes: Iterable[str]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Draw the type (one of the ten) and the subtype (key of `SUBTYPES`) of cells of N PanNuke classes.

    Both are "-" for necrotic cells.
    """
    tissue = {
        kind: {label: subtype.tissue for label, subtype in SUBTYPES.items() if subtype.type == kind}
        for kind in ST_TYPES
    }
    types = [_choice(rng, CLASS_TYPES[name]) for name in classes]
    subtypes = [_choice(rng, tissue[kind]) if kind != "-" else "-" for kind in types]
    return np.array(types, dtype=str), np.array(subtypes, dtype=str)


def draw_counts(rng: np.random.Generator, subtypes: NDArray[np.str_], centres: Array) -> sparse.csr_matrix:
    """Draw the transcripts (N, genes of `PANEL`) int32 of cells; neighbours spill into each other.

    `subtypes` are N keys of `SUBTYPES`, or "-" for necrotic cells; `centres` (N, 2) are in um.
    """
    planted = profiles(PANEL)
    planted["-"] = np.mean(list(planted.values()), axis=0)  # what is left of dead cells: a mixture of all
    own = np.stack([planted[str(label)] for label in subtypes])
    depth = np.where(subtypes == "-", _NECROTIC_DEPTH, _DEPTH)
    depth = depth * np.exp(_DEPTH_SD * rng.standard_normal(len(subtypes)))
    depth[rng.random(len(subtypes)) < _SHALLOW] *= 0.1
    return _negative_binomial(rng, depth[:, None] * ((1 - _SPILL) * own + _SPILL * _around(own, centres)))


def profiles(genes: Sequence[str]) -> dict[str, Array]:
    """Compute the expected share of each gene in the transcripts of each subtype: (genes,), adds up to 1."""
    kinds = (*ST_TYPES, "-")
    level = np.empty((len(kinds), len(genes)))
    for column, gene in enumerate(genes):
        rng = np.random.default_rng([_PROFILE_SEED, int(gene_id(gene)[4:])])
        base = 3.0 if gene in COMMON_GENES else 0.25
        level[:, column] = base * np.exp(0.7 * rng.standard_normal() + 0.35 * rng.standard_normal(len(kinds)))
        for row, kind in enumerate(kinds):
            if gene in (MARKERS.get(kind, ()) if kind != "-" else _RED_GENES):
                level[row, column] *= 24.0
            elif kind in SHARED_MARKERS.get(gene, ()):
                level[row, column] *= 14.0
    planted = {}
    for label, subtype in SUBTYPES.items():
        profile = level[kinds.index(subtype.type)] * np.where(np.isin(genes, subtype.genes), 4.0, 1.0)
        planted[label] = profile / profile.sum()
    return planted


def write_reference(path: str | os.PathLike[str], *, seed: int, cells: int = 3000) -> pd.Series:
    """Write an scRNA-seq reference in the style of CELLxGENE: h5ad with Ensembl identifiers and raw counts in raw.

    It has more genes than the panel, lacks a few of it, names some symbols twice, reads each gene with an efficiency
    of its own, and its cells are ten times as deep and in other proportions than those of the tissue. Returns the
    number of cells of each label.

    Raises
    ------
    ConfigError
        Fewer cells than labels.
    """
    if cells < len(SUBTYPES):
        raise ConfigError(f"example.reference_cells: got {cells}, expected at least {len(SUBTYPES)}, one per label")
    rng = np.random.default_rng([seed, 77])
    others = [f"{stem}{number}" for stem in ("RPL", "RPS", "ZNF", "SLC25A", "TMEM") for number in range(3, 63)]
    others += ["MT-CO1", "MT-CO2", "MT-ND1", "MT-ND4", "MT-CYB", *_RED_GENES]
    symbols = rng.permutation([*others, *(gene for gene in PANEL if gene not in _NOT_IN_REFERENCE)]).tolist()
    shares = {label: subtype.reference for label, subtype in SUBTYPES.items()}
    labels = rng.permutation([*SUBTYPES, *(_choice(rng, shares) for _ in range(cells - len(SUBTYPES)))])
    profile = profiles(symbols)
    efficiency = np.exp(0.5 * rng.standard_normal(len(symbols)))
    depth = 10 * _DEPTH * np.exp(0.35 * rng.standard_normal(cells))
    mean = depth[:, None] * np.stack([profile[label] for label in labels.tolist()]) * efficiency
    second = 0.05 * mean[:, [symbols.index(symbol) for symbol in _TWICE]]
    counts = _negative_binomial(rng, np.hstack([mean, second])).astype(np.float32)
    ids = [*map(gene_id, symbols), *(gene_id(f"{symbol} (2)") for symbol in _TWICE)]
    obs = pd.DataFrame({"cell_type": pd.Categorical(labels)}, index=[f"cell_{number:06d}" for number in range(cells)])
    obs["donor_id"] = pd.Categorical([f"donor_{number}" for number in rng.integers(1, 5, cells)])
    obs["is_primary_data"] = True
    var = pd.DataFrame({"feature_name": pd.Categorical([*symbols, *_TWICE])}, index=ids)
    table = anndata.AnnData(counts, obs=obs, var=var)
    table.raw = table.copy()
    scale = 1e4 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    table.X = sparse.csr_matrix(sparse.diags(scale) @ counts).log1p().astype(np.float32)
    table.uns = {"title": "Drawn atlas of human lung", "schema_version": "5.2.0"}
    with atomic(path) as temporary:
        table.write_h5ad(temporary, compression="gzip")
    return pd.Series(labels).value_counts()


def _around(profile: Array, centres: Array) -> Array:
    """(N, G) mean profile of the neighbours of each cell; its own where it has none."""
    distance, index = cKDTree(centres).query(centres, k=_NEIGHBOURS + 1, distance_upper_bound=_REACH)
    near = np.isfinite(distance[:, 1:])
    padded = np.vstack([profile, np.zeros(profile.shape[1])])
    total = sum(padded[index[:, column]] for column in range(1, _NEIGHBOURS + 1))
    number = near.sum(axis=1)[:, None]
    return np.where(number > 0, total / np.maximum(number, 1), profile)


def _negative_binomial(rng: np.random.Generator, mean: Array) -> sparse.csr_matrix:
    drawn = rng.poisson(mean * rng.gamma(1 / _DISPERSION, _DISPERSION, mean.shape))
    return sparse.csr_matrix(drawn.astype(np.int32))


def _choice(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    limits = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))]
