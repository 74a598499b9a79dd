"""Types that the sample has and the reference lacks: profiles that explain cells better than any of the reference.

All cells are a mixture of the profiles of the reference's labels, each with and without transcripts of neighbours, and
of free profiles, which are found one by one. A free profile is

- noise if it does not come back from both halves of the cells;
- an adaptation of a type to the sample (a state, another donor or platform) if it is near the profile of this type: it
  joins the profiles of the reference, so that what differs more can be found beside it;
- another type if it is far from all of them and few of its cells are expected to be of known types. These are counted
  among held-out cells of the reference, mixed as the sample is.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import softmax

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.xenium.celltypes.mixture import Array, Cells, Mixture, fit_mixture, fit_shares, hellinger, smooth
from celldetr.xenium.celltypes.profiles import CHUNK_CELLS, known_part, label_profiles, thin, totals, type_profiles

log = logging.getLogger(__name__)

_SEARCHED = 20_000  # random cells among which free profiles are searched
_MIN_TRANSCRIPTS = 5  # of these cells
_MIN_CELLS = 20  # of a free profile, and of a type that is reported
_START_SHARES = (30, 10, 3)  # percent of a type's cells, those least like it, that free profiles start from
_START_CELLS = 10  # at least
_NEIGHBOURS = (0.0, 0.2)  # shares of a cell's transcripts that are of its neighbours
_REPEATABLE = 0.5  # largest distance of the profiles of both halves, relative to that from the most similar type
_MOST_KNOWN = 0.2  # largest share of the cells of another type that are expected to be of known types,
_MOST_LOST = 0.01  # and of all cells, on top of it
_TESTED = 300  # held-out cells per type, drawn with replacement
_CERTAIN = 0.5  # posterior from which on cells are counted to judge a profile,
_MIN_POSTERIOR = 0.1  # and from which on a cell loses its label
_GENES_SHOWN = 5


@dataclass(frozen=True)
class UnknownTypes:
    """Cells of types that the reference lacks."""

    cells: NDArray[np.bool_]  # (N,)
    found: list[dict[str, Any]]  # for people: near (most similar type), distance (from it), genes, cells (number)


@dataclass(frozen=True)
class _Candidate:
    """A free profile that comes back from both halves of the cells."""

    profile: Array  # (G,)
    near: str  # most similar type, of the reference or found before
    distance: float  # from it, as a share of that between this one and the type of the reference next to it
    seen: float  # share of the cells that are of the profile
    expected: float  # share of the cells that would be if the sample had known types alone


@dataclass(frozen=True)
class _Search:
    """Cells among which free profiles are searched, and known cells to compare them with."""

    counts: sparse.csr_matrix  # (N, G)
    starts: list[NDArray[np.bool_]]  # masks (N,) of cells that a free profile may start from
    half: NDArray[np.bool_]  # (N,)
    known: list[tuple[float, sparse.csr_matrix]]  # share of a type in the sample, counts of held-out cells of this type


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
    fixed = [smooth((1 - part) * own + part * background) for own in labels for part in _NEIGHBOURS]
    types = {str(name): smooth(share.to_numpy() * factors) for name, share in type_profiles(known).iterrows()}
    generator = np.random.default_rng(seed)
    rows = np.flatnonzero((totals(cells) >= _MIN_TRANSCRIPTS) & (first >= 0))
    rows = np.sort(generator.permutation(rows)[:_SEARCHED])
    free: list[_Candidate] = []
    if len(rows) >= 2 * _MIN_CELLS and len(types) > 1:
        counts = sparse.csr_matrix(cells.X[rows], dtype=np.float64)
        half = generator.random(len(rows)) < 0.5
        tests = [
            (
                float((first[rows] == ST_TYPES.index(name)).mean()),
                _held_out(reference, name, totals(cells), factors, generator),
            )
            for name in types
        ]
        search = _Search(counts, _starts(first[rows], score[rows]), half, tests)
        fixed, free = _free_profiles(search, fixed, types, settings)
    member = _members(cells, fixed, [one.profile for one in free], rows)
    found = []
    for index, one in enumerate(free):
        number = int((member == index).sum())
        if number >= _MIN_CELLS:  # later profiles may replace a mixture of several types that was found first
            found.append({**_describe(one, types, cells), "cells": number})
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
    """Masks (N,) of the cells of each type that are least like it; a rare type is alone in the smallest of them."""
    masks = []
    for label in range(len(ST_TYPES)):
        own = (first == label) & np.isfinite(score)
        for share in _START_SHARES:
            if own.sum() * share >= 100 * _START_CELLS:
                masks.append(own & (score <= np.percentile(score[own], share)))
    return masks


def _free_profiles(
    search: _Search, fixed: list[Array], types: Mapping[str, Array], settings: CellTypeSettings
) -> tuple[list[Array], list[_Candidate]]:
    """Profiles (G,) of the reference, with those of its types as the sample has them, and types that it lacks."""
    adapted: dict[str, Array] = {}
    free: dict[str, _Candidate] = {}
    while len(free) < settings.unknown_types:
        others = {name: one.profile for name, one in free.items()}
        candidates = _candidates(search, [*fixed, *adapted.values(), *others.values()], types, others)
        far = [one for one in candidates if one.distance >= settings.unknown_distance]
        lacking = [one for one in far if one.expected <= _MOST_KNOWN * one.seen + _MOST_LOST]
        near = [one for one in candidates if one.distance < settings.unknown_distance and one.near in types]
        near = [one for one in near if one.near not in adapted]
        if lacking:
            free[f"unknown {len(free) + 1}"] = max(lacking, key=lambda one: one.seen - one.expected)
        elif near:
            best = max(near, key=lambda one: one.seen)
            adapted[best.near] = best.profile
        else:
            break
    return [*fixed, *adapted.values()], list(free.values())


def _candidates(
    search: _Search, profiles: list[Array], types: Mapping[str, Array], free: Mapping[str, Array]
) -> list[_Candidate]:
    """Free profiles beside those so far; `types` are those of the reference, `free` the others found so far.

    Distances are squared Hellinger distances; that from the most similar type is without the part that noise adds (an
    inner product between halves).
    """
    found = []
    centres = {**types, **free}
    shares = fit_shares(search.counts @ np.log(profiles).T)
    cells = Cells(search.counts, profiles, shares)
    parts = [Cells(search.counts[mask], profiles, shares) for mask in (search.half, ~search.half)]
    known = [(share, Cells(counts, profiles, shares)) for share, counts in search.known]
    halves = [
        [fit_mixture(part, start[mask]) for start in search.starts]
        for part, mask in zip(parts, (search.half, ~search.half), strict=True)
    ]
    for whole in (fit_mixture(cells, start) for start in search.starts):
        near = min(centres, key=lambda name: hellinger(whole.profile, centres[name]))
        centre = centres[near]
        one, two = (min(part, key=lambda mixture: hellinger(mixture.profile, whole.profile)) for part in halves)
        seen = (_share(parts[1], one) + _share(parts[0], two)) / 2
        noise = hellinger(one.profile, two.profile)
        if seen * len(search.half) < _MIN_CELLS or noise > _REPEATABLE * hellinger(whole.profile, centre):
            continue
        distance = float((np.sqrt(one.profile) - np.sqrt(centre)) @ (np.sqrt(two.profile) - np.sqrt(centre))) / 2
        distance /= min(hellinger(centre, other) for name, other in types.items() if name != near)
        expected = sum(share * (_share(held, one) + _share(held, two)) / 2 for share, held in known)
        found.append(_Candidate(whole.profile, near, distance, seen, expected))
    return found


def _share(cells: Cells, mixture: Mixture) -> float:
    """Share of cells that are of the free profile of a mixture."""
    return float((cells.posterior(mixture) >= _CERTAIN).mean())


def _members(cells: AnnData, fixed: list[Array], free: list[Array], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Free profile of each cell (N,), -1 for cells of the reference's types; the shares are fit on `rows`."""
    member = np.full(cells.n_obs, -1)
    if not free:
        return member
    logs = np.log([*fixed, *free]).T
    shares = np.maximum(fit_shares(cells.X[rows] @ logs), 1e-5)
    for begin in range(0, cells.n_obs, CHUNK_CELLS):
        chunk = slice(begin, begin + CHUNK_CELLS)
        weights = softmax(cells.X[chunk] @ logs + np.log(shares), axis=1)[:, len(fixed) :]
        member[chunk] = np.where(weights.sum(axis=1) >= _MIN_POSTERIOR, weights.argmax(axis=1), -1)
    member[totals(cells) == 0] = -1
    return member


def _describe(found: _Candidate, types: Mapping[str, Array], cells: AnnData) -> dict[str, Any]:
    """Tell the most similar type of a profile, its distance, and genes that tell it from all types."""
    near = min(types, key=lambda name: hellinger(found.profile, types[name]))
    distance = found.distance  # measured without noise, if from a type of the reference
    if near != found.near:
        neighbour = min(hellinger(types[near], other) for name, other in types.items() if name != near)
        distance = hellinger(found.profile, types[near]) / neighbour
    gain = found.profile * np.log(found.profile / np.max(list(types.values()), axis=0))
    genes = [str(cells.var_names[index]) for index in np.argsort(-gain)[:_GENES_SHOWN] if gain[index] > 0]
    return {"near": near, "distance": round(distance, 3), "genes": genes}
