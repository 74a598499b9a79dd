"""Types that the sample has and the reference lacks: profiles that explain cells better than any of the reference.

All cells are a mixture of the profiles of the reference's labels, which are fixed, and of free profiles, which are
found one by one by expectation maximisation (multinomial mixture). A free profile counts as another type if it comes
back from both halves of the cells, is far enough from the profile of the most similar type, and explains few held-out
cells of that type: what is a state of a known type, or a difference between platforms, fails one of these.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.xenium.celltypes.profiles import CHUNK_CELLS, known_part, label_profiles, thin, totals, type_profiles

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
_SEARCHED = 20_000  # random cells among which free profiles are searched
_MIN_TRANSCRIPTS = 5  # of these cells
_MIN_CELLS = 20  # of a type that gives a start, of a free profile, and of a type that is reported
_START_SHARE = 30  # percent of a type's cells, those least like it, that a free profile starts from
_STEPS = 20  # of expectation maximisation
_SMOOTHING = 0.02  # share of the background in a profile
_REPEATABLE = 0.5  # largest distance of the profiles of both halves, relative to that from the most similar type
_MOST_KNOWN = 0.15  # largest share of held-out cells of the most similar type that the profile explains better,
_EXCESS = 3.0  # or a third of the share of the sample's cells of that type
_TESTED = 300  # held-out cells per type, drawn with replacement
_MIN_POSTERIOR = 0.2  # from which on a cell counts as one of an unknown type
_GENES_SHOWN = 5


@dataclass(frozen=True)
class UnknownTypes:
    """Cells of types that the reference lacks."""

    cells: NDArray[np.bool_]  # (N,)
    found: list[dict[str, Any]]  # for people: near (most similar type), distance (from it), genes, cells (number)


@dataclass(frozen=True)
class _Mixture:
    """A free profile beside fixed ones."""

    profile: Array  # (G,)
    weights: Array  # (N,) posterior of the profile
    fit: float  # log-likelihood


class _KnownCells:
    """Held-out cells of each type of the reference, thinned to the sample."""

    def __init__(self, reference: AnnData, transcripts: Array, factors: Array, generator: np.random.Generator) -> None:
        logs = np.log([_smooth(share) for share in label_profiles(known_part(reference)).to_numpy()])
        self._factors = factors
        self._counts, self._fits = {}, {}
        enough = transcripts[transcripts >= _MIN_TRANSCRIPTS]
        for name in reference.obs["type"].unique() if len(enough) else ():
            own = (reference.obs["type"] == name).to_numpy()
            held = own & reference.obs["held_out"].to_numpy(dtype=bool)
            rows = generator.choice(np.flatnonzero(held if held.any() else own), _TESTED)
            counts = thin(reference.X[rows], enough, generator).astype(np.float64)
            self._counts[str(name)], self._fits[str(name)] = counts, (counts @ logs.T).max(axis=1)

    def explained(self, name: str, profile: Array) -> float:
        """Share of the cells of a type (0 if unknown) that a profile of the sample explains better than the labels."""
        if name not in self._counts:
            return 0.0
        return float((self._counts[name] @ np.log(_smooth(profile / self._factors)) > self._fits[name]).mean())


@dataclass(frozen=True)
class _Search:
    """Cells among which free profiles are searched."""

    counts: sparse.csr_matrix  # (N, G)
    first: NDArray[np.int8]  # (N,) type with the largest fraction
    starts: list[NDArray[np.bool_]]  # masks (N,) of cells that a free profile may start from
    half: NDArray[np.bool_]  # (N,)
    tests: _KnownCells


def unknown_types(
    cells: AnnData,
    first: NDArray[np.int8],
    score: Array,
    factors: Array,
    reference: AnnData,
    settings: CellTypeSettings,
    seed: int,
) -> UnknownTypes:
    """Find the cells of a sample that are of a type that the reference lacks.

    `cells` and `reference` hold raw counts of the shared genes; `first` (N,) is the type with the largest fraction,
    `score` (N,) and `factors` (G,) are those of `likeness`.
    """
    known = known_part(reference)
    fixed = np.stack([_smooth(share * factors) for share in label_profiles(known).to_numpy()])
    types = {str(name): _smooth(share.to_numpy() * factors) for name, share in type_profiles(known).iterrows()}
    generator = np.random.default_rng(seed)
    rows = np.flatnonzero((totals(cells) >= _MIN_TRANSCRIPTS) & (first >= 0))
    rows = np.sort(generator.permutation(rows)[:_SEARCHED])
    free: list[Array] = []
    if len(rows) >= 2 * _MIN_CELLS and len(types) > 1:
        counts = sparse.csr_matrix(cells.X[rows], dtype=np.float64)
        half = generator.random(len(rows)) < 0.5
        tests = _KnownCells(reference, totals(cells), factors, generator)
        search = _Search(counts, first[rows], _starts(first[rows], score[rows]), half, tests)
        centres, fits = dict(types), counts @ np.log(fixed).T
        while len(free) < settings.unknown_types:
            profile = _next(search, fits, centres, settings.unknown_distance)
            if profile is None:
                break
            free.append(profile)
            centres[f"unknown {len(free)}"] = profile
            fits = np.column_stack([fits, counts @ np.log(profile)])
    member = _members(cells, fixed, free, rows)
    found = []
    for index, profile in enumerate(free):
        number = int((member == index).sum())
        if number >= _MIN_CELLS:  # later profiles may replace a mixture of several types that was found first
            found.append({**_describe(profile, types, cells), "cells": number})
            log.warning(
                "%d cells (%.1f %%) are of a type that the reference lacks; most similar: %s; genes: %s",
                number, 100 * number / len(member), found[-1]["near"], ", ".join(found[-1]["genes"]),
            )  # fmt: skip
    return UnknownTypes(member >= 0, found)


def _starts(first: NDArray[np.int8], score: Array) -> list[NDArray[np.bool_]]:
    """Masks (N,) of the cells of each type that are least like it."""
    masks = []
    for label in range(len(ST_TYPES)):
        own = (first == label) & np.isfinite(score)
        if own.sum() >= _MIN_CELLS:
            masks.append(own & (score <= np.percentile(score[own], _START_SHARE)))
    return masks


def _next(search: _Search, fits: Array, types: Mapping[str, Array], least: float) -> Array | None:
    """Of the free profiles (G,) beside fixed ones that count as another type the best one; None if there is none.

    `fits` (N, C) are log-likelihoods of the fixed profiles, `types` name -> profile those found so far and those of the
    reference. The distance from the most similar of these is the squared Hellinger distance, without the part that
    noise adds (an inner product between halves), relative to that between the most similar one and its own neighbour.
    """
    counts, starts = search.counts, search.starts
    candidates = [mixture for start in starts if (mixture := _mixture(counts, fits, start)).weights.sum() >= _MIN_CELLS]
    halves = [
        [_mixture(counts[part], fits[part], start[part]).profile for start in starts]
        for part in (search.half, ~search.half)
    ]
    for whole in sorted(candidates, key=lambda mixture: -mixture.fit):
        near = min(types, key=lambda name: _hellinger(whole.profile, types[name]))
        centre = types[near]
        one, two = (min(part, key=lambda profile: _hellinger(profile, whole.profile)) for part in halves)
        if _hellinger(one, two) > _REPEATABLE * _hellinger(whole.profile, centre):
            continue
        distance = float((np.sqrt(one) - np.sqrt(centre)) @ (np.sqrt(two) - np.sqrt(centre))) / 2
        distance /= min(_hellinger(centre, other) for name, other in types.items() if name != near)
        own = whole.weights[search.first == ST_TYPES.index(near)] if near in ST_TYPES else np.zeros(0)
        most = max(_MOST_KNOWN, (own > 0.5).mean() / _EXCESS if len(own) else 0.0)
        if distance >= least and search.tests.explained(near, whole.profile) <= most:
            return whole.profile
    return None


def _mixture(counts: sparse.csr_matrix, fits: Array, start: NDArray[np.bool_]) -> _Mixture:
    """Fit a free profile beside fixed ones whose log-likelihoods are `fits` (N, C), from the cells of `start`."""
    background = np.asarray(counts.sum(axis=0)).ravel() + 1
    background /= background.sum()
    weights = start.astype(np.float64)
    prior = np.append(np.full(fits.shape[1], 0.9 / fits.shape[1]), 0.1)
    profile, fit = background, -np.inf
    for _ in range(_STEPS):
        drawn = np.asarray(weights @ counts).ravel()
        profile = (1 - _SMOOTHING) * drawn / max(drawn.sum(), 1e-9) + _SMOOTHING * background
        posterior, total = _posterior(np.column_stack([fits, counts @ np.log(profile)]), prior)
        weights, fit = posterior[:, -1], float(total.sum())
        prior = posterior.mean(axis=0)
    return _Mixture(profile, weights, fit)


def _posterior(fits: Array, prior: Array) -> tuple[Array, Array]:
    """Posterior (N, C) and log-likelihood (N,) of cells in a mixture."""
    joint = fits + np.log(np.maximum(prior, 1e-5))
    total = logsumexp(joint, axis=1)
    return np.exp(joint - total[:, None]), total


def _members(cells: AnnData, fixed: Array, free: list[Array], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Free profile of each cell (N,), -1 for cells of the reference's types; the shares are fit on `rows`."""
    member = np.full(cells.n_obs, -1)
    if not free:
        return member
    logs = np.log(np.concatenate([fixed, np.stack(free)])).T
    fits = cells.X[rows] @ logs
    prior = np.full(logs.shape[1], 1 / logs.shape[1])
    for _ in range(_STEPS):
        prior = _posterior(fits, prior)[0].mean(axis=0)
    for begin in range(0, cells.n_obs, CHUNK_CELLS):
        chunk = slice(begin, begin + CHUNK_CELLS)
        posterior = _posterior(cells.X[chunk] @ logs, prior)[0][:, len(fixed) :]
        member[chunk] = np.where(posterior.sum(axis=1) >= _MIN_POSTERIOR, posterior.argmax(axis=1), -1)
    member[totals(cells) == 0] = -1
    return member


def _describe(profile: Array, types: Mapping[str, Array], cells: AnnData) -> dict[str, Any]:
    """Type of the reference that is most similar to a free profile, and the genes that tell it from all of them."""
    near = min(types, key=lambda name: _hellinger(profile, types[name]))
    neighbour = min(_hellinger(types[near], other) for name, other in types.items() if name != near)
    gain = profile * np.log(profile / np.max(list(types.values()), axis=0))
    genes = [str(cells.var_names[index]) for index in np.argsort(-gain)[:_GENES_SHOWN] if gain[index] > 0]
    return {"near": near, "distance": round(_hellinger(profile, types[near]) / neighbour, 3), "genes": genes}


def _smooth(share: Array) -> Array:
    """Profile that sums to 1 and has no zero."""
    share = share / share.sum()
    return (1 - _SMOOTHING) * share + _SMOOTHING / len(share)


def _hellinger(one: Array, other: Array) -> float:
    """Squared Hellinger distance of two profiles."""
    return float(1 - np.sqrt(one * other).sum())
