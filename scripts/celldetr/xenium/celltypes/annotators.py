"""Annotators: fractions of the ten types in each cell, by optimal transport (TACCO) or by correlation."""

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import pandas as pd
import tacco
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame, Series
from scipy import sparse

from celldetr.config.classes import ST_TYPES

log = logging.getLogger(__name__)

CHUNK_CELLS = 50_000
"""Cells that optimal transport sees at a time."""
_TEMPERATURE = 0.05  # difference of correlations at which fractions differ by a factor of e
_ALIKE = 1e-6  # variance over squares, below which nothing but rounding tells the genes of a cell apart
_LEAST_SHARE = 1e-4  # of the composition, for types of the reference that the sample seems to lack


class Annotator(Protocol):
    """Estimates what types cells are of."""

    def __call__(self, cells: AnnData, reference: AnnData, prior: Series | None = None) -> DataFrame:
        """Annotate cells.

        Parameters
        ----------
        cells
            Raw counts (csr_matrix), of the genes of the reference and in their order.
        reference
            Raw counts (csr_matrix) and obs["type"].
        prior
            Type -> share of the transcripts.

        Returns
        -------
        DataFrame
            Fractions (cells, ten types); rows sum to 1, those of cells without counts are NaN.
        """


def tacco_ot(
    cells: AnnData,
    reference: AnnData,
    prior: Series | None = None,
    *,
    lamb: float = 0.1,
    seed: int = 0,
    chunk_cells: int = CHUNK_CELLS,
) -> DataFrame:
    """Annotate by TACCO's optimal transport between cells and types (see `Annotator`).

    The composition couples all cells, so that memory grows with them. Large samples are cut into random parts of equal
    size, each with the composition of the whole: each is a small sample of the same tissue.

    Parameters
    ----------
    cells, reference
        As for `Annotator`.
    prior
        Type -> share of the transcripts; None is that of the reference's transcripts.
    lamb
        How strongly the composition of the result is held to the prior.
    seed
        Of the parts.
    chunk_cells
        Most cells of a part.
    """
    kinds = reference.obs["type"].astype(str)
    found = sorted(set(kinds), key=ST_TYPES.index)
    if prior is None:
        prior = transcript_shares(kinds.map(ST_TYPES.index).to_numpy(np.int64), totals(reference))
    prior = prior[found].clip(lower=_LEAST_SHARE * prior.sum())
    known = AnnData(reference.X, obs=DataFrame({"type": kinds}), var=DataFrame(index=reference.var_names))
    result = np.full((cells.n_obs, len(ST_TYPES)), np.nan, dtype=np.float32)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(totals(cells) > 0))
    parts = np.array_split(order, max(1, -(-len(order) // chunk_cells)))
    for number, part in enumerate(parts, start=1):
        if len(part):
            rows = np.sort(part)
            result[rows] = _transport(cells.X[rows], known, prior / prior.sum(), lamb)
            log.info("optimal transport: part %d of %d, %d cells", number, len(parts), len(rows))
    return DataFrame(result, index=cells.obs_names, columns=list(ST_TYPES))


def _transport(counts: sparse.csr_matrix, reference: AnnData, prior: Series, lamb: float) -> NDArray[np.float32]:
    """Fractions (cells, ten types) of a part of the cells."""
    index = pd.RangeIndex(counts.shape[0]).astype(str)
    part = AnnData(counts, obs=DataFrame(index=index), var=DataFrame(index=reference.var_names))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings(), _little_garbage():
        warnings.simplefilter("ignore")
        fractions = tacco.tl.annotate(part, reference, "type", method="OT", annotation_prior=prior, lamb=lamb)
    for line in said.getvalue().splitlines():
        log.debug("tacco: %s", line)
    return fractions.reindex(index=index, columns=list(ST_TYPES), fill_value=0).to_numpy(np.float32)


@contextlib.contextmanager
def _little_garbage() -> Iterator[None]:
    """Keep what is there out of garbage collection: TACCO asks for one in each of its steps, a fifth of its time."""
    gc.collect()  # what the part before has left is not kept
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def correlation(cells: AnnData, reference: AnnData, prior: Series | None = None) -> DataFrame:
    """Annotate by Pearson correlation of logarithmic profiles with those of the types (see `Annotator`).

    Profiles are normalised to the median total of the cells; fractions are a softmax of the correlations. A prior
    changes nothing.
    """
    amount = totals(cells)
    target = float(np.median(amount[amount > 0])) if (amount > 0).any() else 1.0
    profiles = type_profiles(reference)
    logs = np.log1p(profiles.to_numpy() * target)
    logs -= logs.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(logs, axis=1, keepdims=True)
    norms[norms == 0] = np.inf  # a type without counts is like nothing
    fractions = np.zeros((cells.n_obs, len(ST_TYPES)), dtype=np.float32)
    places = [ST_TYPES.index(name) for name in profiles.index]
    for start in range(0, cells.n_obs, CHUNK_CELLS):
        part = slice(start, start + CHUNK_CELLS)
        similar = _correlations(log_normalise(cells.X[part], amount[part], target), logs / norms)
        weights = np.exp((similar - similar.max(axis=1, keepdims=True)) / _TEMPERATURE)
        fractions[part, places] = weights / weights.sum(axis=1, keepdims=True)
        fractions[part][np.isnan(similar).any(axis=1)] = np.nan
    return DataFrame(fractions, index=cells.obs_names, columns=list(ST_TYPES))


def _correlations(rows: sparse.csr_matrix, profiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlations (cells, types) with centred profiles of length 1; NaN where all genes are alike."""
    mean = np.asarray(rows.mean(axis=1), dtype=np.float64).ravel()
    squares = np.asarray(rows.multiply(rows).sum(axis=1), dtype=np.float64).ravel()
    variance = squares - rows.shape[1] * mean**2
    spread = np.sqrt(np.where(variance > _ALIKE * squares, variance, np.nan))
    similar: NDArray[np.float64] = (rows @ profiles.T) / spread[:, None]
    return similar


def totals(cells: AnnData) -> NDArray[np.float64]:
    """Transcripts of each cell (N,)."""
    return np.asarray(cells.X.sum(axis=1), dtype=np.float64).ravel()


def log_normalise(counts: sparse.csr_matrix, amount: NDArray[np.float64], target: float) -> sparse.csr_matrix:
    """Scale rows from an amount each (N,) to a common target and take log(1 + x); empty rows stay empty."""
    scaled = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    scaled.data *= np.repeat(target / np.maximum(amount, 1), np.diff(scaled.indptr)).astype(np.float32)
    np.log1p(scaled.data, out=scaled.data)
    return scaled


def type_profiles(reference: AnnData) -> DataFrame:
    """Mean share of each gene in the cells of a type: (types of the reference, genes), in the order of the ten."""
    found = sorted(set(reference.obs["type"]), key=ST_TYPES.index)
    amount = np.maximum(totals(reference), 1)
    shares = sparse.diags(1 / amount) @ reference.X
    kind = reference.obs["type"].astype(str).to_numpy()
    rows = [np.asarray(shares[np.flatnonzero(kind == name)].mean(axis=0)).ravel() for name in found]
    return DataFrame(np.stack(rows), index=found, columns=reference.var_names)


def transcript_shares(kinds: NDArray[np.int64], transcripts: NDArray[np.float64]) -> Series:
    """Share of each of the ten types in the transcripts of cells; kinds (N,) are places in `ST_TYPES` or -1."""
    typed = kinds >= 0
    shares = np.bincount(kinds[typed], weights=transcripts[typed], minlength=len(ST_TYPES))
    return Series(shares / max(shares.sum(), 1e-12), index=list(ST_TYPES))
