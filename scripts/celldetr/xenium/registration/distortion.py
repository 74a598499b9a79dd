"""Estimate the field of local displacements: shifts of windows first, then pairs of nuclei; kept only where it helps.

Pure functions of points; `measure.py` finds these in the images.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.spatial import cKDTree

from celldetr.config.base import Settings
from celldetr.xenium.registration.affine import Floats
from celldetr.xenium.registration.field import DisplacementField, FieldFit

_STIFFNESSES = (0.1, 0.5, 2.0)  # points per knot; what is best for nuclei that the fit does not see is taken
_WINDOW_WEIGHT = 8.0  # points that a window of full score stands for
_LEAST_SCORE = 0.1  # of a window
_NEIGHBOURS, _FEWEST = 130.0, 4  # um to the windows that must agree with one, and how many there must be
_AGREE = 3.0  # um between the shift of a window and the median of its neighbours
_MAX_DISTANCES = (6.0, 5.0, 4.0, *(3.5,) * 4)  # um between the nuclei of a pair, iteration by iteration
_SETTLED = 0.02  # um; a field that an iteration changes less is final
_MIN_PAIRS = 20
_FOLDS = 4  # parts of the H&E nuclei, each held out once
_MANY = 20_000  # H&E nuclei from which on one part tells the best stiffness
_FAR = 6.0  # um; a nucleus farther from all others has no partner
_SQUARE = 200.0  # um; side of the squares that are judged on their own
_MIN_JUDGED = 4  # held-out nuclei in a square that is judged
_CLEAR = 4.0  # standard errors by which the field must lower the distance
_MIN_GAIN = 0.03  # um by which it must


@dataclass(frozen=True)
class WindowShifts:
    """Where windows of the DAPI image lie in the H&E, seen through the affine."""

    centres: Floats  # (n, 2) um of the Xenium frame
    shifts: Floats  # (n, 2) um
    score: Floats  # (n,) 0 to 1


class Distortion(Settings):
    """Figures of the local distortion, from H&E nuclei that the fit did not see."""

    before: float = Field(description="Mean distance to the nearest DAPI nucleus by the affine, um (at most 6)")
    after: float = Field(description="The same with the field")
    z: float = Field(description="Mean fall of the distance over its standard error")
    squares: int = Field(description="Squares of 200 um that were judged")
    squares_helped: int = Field(description="Of these, where the field lowers the distance; elsewhere the affine stays")
    kept: bool = Field(description="The field is used")
    typical: float = Field(description="Median displacement of the DAPI nuclei, um")
    largest: float = Field(description="Largest displacement of a DAPI nucleus, um")

    def summary(self) -> str:
        """Figures in one line."""
        return (
            f"{'corrected' if self.kept else 'no field helps'}: displacements of {self.typical:.2f} um, at most "
            f"{self.largest:.2f}; held-out H&E nuclei {self.before:.2f} -> {self.after:.2f} um (z {self.z:.0f}); "
            f"helps in {self.squares_helped} of {self.squares} squares"
        )


def estimate_field(
    windows: WindowShifts, blobs: Floats, centroids: Floats, *, seed: int, workers: int = 1
) -> tuple[DisplacementField | None, Distortion | None]:
    """Estimate the field from H&E nuclei `blobs` (m, 2), seen through the affine, and DAPI nuclei (n, 2), both um.

    `workers` are threads. Returns the field, None if it does not help, and its figures, None if there are too few
    nuclei to tell.
    """
    if min(len(blobs), len(centroids)) < _MIN_PAIRS * _FOLDS:
        return None, None
    start = _coarse_field(windows)
    still = np.zeros(len(centroids), dtype=bool)
    before = _distances(None, blobs, centroids)
    place, owner = _squares(blobs, centroids)
    count = np.bincount(place, minlength=owner.max() + 1)
    fits = [FieldFit(centroids, stiffness) for stiffness in _STIFFNESSES]
    with ThreadPoolExecutor(workers) as pool:
        few = len(blobs) < _MANY
        tries = _held_out(start, blobs, centroids, fits, still, seed, _FOLDS if few else 1, pool)
        best = int(np.nanmean(tries, axis=1).argmin())
        fit = fits[best]
        after = tries[best] if few else _held_out(start, blobs, centroids, [fit], still, seed, _FOLDS, pool)[0]
        # the affine stays where the field does not help; the field must then still help as a whole
        gain = np.bincount(place, before - after, minlength=len(count)) / np.maximum(count, 1)
        judged, helped = count >= _MIN_JUDGED, gain > 0
        still = (judged & ~helped)[owner]
        # other parts than those that chose the squares
        (after,) = _held_out(start, blobs, centroids, [fit], still, seed + 1, _FOLDS, pool)
    field = _fine_field(start, blobs, centroids, fit, still)
    fall = before - after
    error = float(fall.std() / np.sqrt(len(fall)))
    z = float(fall.mean()) / error if error > 0 else 0.0
    kept = field is not None and z > _CLEAR and float(fall.mean()) > _MIN_GAIN
    size = np.linalg.norm(field.displacement(centroids), axis=1) if field is not None else np.zeros(1)
    figures = Distortion(
        before=float(before.mean()),
        after=float(after.mean()),
        z=z,
        squares=int(judged.sum()),
        squares_helped=int((judged & helped).sum()),
        kept=kept,
        typical=float(np.median(size)),
        largest=float(size.max()),
    )
    return (field if kept else None), figures


def _squares(blobs: Floats, centroids: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of the square of each blob (m,) and of each centroid (n,)."""
    both = np.vstack([blobs, centroids])
    cell = ((both - both.min(axis=0)) / _SQUARE).astype(np.int64)
    number = cell[:, 1] * (cell[:, 0].max() + 1) + cell[:, 0]
    return number[: len(blobs)], number[len(blobs) :]


def _coarse_field(windows: WindowShifts) -> DisplacementField | None:
    """Robust fit to the windows that most of their neighbours agree with; None if there are none."""
    good = np.flatnonzero(windows.score > _LEAST_SCORE)
    if not len(good):
        return None
    centres, shifts = windows.centres[good], windows.shifts[good]
    near = cKDTree(centres).query_ball_point(centres, _NEIGHBOURS)
    medians = np.array([np.median(shifts[others], axis=0) for others in near])
    agree = np.linalg.norm(shifts - medians, axis=1) < _AGREE
    agree &= np.array([len(others) >= _FEWEST for others in near])
    if not agree.any():
        return None
    centres, shifts, trust = centres[agree], shifts[agree], _WINDOW_WEIGHT * windows.score[good][agree]
    fit, weights = FieldFit(centres, _STIFFNESSES[-1]), trust
    for _ in range(5):
        field = fit.solve(np.arange(len(centres)), shifts, weights)
        off = np.linalg.norm(shifts - field.displacement(centres), axis=1)
        weights = trust * np.clip(1 - (off / _AGREE) ** 2, 0, 1) ** 2 + 1e-6  # Tukey's biweight
    return field


def _fine_field(
    start: DisplacementField | None, blobs: Floats, centroids: Floats, fit: FieldFit, still: NDArray[np.bool_]
) -> DisplacementField | None:
    """Fit to pairs of mutually nearest nuclei, and repeat; None if there are too few.

    `fit` is over the centroids; those that are to stay `still` (n,) have no displacement.
    """
    tree, field = cKDTree(blobs), start
    fixed = np.flatnonzero(still)
    for limit, last in zip(_MAX_DISTANCES, (np.inf, *_MAX_DISTANCES), strict=False):
        moved = centroids if field is None else field.move(centroids)
        distance, partner = tree.query(moved, distance_upper_bound=limit)
        near = np.flatnonzero(np.isfinite(distance))
        _, back = cKDTree(moved).query(blobs[partner[near]], distance_upper_bound=limit)
        mutual = near[(back == near) & ~still[near]]
        if len(mutual) < _MIN_PAIRS:
            return None
        weights = (1 - (distance[mutual] / limit) ** 2) ** 2 + 1e-6
        shifts = np.vstack([blobs[partner[mutual]] - centroids[mutual], np.zeros((len(fixed), 2))])
        before, field = field, fit.solve(np.append(mutual, fixed), shifts, np.append(weights, np.ones(len(fixed))))
        if before and limit == last and np.abs(field.coefficients - before.coefficients).max() < _SETTLED:
            break
    return field


def _held_out(
    start: DisplacementField | None,
    blobs: Floats,
    centroids: Floats,
    fits: Sequence[FieldFit],
    still: NDArray[np.bool_],
    seed: int,
    parts: int,
    pool: Executor,
) -> Floats:
    """Distances (fits, m) of the blobs to the nearest nucleus by fields that were fitted without them, um.

    Those of the first `parts` of `_FOLDS` parts of the blobs; NaN for the others.
    """
    fold = np.random.default_rng(seed).integers(0, _FOLDS, len(blobs))

    def measure(task: tuple[int, int]) -> Floats:
        place, number = task
        field = _fine_field(start, blobs[fold != number], centroids, fits[place], still)
        return _distances(field, blobs[fold == number], centroids)

    tasks = [(place, number) for place in range(len(fits)) for number in range(parts)]
    found = np.full((len(fits), len(blobs)), np.nan)
    for (place, number), distances in zip(tasks, pool.map(measure, tasks), strict=True):
        found[place, fold == number] = distances
    return found


def _distances(field: DisplacementField | None, blobs: Floats, centroids: Floats) -> Floats:
    """Distances (m,) of the blobs to the nearest nucleus, at most `_FAR` um."""
    moved = centroids if field is None else field.move(centroids)
    return np.asarray(np.minimum(cKDTree(moved).query(blobs)[0], _FAR))
