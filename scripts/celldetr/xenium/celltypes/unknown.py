"""Types that the sample has and the reference lacks: profiles that explain cells better than any of the reference.

All cells are a mixture of the profiles of the reference's labels, which are fixed, each with and without transcripts of
neighbours, and of free profiles, which are found one by one by expectation maximisation (multinomial mixture). A free
profile counts as another type if it is far enough from the profile of the most similar type, and if few of its cells
are expected to be of known types. These are counted among held-out cells of the reference, mixed as the sample is, by
profiles of one half of the sample; the cells that it has, in the other half. What is noise, a state of a known type, or
a mixture with neighbours, takes about as many cells from both.
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
_NEIGHBOURS = (0.0, 0.3)  # shares of a cell's transcripts that are of its neighbours
_MOST_KNOWN = 0.3  # largest share of the cells of a free profile that are expected to be of known types
_MOST_LOST = 0.05  # largest share of the sample that these are
_TESTED = 300  # held-out cells per type, drawn with replacement
_MIN_POSTERIOR = 0.5  # from which on a cell counts as one of an unknown type
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
    prior: Array  # (C + 1,) shares of the fixed profiles and of this one


@dataclass(frozen=True)
class _Cells:
    """Cells and how the profiles so far explain them."""

    counts: sparse.csr_matrix  # (N, G)
    fits: Array  # (N, C) log-likelihoods

    def part(self, mask: NDArray[np.bool_]) -> "_Cells":
        return _Cells(self.counts[mask], self.fits[mask])

    def with_profile(self, profile: Array) -> "_Cells":
        return _Cells(self.counts, np.column_stack([self.fits, self.counts @ np.log(profile)]))

    def share(self, mixture: _Mixture) -> float:
        """Share of the cells that are of the free profile of a mixture, which other cells may have given."""
        posterior = _posterior(self.with_profile(mixture.profile).fits, mixture.prior)
        return float((posterior[:, -1] >= _MIN_POSTERIOR).mean())


@dataclass(frozen=True)
class _Search:
    """Cells among which free profiles are searched, and known cells to compare them with."""

    cells: _Cells
    starts: list[NDArray[np.bool_]]  # masks (N,) of cells that a free profile may start from
    half: NDArray[np.bool_]  # (N,)
    known: list[tuple[float, _Cells]]  # share of a type in the sample, held-out cells of this type

    def with_profile(self, profile: Array) -> "_Search":
        known = [(share, cells.with_profile(profile)) for share, cells in self.known]
        return _Search(self.cells.with_profile(profile), self.starts, self.half, known)


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
    background = np.asarray(cells.X.sum(axis=0), dtype=np.float64).ravel()
    background /= max(background.sum(), 1)
    labels = [share * factors / (share * factors).sum() for share in label_profiles(known).to_numpy()]
    fixed = np.stack([_smooth((1 - part) * own + part * background) for own in labels for part in _NEIGHBOURS])
    types = {str(name): _smooth(share.to_numpy() * factors) for name, share in type_profiles(known).iterrows()}
    generator = np.random.default_rng(seed)
    rows = np.flatnonzero((totals(cells) >= _MIN_TRANSCRIPTS) & (first >= 0))
    rows = np.sort(generator.permutation(rows)[:_SEARCHED])
    free: list[Array] = []
    if len(rows) >= 2 * _MIN_CELLS and len(types) > 1:
        counts = sparse.csr_matrix(cells.X[rows], dtype=np.float64)
        half = generator.random(len(rows)) < 0.5
        tests = []
        for name in types:
            held = _held_out(reference, name, totals(cells), factors, generator)
            tests.append((float((first[rows] == ST_TYPES.index(name)).mean()), _Cells(held, held @ np.log(fixed).T)))
        search = _Search(_Cells(counts, counts @ np.log(fixed).T), _starts(first[rows], score[rows]), half, tests)
        centres = dict(types)
        while len(free) < settings.unknown_types:
            profile = _next(search, centres, settings.unknown_distance)
            if profile is None:
                break
            free.append(profile)
            centres[f"unknown {len(free)}"] = profile
            search = search.with_profile(profile)
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


def _held_out(
    reference: AnnData, name: str, transcripts: Array, factors: Array, generator: np.random.Generator
) -> sparse.csr_matrix:
    """Draw counts of held-out cells of a type with replacement, thinned to the sample."""
    own = (reference.obs["type"] == name).to_numpy()
    held = own & reference.obs["held_out"].to_numpy(dtype=bool)
    rows = generator.choice(np.flatnonzero(held if held.any() else own), _TESTED)
    enough = transcripts[transcripts >= _MIN_TRANSCRIPTS]
    return thin(reference.X[rows], enough, generator, factors).astype(np.float64)


def _starts(first: NDArray[np.int8], score: Array) -> list[NDArray[np.bool_]]:
    """Masks (N,) of the cells of each type that are least like it."""
    masks = []
    for label in range(len(ST_TYPES)):
        own = (first == label) & np.isfinite(score)
        if own.sum() >= _MIN_CELLS:
            masks.append(own & (score <= np.percentile(score[own], _START_SHARE)))
    return masks


def _next(search: _Search, types: Mapping[str, Array], least: float) -> Array | None:
    """Of the free profiles (G,) beside those so far that count as another type the best one; None if there is none.

    `types` is name -> profile of the types of the reference and of those found so far. The distance from the most
    similar of these is the squared Hellinger distance, without the part that noise adds (an inner product between
    halves), relative to that between the most similar one and its own neighbour. The best one gains most cells.
    """
    found, most = None, 0.0
    parts = [search.cells.part(part) for part in (search.half, ~search.half)]
    halves = [
        [_mixture(cells, start[part]) for start in search.starts]
        for cells, part in zip(parts, (search.half, ~search.half), strict=True)
    ]
    for whole in (_mixture(search.cells, start) for start in search.starts):
        near = min(types, key=lambda name: _hellinger(whole.profile, types[name]))
        centre = types[near]
        one, two = (min(part, key=lambda mixture: _hellinger(mixture.profile, whole.profile)) for part in halves)
        distance = float((np.sqrt(one.profile) - np.sqrt(centre)) @ (np.sqrt(two.profile) - np.sqrt(centre))) / 2
        distance /= min(_hellinger(centre, other) for name, other in types.items() if name != near)
        seen = (parts[1].share(one) + parts[0].share(two)) / 2
        expected = sum(share * (cells.share(one) + cells.share(two)) / 2 for share, cells in search.known)
        if distance < least or expected > _MOST_LOST or seen * len(search.half) < _MIN_CELLS:
            continue
        if seen - expected / _MOST_KNOWN > most:
            found, most = whole.profile, seen - expected / _MOST_KNOWN
    return found


def _mixture(cells: _Cells, start: NDArray[np.bool_]) -> _Mixture:
    """Fit a free profile beside the profiles of the cells so far, from the cells of `start`."""
    background = np.asarray(cells.counts.sum(axis=0)).ravel() + 1
    background /= background.sum()
    weights, fixed = start.astype(np.float64), cells.fits.shape[1]
    prior, profile = np.append(np.full(fixed, 0.9 / fixed), 0.1), background
    for _ in range(_STEPS):
        drawn = np.asarray(weights @ cells.counts).ravel()
        profile = (1 - _SMOOTHING) * drawn / max(drawn.sum(), 1e-9) + _SMOOTHING * background
        posterior = _posterior(cells.with_profile(profile).fits, prior)
        weights, prior = posterior[:, -1], posterior.mean(axis=0)
    return _Mixture(profile, weights, prior)


def _posterior(fits: Array, prior: Array) -> Array:
    """Posterior (N, C) of cells in a mixture."""
    joint = fits + np.log(np.maximum(prior, 1e-5))
    return np.exp(joint - logsumexp(joint, axis=1)[:, None])


def _members(cells: AnnData, fixed: Array, free: list[Array], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Free profile of each cell (N,), -1 for cells of the reference's types; the shares are fit on `rows`."""
    member = np.full(cells.n_obs, -1)
    if not free:
        return member
    logs = np.log(np.concatenate([fixed, np.stack(free)])).T
    fits = cells.X[rows] @ logs
    prior = np.full(logs.shape[1], 1 / logs.shape[1])
    for _ in range(_STEPS):
        prior = _posterior(fits, prior).mean(axis=0)
    for begin in range(0, cells.n_obs, CHUNK_CELLS):
        chunk = slice(begin, begin + CHUNK_CELLS)
        posterior = _posterior(cells.X[chunk] @ logs, prior)[:, len(fixed) :]
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
