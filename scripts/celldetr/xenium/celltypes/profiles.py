"""Counts of cells and profiles of types: totals, normalisation, thinning, shares of the genes."""

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame
from scipy import sparse

from celldetr.config.classes import ST_TYPES

CHUNK_CELLS = 50_000
"""Most cells that are annotated at once."""
_FEW_CELLS = 20


def totals(cells: AnnData) -> NDArray[np.float64]:
    """Transcripts of each cell (N,)."""
    return np.asarray(cells.X.sum(axis=1), dtype=np.float64).ravel()


def on_genes(cells: AnnData, columns: np.ndarray, names: tuple[str, ...]) -> AnnData:
    """Restrict counts to some genes and rename these; obs and uns are kept."""
    counts = sparse.csr_matrix(cells.X[:, columns], dtype=np.float32)
    return AnnData(counts, obs=cells.obs, var=DataFrame(index=pd.Index(names)), uns=cells.uns)


def known_part(reference: AnnData) -> AnnData:
    """Cells of a prepared reference that annotate (not held out)."""
    return reference[~reference.obs["held_out"].to_numpy(dtype=bool)]


def log_normalise(counts: sparse.csr_matrix, amount: NDArray[np.float64], target: float) -> sparse.csr_matrix:
    """Scale rows from their totals (N,) to a common target and take log(1 + x); empty rows stay empty."""
    scaled = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    scaled.data *= np.repeat(target / np.maximum(amount, 1), np.diff(scaled.indptr)).astype(np.float32)
    np.log1p(scaled.data, out=scaled.data)
    return scaled


def thin(
    counts: sparse.csr_matrix,
    transcripts: NDArray[np.float64],
    generator: np.random.Generator,
    factors: NDArray[np.float64] | None = None,
) -> sparse.csr_matrix:
    """Thin raw counts (cells, G) to totals drawn from the nonzero `transcripts` (N,) of a sample.

    Each transcript of a cell is kept with the same probability, or one in proportion to the `factors` (G,) of the
    genes, so that the mean total is the drawn one; transcripts are never added.
    """
    wanted = generator.choice(transcripts[transcripts > 0], counts.shape[0])
    weight = np.ones(counts.shape[1]) if factors is None else factors
    keep = np.repeat(wanted / np.maximum(counts @ weight, 1e-9), np.diff(counts.indptr)) * weight[counts.indices]
    kept = generator.binomial(counts.data.astype(np.int64), np.minimum(1, keep)).astype(np.float32)
    thinned = sparse.csr_matrix((kept, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
    thinned.eliminate_zeros()
    return thinned


def type_profiles(reference: AnnData) -> DataFrame:
    """Mean share of each gene in the cells of a type: (types of the reference, genes), in the order of `ST_TYPES`."""
    found = sorted(set(reference.obs["type"]), key=ST_TYPES.index)
    shares = sparse.diags(1 / np.maximum(totals(reference), 1)) @ reference.X
    kind = reference.obs["type"].astype(str).to_numpy()
    rows = [np.asarray(shares[np.flatnonzero(kind == name)].mean(axis=0)).ravel() for name in found]
    return DataFrame(np.stack(rows), index=found, columns=reference.var_names)


def label_profiles(reference: AnnData) -> DataFrame:
    """Mean share of each gene in the cells of a label: (labels of the reference, genes).

    Labels of few cells are drawn towards their type.
    """
    types = type_profiles(reference)
    shares = sparse.diags(1 / np.maximum(totals(reference), 1)) @ reference.X
    labels = reference.obs["label"].astype(str).to_numpy()
    rows = {}
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        kind = str(reference.obs["type"].iloc[places[0]])
        own = np.asarray(shares[places].sum(axis=0)).ravel()
        rows[label] = (own + _FEW_CELLS * types.loc[kind].to_numpy()) / (len(places) + _FEW_CELLS)
    return DataFrame.from_dict(rows, orient="index", columns=reference.var_names)
