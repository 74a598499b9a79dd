"""Affine matrices between H&E and Xenium coordinates: apply, invert, decompose, fit to point pairs.

A matrix is (3, 3) float64 and maps (x, y, 1); its last row is 0 0 1. Pixel x covers [x, x + 1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celldetr.runtime.errors import InputError

Floats = NDArray[np.float64]
_MAX_CHANGE = 0.15  # largest difference of an entry of the linear part from the identity, in a robust fit
_TRIPLES = 300  # sampled by a robust fit


@dataclass(frozen=True)
class Decomposition:
    """A linear map as rotation @ shear @ scales @ flip."""

    scale_x: float  # length of the mapped unit vector of x
    scale_y: float  # height of the mapped unit vector of y above it
    rotation_degrees: float  # from x to y, in (-180, 180]
    shear: float  # tangent of the angle by which right angles change
    reflected: bool  # the map mirrors the picture
    determinant: float  # area of the mapped unit square; negative if reflected

    @property
    def scale(self) -> float:
        """Square root of the area of the mapped unit square."""
        return float(np.sqrt(abs(self.determinant)))


def as_matrix(values: ArrayLike, where: str = "matrix") -> Floats:
    """Check an affine matrix (3, 3); raises InputError if it is none, or has no inverse."""
    matrix = np.array(values, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise InputError(f"{where}: got {matrix.tolist()}, expected 3 x 3 finite numbers")
    if not np.allclose(matrix[2], (0, 0, 1), atol=1e-9):
        hint = "; the matrix looks transposed" if np.allclose(matrix[:, 2], (0, 0, 1), atol=1e-9) else ""
        raise InputError(f"{where}: got the last row {matrix[2].tolist()}, expected 0, 0, 1{hint}")
    size = np.abs(matrix[:2, :2]).max()
    if size == 0 or abs(np.linalg.det(matrix[:2, :2])) < 1e-6 * size**2:
        raise InputError(f"{where}: got a matrix that maps the image to a line; expected one with an inverse")
    return matrix


def apply(matrix: Floats, points: NDArray[np.floating]) -> Floats:
    """Map points (n, 2)."""
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2])


def inverse(matrix: Floats) -> Floats:
    """Inverse of a matrix (3, 3)."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def scaling(factor: float) -> Floats:
    """Matrix (3, 3) that scales x and y."""
    return np.diag([factor, factor, 1.0])


def affine(linear: ArrayLike, shift: ArrayLike = (0.0, 0.0)) -> Floats:
    """Matrix (3, 3) of a linear part (2, 2) and a shift (2,)."""
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def rotation(degrees: float) -> Floats:
    """Linear part (2, 2) of a rotation from x to y."""
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def decompose(matrix: Floats) -> Decomposition:
    """Decompose a matrix into rotation, shear, scales and flip of y."""
    linear = matrix[:2, :2].copy()
    determinant = float(np.linalg.det(linear))
    if determinant < 0:
        linear[:, 1] *= -1
    angle = float(np.degrees(np.arctan2(linear[1, 0], linear[0, 0])))
    upright = rotation(-angle) @ linear
    return Decomposition(
        scale_x=float(np.hypot(*linear[:, 0])),
        scale_y=float(upright[1, 1]),
        rotation_degrees=angle,
        shear=float(upright[0, 1] / upright[1, 1]),
        reflected=determinant < 0,
        determinant=determinant,
    )


def fit_affine(source: Floats, target: Floats, weights: Floats | None = None, *, stiffness: float = 0.0) -> Floats:
    """Fit the affine (3, 3) from source points (n, 2) to target points (n, 2) by weighted least squares.

    `stiffness` pulls the linear part to the identity (ridge penalty): its weight in pairs at the typical distance from
    the centre.
    """
    weights = np.ones(len(source)) if weights is None else weights
    centre = np.average(source, axis=0, weights=weights)
    spread = max(float(np.sqrt(np.average(((source - centre) ** 2).sum(axis=1), weights=weights))), 1e-9)
    root = np.sqrt(weights)[:, None]
    rows = np.column_stack([(source - centre) / spread, np.ones(len(source))]) * root
    moves = (target - source) / spread * root
    penalty = np.sqrt(stiffness) * np.eye(3)[:2]
    solution, *_ = np.linalg.lstsq(np.vstack([rows, penalty]), np.vstack([moves, np.zeros((2, 2))]), rcond=None)
    linear = np.eye(2) + solution[:2].T
    return affine(linear, centre + solution[2] * spread - linear @ centre)


def fit_robust(
    source: Floats, target: Floats, weights: Floats, tolerance: float, *, seed: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Fit an affine close to the identity to point pairs with many outliers, by random sample consensus (RANSAC).

    `source` and `target` are points (n, 2), n >= 1; `weights` (n,) is the trust in each pair; `tolerance` is the
    largest distance of an inlier, in the unit of the points. Returns the matrix (3, 3), source -> target, fitted to the
    inliers, and their mask (n,).
    """
    linears, shifts = _candidates(source, target, weights / weights.sum(), seed)
    off = np.einsum("tij,nj->tni", linears, source) + shifts[:, None] - target
    near = (off**2).sum(axis=2) < tolerance**2
    inliers = near[(near * weights).sum(axis=1).argmax()]
    for _ in range(5):
        matrix = fit_affine(source[inliers], target[inliers], weights[inliers], stiffness=0.3)
        closer = np.linalg.norm(apply(matrix, source) - target, axis=1) < tolerance
        if not closer.any() or np.array_equal(closer, inliers):
            break
        inliers = closer
    return matrix, inliers


def _candidates(source: Floats, target: Floats, chance: Floats, seed: int) -> tuple[Floats, Floats]:
    """Candidate linear parts (t, 2, 2) and shifts (t, 2): the shift of each pair, and affines of sampled triples."""
    linears, shifts = np.broadcast_to(np.eye(2), (len(source), 2, 2)), target - source
    if len(source) < 4:
        return linears, shifts
    rng = np.random.default_rng(seed)
    triples = rng.choice(len(source), size=(_TRIPLES, 3), p=chance)
    edges = [np.swapaxes(points[triples[:, 1:]] - points[triples[:, :1]], 1, 2) for points in (source, target)]
    area = np.abs(np.linalg.det(edges[0]))
    wide = area > 1e-3 * (edges[0] ** 2).sum(axis=(1, 2)) + 1e-9
    found = edges[1][wide] @ np.linalg.inv(edges[0][wide])
    first = triples[wide, 0]
    near = np.abs(found - np.eye(2)).max(axis=(1, 2)) <= _MAX_CHANGE
    found, first = found[near], first[near]
    moved = target[first] - np.einsum("tij,tj->ti", found, source[first])
    return np.concatenate([linears, found]), np.concatenate([shifts, moved])
