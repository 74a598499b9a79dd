"""The matrix from the images: rotations over the full circle on coarse maps, then finer and finer ones."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from celldetr.config.xenium import RegistrationSettings
from celldetr.xenium.registration.maps import Candidate, MapPair, align, search
from celldetr.xenium.registration.transform import apply, rotation

_SCALE_STEP = 0.05  # relative step of the search for the scale
_CANDIDATES = 12  # that go on from the coarsest maps
_NEARBY = (-4.0, -2.0, 0.0, 2.0, 4.0)  # degrees around a given matrix


def estimate(
    maps: Sequence[MapPair], scales: Iterable[float], settings: RegistrationSettings, seed: int
) -> list[NDArray[np.float64]]:
    """Find the matrix without any hint.

    Parameters
    ----------
    maps
        From coarse to fine.
    scales
        Factors on the nominal size of an H&E pixel that are tried.
    settings
        Step of the rotation.
    seed
        See `align`.

    Returns
    -------
    list of NDArray
        Matrices (3, 3), H&E level-0 px -> um of the Xenium frame; the most trusted first, at most 3.
    """
    angles = np.arange(0, 360, settings.angle_step)
    linears = [scale * rotation(angle) @ np.diag([1, flip]) for scale in scales for flip in (1, -1) for angle in angles]
    return _polish(maps, _distinct(search(maps[0], linears), maps[0], _CANDIDATES), keep=3, seed=seed)


def estimate_nearby(maps: Sequence[MapPair], to_um: NDArray[np.float64], seed: int) -> list[NDArray[np.float64]]:
    """Find the matrix from one that is nearly right: off by a few degrees, or by any shift.

    Returns
    -------
    list of NDArray
        As `estimate`; at most 2.
    """
    linears = [rotation(angle) @ to_um[:2, :2] / maps[0].he_mpp for angle in _NEARBY]
    found = _distinct(search(maps[0], linears), maps[0], 4)
    return _polish(maps, [Candidate(to_um, 0.0), *found], keep=2, seed=seed)


def scales(low: float, high: float) -> NDArray[np.float64]:
    """Scales from one to another in equal ratios."""
    count = max(int(np.ceil(np.log(high / low) / _SCALE_STEP)), 1) + 1
    return np.geomspace(low, high, count)


def _distinct(found: Sequence[Candidate], maps: MapPair, count: int) -> list[Candidate]:
    """Keep the best candidates that put the corners of the H&E to different places."""
    height, width = maps.he.shape
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)]) * maps.spacing / maps.he_mpp
    kept: list[tuple[Candidate, NDArray[np.float64]]] = []
    for candidate in found:
        places = apply(candidate.to_um, corners)
        if all(np.linalg.norm(places - other, axis=1).mean() > 4 * maps.spacing for _, other in kept):
            kept.append((candidate, places))
        if len(kept) == count:
            break
    return [candidate for candidate, _ in kept]


def _polish(maps: Sequence[MapPair], found: Sequence[Candidate], keep: int, seed: int) -> list[NDArray[np.float64]]:
    """Align candidates on finer and finer maps; fewer go on each time."""
    current = list(found)
    for depth, pair in enumerate(maps):
        reaches = (16, 8, 4) if depth == 0 else (8, 4)
        improved = []
        for candidate in current:
            for reach in reaches:
                candidate = align(pair, candidate.to_um, reach, seed)
            improved.append(candidate)
        improved.sort(key=lambda candidate: -candidate.score)
        current = improved[: max(keep, len(found) // 2 ** (depth + 1))]
    return [candidate.to_um for candidate in _distinct(current, maps[-1], keep)]
