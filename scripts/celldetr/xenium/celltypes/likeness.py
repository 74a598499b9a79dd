"""How much a cell resembles its own type: an absolute criterion, which holds for types that the reference lacks, too.

The likeness of a cell is the cosine of the square roots of its counts and of its type's profile (the square root makes
the noise of counts alike). It is compared with what held-out cells of that type reach when they are thinned to the same
number of transcripts. Two corrections make cells of the sample and of the reference comparable: a factor for each gene
(the platforms read genes with different efficiency), and a shift that is common to all types (transcripts of
neighbours). Both are medians over types, so that one type full of foreign cells does not move them; with fewer than
three types there are no factors, and the shift is the median over cells.
"""

import logging
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.xenium.celltypes.profiles import known_part, thin, totals, type_profiles

log = logging.getLogger(__name__)

_DEPTHS = 5.0 * 2.0 ** np.arange(9)  # transcripts; between them, limits are interpolated over the logarithm
_DRAWS = 300  # held-out cells per type and depth, drawn with replacement
_MIN_CELLS = 20  # of a type in the sample that tell something about factors or the common shift
_MIN_HELD_OUT = 5  # cells that tell something about the spread of a type
_MIN_TYPES = 3  # over which a median is robust
_LARGEST_FACTOR = 3.0
_PRIOR_COUNTS, _PRIOR_SHARE = 5.0, 0.02  # added to counts of a gene: transcripts, share of the mean of all genes


@dataclass(frozen=True)
class Likeness:
    """Likeness of cells to their types."""

    score: NDArray[np.float64]  # (N,); 0: the median of held-out cells, -1: their limit; NaN: no type, or no criterion
    factors: NDArray[np.float64]  # (G,) efficiency of the sample's platform relative to the reference's


def likeness(
    cells: AnnData, first: NDArray[np.int8], labels: NDArray[np.int8], reference: AnnData, percentile: float, seed: int
) -> Likeness:
    """Compare the cells of a sample with the profiles of their types.

    `cells` and `reference` hold raw counts of the shared genes; `first` (N,) is the type with the largest fraction,
    `labels` (N,) those of certain cells. A score below -1 is below the `percentile` of held-out cells.
    """
    factors = gene_factors(cells, labels, reference)
    profiles = type_profiles(known_part(reference))
    amount = totals(cells)
    generator = np.random.default_rng(seed)
    score = np.full(cells.n_obs, np.nan)
    for name in profiles.index:
        rows = np.flatnonzero(first == ST_TYPES.index(name))
        share = profiles.loc[name].to_numpy()
        curve = _limits(reference, name, share, percentile, generator)
        if not len(rows) or curve is None:
            continue
        depth = np.log(np.maximum(amount[rows], 1))
        low, middle = (np.interp(depth, curve[:, 0], curve[:, column]) for column in (1, 2))
        score[rows] = (_cosine(cells.X[rows], share * factors) - middle) / np.maximum(middle - low, 1e-9)
    labelled = (labels >= 0) & np.isfinite(score)
    medians = [
        float(np.median(score[labelled & (labels == label)]))
        for label in np.unique(labels[labelled])
        if (labelled & (labels == label)).sum() >= _MIN_CELLS
    ]
    if len(medians) < _MIN_TYPES:  # of a small sample, or one of few types
        medians = score[labelled].tolist()
    shift = min(0.0, float(np.median(medians))) if medians else 0.0
    log.info("likeness to the own type: common shift %.2f, to be below the limit takes %.2f", shift, shift - 1)
    return Likeness(score - shift, factors)


def gene_factors(cells: AnnData, labels: NDArray[np.int8], reference: AnnData) -> NDArray[np.float64]:
    """Efficiency (G,) with which the sample's platform reads genes, relative to the reference's.

    The median over types of the ratio between counts of the type's labelled cells and those expected from its profile;
    all 1 with fewer than 3 types.
    """
    ratios = []
    for name, share in type_profiles(known_part(reference)).iterrows():
        rows = np.flatnonzero(labels == ST_TYPES.index(str(name)))
        if len(rows) < _MIN_CELLS:
            continue
        counted = np.asarray(cells.X[rows].sum(axis=0), dtype=np.float64).ravel()
        prior = _PRIOR_COUNTS + _PRIOR_SHARE * counted.mean()
        ratios.append((counted + prior) / (share.to_numpy() * counted.sum() + prior))
    if len(ratios) < _MIN_TYPES:
        return np.ones(cells.n_vars)
    return np.clip(np.median(ratios, axis=0), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


def _limits(
    reference: AnnData, name: str, share: NDArray[np.float64], percentile: float, generator: np.random.Generator
) -> NDArray[np.float64] | None:
    """Rows (log of the transcripts, limit, median) of the likeness of held-out cells; None if there are too few."""
    held = reference[(reference.obs["held_out"] & (reference.obs["type"] == name)).to_numpy(dtype=bool)]
    amount = totals(held)
    curve = []
    for depth in _DEPTHS:
        rows = np.flatnonzero(amount >= depth)
        if len(rows) < _MIN_HELD_OUT:
            break
        thinned = thin(held.X[generator.choice(rows, _DRAWS)], np.array([depth]), generator)
        values = _cosine(thinned[np.diff(thinned.indptr) > 0], share)
        curve.append((np.log(depth), *np.percentile(values, (percentile, 50))))
    return np.array(curve) if curve else None


def _cosine(counts: sparse.csr_matrix, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine (N,) of the square roots of counts (N, G) and shares (G,): the Bhattacharyya coefficient of both."""
    roots = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    np.sqrt(roots.data, out=roots.data)
    amount = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    return np.asarray(roots @ np.sqrt(share / share.sum())).ravel() / np.sqrt(np.maximum(amount, 1))
