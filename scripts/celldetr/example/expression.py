"""Planted gene expression: types of nuclei, counts of the cells, and the scRNA-seq reference that fits them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from celldetr.config.classes import ST_TYPES
from celldetr.example.xenium_panel import (
    COMMON_GENES,
    LOOK_TYPES,
    MARKERS,
    PANEL,
    REFERENCE_LABELS,
    SHARED_MARKERS,
    SUBTYPES,
    gene_id,
)
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic

Array = NDArray[np.floating]
__all__ = ["PANEL", "REFERENCE_LABELS", "Expression", "draw_counts", "draw_types", "profiles", "write_reference"]

_PROFILE_SEED = 20250  # profiles are facts of nature: every sample and the reference share them
_RED_GENES = ("HBA1", "HBA2", "HBB", "ALAS2")
_NOT_IN_REFERENCE = ("TCL1A", "HPGDS", "MFAP5")  # genes of the panel that the reference lacks
_TWICE = ("CD68", "VIM", "KRT7", "CCL5")  # symbols that a second, rarely read identifier bears
_NEIGHBOURS = 6  # cells that spill into a cell
_REACH = 30.0  # um; from farther away nothing spills


@dataclass(frozen=True)
class Expression:
    """How the cells of a sample express their genes.

    Attributes
    ----------
    depth
        Median number of transcripts of a cell.
    depth_sd
        Spread of its logarithm.
    dispersion
        Variance of a count beyond Poisson, in units of the squared mean (negative binomial).
    separation
        How separable types are: 1 as planted, 0 all alike.
    noise
        Share of a cell's transcripts that come from its neighbours.
    shallow
        Share of the cells that hold a tenth of the transcripts.
    necrotic_depth
        Median number of transcripts of a necrotic cell.
    """

    depth: float = 60.0
    depth_sd: float = 0.45
    dispersion: float = 0.4
    separation: float = 1.0
    noise: float = 0.08
    shallow: float = 0.03
    necrotic_depth: float = 2.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if min(self.depth, self.necrotic_depth, self.dispersion) <= 0 or self.depth_sd < 0:
            raise ConfigError(f"expression: got {self}, expected depths and dispersion > 0, depth_sd >= 0")
        if not all(0 <= share <= 1 for share in (self.separation, self.noise, self.shallow)):
            raise ConfigError(f"expression: got {self}, expected separation, noise and shallow in [0, 1]")


def draw_types(rng: np.random.Generator, looks: Sequence[str]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Draw the type and the subtype of each nucleus from its look.

    Parameters
    ----------
    rng
        Source of all randomness.
    looks
        N keys of `LOOK_TYPES`.

    Returns
    -------
    types : (N,) str
        One of the ten types; "-" for necrotic cells.
    subtypes : (N,) str
        A key of `SUBTYPES`; "-" for necrotic cells.
    """
    types = np.array([_choice(rng, LOOK_TYPES[look]) for look in looks], dtype="<U16")
    within = {
        kind: {label: subtype.tissue for label, subtype in SUBTYPES.items() if subtype.type == kind}
        for kind in ST_TYPES
    }
    subtypes = np.array([_choice(rng, within[kind]) if kind != "-" else "-" for kind in types], dtype="<U64")
    return types, subtypes


def draw_counts(
    rng: np.random.Generator, subtypes: Sequence[str] | NDArray[np.str_], centres: Array, expression: Expression
) -> sparse.csr_matrix:
    """Draw the transcripts of cells.

    Parameters
    ----------
    rng
        Source of all randomness.
    subtypes
        N keys of `SUBTYPES`, or "-" for necrotic cells.
    centres
        (N, 2) um: neighbours spill into each other.
    expression
        See `Expression`.

    Returns
    -------
    csr_matrix
        (N, genes of `PANEL`) int32.
    """
    names = np.asarray(subtypes)
    own = np.empty((len(names), len(PANEL)))
    for label in np.unique(names):
        own[names == label] = profiles(PANEL, expression.separation).get(str(label), _average(expression.separation))
    mixed = (1 - expression.noise) * own + expression.noise * _around(own, centres)
    depth = np.where(names == "-", expression.necrotic_depth, expression.depth)
    depth = depth * np.exp(expression.depth_sd * rng.standard_normal(len(names)))
    depth[rng.random(len(names)) < expression.shallow] *= 0.1
    return _negative_binomial(rng, depth[:, None] * mixed, expression.dispersion)


def profiles(genes: Sequence[str], separation: float = 1.0) -> dict[str, Array]:
    """Compute the expected share of each gene in the transcripts of each subtype.

    Parameters
    ----------
    genes
        Symbols.
    separation
        1 as planted, 0 all subtypes alike.

    Returns
    -------
    dict
        Subtype -> (genes,) shares that add up to 1.
    """
    level = {gene: _levels(gene) for gene in genes}
    of_type = {
        kind: np.array([level[gene][0] * _enriched(gene, kind, level[gene]) for gene in genes])
        for kind in (*ST_TYPES, "-")
    }
    planted = {}
    for label, subtype in SUBTYPES.items():
        boost = np.array([4.0 if gene in subtype.genes else 1.0 for gene in genes])
        profile = of_type[subtype.type] * boost
        planted[label] = profile / profile.sum()
    middle = np.mean(list(planted.values()), axis=0)
    blended = {label: profile**separation * middle ** (1 - separation) for label, profile in planted.items()}
    return {label: profile / profile.sum() for label, profile in blended.items()}


def write_reference(path: str | Path, *, seed: int, cells: int = 3000, expression: Expression | None = None) -> dict:
    """Write an scRNA-seq reference in the style of CELLxGENE: h5ad with Ensembl identifiers and raw counts in raw.

    It has more genes than the panel, lacks a few of it, names some symbols twice, reads each gene with an efficiency
    of its own, and its cells are deeper and in other proportions than those of the tissue.

    Parameters
    ----------
    path
        File to write, replaced when it exists.
    seed
        Seed of everything random but the profiles.
    cells
        Number of cells, at least one per label.
    expression
        Of the sample: depth and separation. The reference is ten times as deep, without noise.

    Returns
    -------
    dict
        ``cells`` (label -> number), ``types`` (type -> number), ``genes`` (number), ``shared`` (symbols that the panel
        has, too), ``twice`` (symbols of two identifiers), ``labels`` (`REFERENCE_LABELS`).

    Raises
    ------
    ConfigError
        Fewer cells than labels.
    """
    if cells < len(SUBTYPES):
        raise ConfigError(f"synthetic reference: got cells={cells}, expected at least {len(SUBTYPES)}: one a label")
    setting, rng = expression or Expression(), np.random.default_rng([seed, 77])
    symbols = _reference_genes()
    labels = _reference_labels(rng, cells)
    counts = _reference_counts(rng, labels, symbols, setting)
    ids = [gene_id(f"{symbol} (2)" if symbol in symbols[:index] else symbol) for index, symbol in enumerate(symbols)]
    raw = anndata.AnnData(counts, obs=_reference_obs(rng, labels, counts), var=_reference_var(ids, symbols))
    table = raw.copy()
    total = np.asarray(counts.sum(axis=1)).ravel()
    table.X = sparse.csr_matrix(sparse.diags(1e4 / np.maximum(total, 1)) @ counts).log1p().astype(np.float32)
    table.raw = raw
    table.uns = {"title": "Synthetic atlas of human lung", "schema_version": "5.2.0", "default_embedding": "X_umap"}
    with atomic(path) as temporary:
        table.write_h5ad(temporary, compression="gzip")
    number = pd.Series(labels).value_counts().to_dict()
    types = pd.Series([REFERENCE_LABELS[label] for label in labels]).value_counts().to_dict()
    shared = sorted(set(symbols) & set(PANEL))
    return {
        **{"cells": number, "types": types, "genes": len(symbols), "shared": shared},
        **{"twice": list(_TWICE), "labels": dict(REFERENCE_LABELS)},
    }


def _levels(gene: str) -> Array:
    """(1 + types + 1,) expression of a gene where it is no marker, and how far each type deviates from it."""
    rng = np.random.default_rng([_PROFILE_SEED, int(gene_id(gene)[4:])])
    base = 3.0 if gene in COMMON_GENES else 0.25
    return np.exp(np.append(np.log(base) + 0.7 * rng.standard_normal(), 0.35 * rng.standard_normal(len(ST_TYPES) + 1)))


def _enriched(gene: str, kind: str, level: Array) -> float:
    """Factor on the level of a gene in a type."""
    factor = float(level[1 + (*ST_TYPES, "-").index(kind)])
    if gene in MARKERS.get(kind, ()) or (kind == "-" and gene in _RED_GENES):
        return 24.0 * factor
    if kind in SHARED_MARKERS.get(gene, ()):
        return 14.0 * factor
    return factor


def _average(separation: float) -> Array:
    """Profile of what is left of dead cells: a mixture of all."""
    average: Array = np.mean(list(profiles(PANEL, separation).values()), axis=0)
    return average


def _around(profile: Array, centres: Array) -> Array:
    """(N, G) mean profile of the neighbours of each cell; its own where it has none."""
    if len(profile) < 2:
        return profile
    count = min(_NEIGHBOURS + 1, len(profile))
    distance, index = cKDTree(centres).query(centres, k=count, distance_upper_bound=_REACH)
    near = np.isfinite(distance[:, 1:])
    padded = np.vstack([profile, np.zeros(profile.shape[1])])
    total = np.zeros_like(profile)
    for column in range(1, count):
        total += padded[index[:, column]]
    number = near.sum(axis=1)
    return np.where(number[:, None] > 0, total / np.maximum(number, 1)[:, None], profile)


def _negative_binomial(rng: np.random.Generator, mean: Array, dispersion: float) -> sparse.csr_matrix:
    drawn = rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape))
    return sparse.csr_matrix(drawn.astype(np.int32))


def _reference_genes() -> list[str]:
    """Symbols in the order of the reference; some twice."""
    others = [f"{stem}{number}" for stem in ("RPL", "RPS", "ZNF", "SLC25A", "TMEM") for number in range(3, 63)]
    mitochondria = ["MT-CO1", "MT-CO2", "MT-ND1", "MT-ND4", "MT-CYB"]
    measured = [gene for gene in PANEL if gene not in _NOT_IN_REFERENCE]
    mixed = np.random.default_rng(_PROFILE_SEED).permutation([*measured, *others, *mitochondria, *_RED_GENES])
    return [str(gene) for gene in mixed] + list(_TWICE)


def _reference_labels(rng: np.random.Generator, cells: int) -> NDArray[np.str_]:
    shares = {label: subtype.reference for label, subtype in SUBTYPES.items()}
    drawn = [*SUBTYPES, *(_choice(rng, shares) for _ in range(cells - len(SUBTYPES)))]
    return rng.permutation(np.array(drawn))


def _reference_counts(
    rng: np.random.Generator, labels: NDArray[np.str_], symbols: list[str], expression: Expression
) -> sparse.csr_matrix:
    single = symbols[: len(symbols) - len(_TWICE)]
    profile = profiles(single, expression.separation)
    platform = np.exp(0.5 * rng.standard_normal(len(single)))
    depth = 10 * expression.depth * np.exp(0.35 * rng.standard_normal(len(labels)))
    mean = depth[:, None] * np.stack([profile[str(label)] for label in labels]) * platform
    again = 0.05 * mean[:, [single.index(symbol) for symbol in _TWICE]]
    return _negative_binomial(rng, np.hstack([mean, again]), expression.dispersion).astype(np.float32)


def _reference_obs(rng: np.random.Generator, labels: NDArray[np.str_], counts: sparse.csr_matrix) -> pd.DataFrame:
    donors = rng.integers(1, 5, len(labels))
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(labels),
            "donor_id": pd.Categorical([f"donor_{number}" for number in donors]),
            "assay": pd.Categorical(["10x 3' v3"] * len(labels)),
            "tissue": pd.Categorical(["lung"] * len(labels)),
            "disease": pd.Categorical(["lung adenocarcinoma"] * len(labels)),
            "is_primary_data": np.ones(len(labels), dtype=bool),
            "total_counts": np.asarray(counts.sum(axis=1)).ravel(),
        },
        index=[f"cell_{number:06d}" for number in range(len(labels))],
    )


def _reference_var(ids: list[str], symbols: list[str]) -> pd.DataFrame:
    count = len(ids)
    return pd.DataFrame(
        {
            "feature_is_filtered": np.zeros(count, dtype=bool),
            "feature_name": pd.Categorical(symbols),
            "feature_reference": pd.Categorical(["NCBITaxon:9606"] * count),
            "feature_biotype": pd.Categorical(["gene"] * count),
        },
        index=ids,
    )


def _choice(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    limits = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))]
