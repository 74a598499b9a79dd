"""Cell types of a sample in two passes: composition by correlation, then types by optimal transport (TACCO).

Both annotators return fractions (cells, ten types): rows sum to 1; rows of cells without counts are NaN.
"""

import contextlib
import gc
import io
import logging
import warnings

import numpy as np
import pandas as pd
import tacco
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame, Series
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.runtime.errors import InputError
from celldetr.xenium.celltypes.labels import best
from celldetr.xenium.celltypes.profiles import CHUNK_CELLS, log_normalise, totals, type_profiles

log = logging.getLogger(__name__)

_TEMPERATURE = 0.05  # of the softmax over correlations
_MIN_VARIANCE = 1e-6  # relative to the sum of squares; below, the differences between a cell's genes are rounding
_MIN_SHARE = 1e-4  # of the composition, for types of the reference that the sample seems to lack


def two_passes(
    cells: AnnData, reference: AnnData, settings: CellTypeSettings, seed: int
) -> tuple[DataFrame, DataFrame, Series]:
    """Annotate by correlation, then by optimal transport with the composition as prior.

    `cells` and `reference` hold raw counts of the shared genes; uns["composition"] of the reference is type -> cells of
    the whole reference, from which it was drawn. Returns the fractions by optimal transport, those by correlation, and
    the prior (type -> share of the transcripts). Types without counts are left out. Raises InputError if fewer than two
    types have counts.
    """
    reference = types_with_counts(reference)
    second = correlation(cells, reference)
    if settings.prior == "sample":
        found = best(second)
        weight = Series(totals(cells)).groupby(found).sum().reindex(range(len(ST_TYPES)), fill_value=0.0)
    else:
        # cells of a type in the whole reference times its transcripts per cell
        per_cell = Series(totals(reference)).groupby(reference.obs["type"].to_numpy(str)).mean()
        weight = Series(
            {name: float(reference.uns["composition"][name]) * per_cell.get(name, 0.0) for name in ST_TYPES}
        )
    prior = Series(weight.to_numpy() / max(weight.sum(), 1e-12), index=list(ST_TYPES))
    log.info("composition (%s): %s", settings.prior, ", ".join(f"{name} {share:.3f}" for name, share in prior.items()))
    fractions = tacco_ot(cells, reference, prior, lamb=settings.lamb, seed=seed)
    return fractions, second, prior


def types_with_counts(reference: AnnData) -> AnnData:
    """Leave out the types of a reference without counts of the shared genes; InputError if fewer than two are left."""
    kinds = reference.obs["type"].astype(str)
    counts = Series(totals(reference)).groupby(kinds.to_numpy()).sum()
    empty = counts.index[counts == 0].tolist()
    if len(counts) - len(empty) < 2:
        raise InputError(f"reference: got counts of the shared genes in {len(counts) - len(empty)} types, expected 2")
    if not empty:
        return reference
    log.warning("reference: no counts of the shared genes in %s: no cell can get this type", ", ".join(empty))
    return reference[~kinds.isin(empty).to_numpy()]


def tacco_ot(cells: AnnData, reference: AnnData, prior: Series, *, lamb: float, seed: int) -> DataFrame:
    """Annotate by TACCO's optimal transport between cells and types.

    The composition couples all cells, so memory grows with their number. Large samples are split into random chunks of
    equal size, drawn by `seed`, each annotated with the composition of the whole sample.

    `cells` and `reference`, which has obs["type"], hold raw counts (csr_matrix) of the same genes. `prior` is type ->
    share of the transcripts, `lamb` its weight on the composition of the result. Returns fractions (cells, ten types).
    """
    kinds = reference.obs["type"].astype(str)
    found = sorted(set(kinds), key=ST_TYPES.index)
    prior = prior[found].clip(lower=_MIN_SHARE * prior.sum())
    known = AnnData(reference.X, obs=DataFrame({"type": kinds}), var=DataFrame(index=reference.var_names))
    result = np.full((cells.n_obs, len(ST_TYPES)), np.nan, dtype=np.float32)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(totals(cells) > 0))
    chunks = np.array_split(order, -(-len(order) // CHUNK_CELLS)) if len(order) else []
    gc.freeze()  # TACCO collects garbage in each step: without what exists already a fifth faster
    for number, chunk in enumerate(chunks, start=1):
        rows = np.sort(chunk)
        result[rows] = _transport(cells.X[rows], known, prior / prior.sum(), lamb)
        log.info("optimal transport: chunk %d of %d, %d cells", number, len(chunks), len(rows))
    gc.unfreeze()
    return DataFrame(result, index=cells.obs_names, columns=list(ST_TYPES))


def _transport(counts: sparse.csr_matrix, reference: AnnData, prior: Series, lamb: float) -> NDArray[np.float32]:
    """Fractions (cells, ten types) of one chunk."""
    index = pd.RangeIndex(counts.shape[0]).astype(str)
    chunk = AnnData(counts, obs=DataFrame(index=index), var=DataFrame(index=reference.var_names))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fractions = tacco.tl.annotate(chunk, reference, "type", method="OT", annotation_prior=prior, lamb=lamb)
    for line in printed.getvalue().splitlines():
        log.debug("tacco: %s", line)
    return fractions.reindex(index=index, columns=list(ST_TYPES), fill_value=0).to_numpy(np.float32)


def correlation(cells: AnnData, reference: AnnData) -> DataFrame:
    """Annotate by Pearson correlation of log-normalised profiles with those of the types.

    Profiles are scaled to the median total of the cells; the fractions (cells, ten types) are a softmax of the
    correlations. Cells whose genes all have the same count get NaN.
    """
    amount = totals(cells)
    target = float(np.median(amount[amount > 0])) if (amount > 0).any() else 1.0
    profiles = type_profiles(reference)
    logs = np.log1p(profiles.to_numpy() * target)
    logs -= logs.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(logs, axis=1, keepdims=True)
    norms[norms == 0] = np.inf  # a flat profile correlates with nothing
    fractions = np.zeros((cells.n_obs, len(ST_TYPES)), dtype=np.float32)
    columns = [ST_TYPES.index(name) for name in profiles.index]
    for start in range(0, cells.n_obs, CHUNK_CELLS):
        chunk = slice(start, start + CHUNK_CELLS)
        similar = _correlations(log_normalise(cells.X[chunk], amount[chunk], target), logs / norms)
        weights = np.exp((similar - similar.max(axis=1, keepdims=True)) / _TEMPERATURE)
        fractions[chunk, columns] = weights / weights.sum(axis=1, keepdims=True)
        fractions[chunk][np.isnan(similar).any(axis=1)] = np.nan
    return DataFrame(fractions, index=cells.obs_names, columns=list(ST_TYPES))


def _correlations(rows: sparse.csr_matrix, profiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlations (cells, types) with centred profiles of unit norm; NaN if all genes have the same count."""
    mean = np.asarray(rows.mean(axis=1), dtype=np.float64).ravel()
    squares = np.asarray(rows.multiply(rows).sum(axis=1), dtype=np.float64).ravel()
    variance = squares - rows.shape[1] * mean**2
    spread = np.sqrt(np.where(variance > _MIN_VARIANCE * squares, variance, np.nan))
    return np.asarray((rows @ profiles.T) / spread[:, None])
