"""Affine matrices from H&E level-0 pixels to Xenium pixels: reading, fitting, taking apart, applying.

A matrix is (3, 3) float64 and maps (x, y, 1); its last row is 0 0 1. A pixel covers [x, x + 1).
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celldetr.runtime.errors import InputError

KEYPOINTS = ("fixedX", "fixedY", "alignmentX", "alignmentY")
_FORMATS = (
    "expected a matrix of 3 rows of 3 numbers without header, or a table of keypoints with the header "
    f"{','.join(KEYPOINTS)}"
)


@dataclass(frozen=True)
class Alignment:
    """What an alignment file holds.

    Attributes
    ----------
    matrix
        (3, 3), H&E level-0 px -> Xenium px.
    residuals
        (n,) distances of the keypoints to the fit, Xenium px; empty for a matrix.
    """

    matrix: NDArray[np.float64]
    residuals: NDArray[np.float64]


@dataclass(frozen=True)
class Decomposition:
    """A linear map as rotation, shear, scales and reflection.

    Attributes
    ----------
    scale_x, scale_y
        Lengths of the images of the unit vector of x, and of that of y at right angles to it.
    rotation
        From x to y, degrees in (-180, 180].
    shear
        Tangent of the angle by which right angles change.
    reflected
        Whether it turns the picture over.
    determinant
        Area of the unit square's image, negative when reflected.
    """

    scale_x: float
    scale_y: float
    rotation: float
    shear: float
    reflected: bool
    determinant: float

    @property
    def scale(self) -> float:
        """Square root of the area of the unit square's image."""
        return float(np.sqrt(abs(self.determinant)))


def as_matrix(values: ArrayLike, where: str = "matrix") -> NDArray[np.float64]:
    """Check an affine matrix (3, 3).

    Raises
    ------
    InputError
        Wrong shape, values that are not finite, another last row than 0 0 1, or no inverse.
    """
    matrix = np.array(values, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise InputError(f"{where}: got {matrix.tolist()}, expected 3 x 3 finite numbers")
    if not np.allclose(matrix[2], (0, 0, 1), atol=1e-9):
        hint = "; it looks transposed" if np.allclose(matrix[:, 2], (0, 0, 1), atol=1e-9) else ""
        raise InputError(f"{where}: got the last row {matrix[2].tolist()}, expected 0, 0, 1{hint}")
    size = np.abs(matrix[:2, :2]).max()
    if size == 0 or abs(np.linalg.det(matrix[:2, :2])) < 1e-6 * size**2:
        raise InputError(f"{where}: got a matrix that maps the image to a line; expected one with an inverse")
    return matrix


def read_alignment(path: str | os.PathLike[str]) -> Alignment:
    """Read an alignment file: a headerless 3 x 3 matrix, or keypoints that are fitted by least squares over all rows.

    Keypoints pair a place in the Xenium image (``fixedX``, ``fixedY``) with one in the H&E (``alignmentX``,
    ``alignmentY``), px.

    Raises
    ------
    InputError
        Neither of the two formats; fewer than 3 keypoints, or all on a line.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as handle:
            rows = [[cell.strip() for cell in row] for row in csv.reader(handle) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_FORMATS}") from error
    if not rows:
        raise InputError(f"{path}: got an empty file, {_FORMATS}")
    if set(KEYPOINTS) <= set(rows[0]):
        return _from_keypoints(rows, path)
    if len(rows) != 3 or any(len(row) != 3 for row in rows):
        raise InputError(f"{path}: got {len(rows)} rows that begin with {','.join(rows[0])[:60]!r}, {_FORMATS}")
    return Alignment(as_matrix(_numbers(rows, path), str(path)), np.empty(0))


def _from_keypoints(rows: Sequence[Sequence[str]], path: str | os.PathLike[str]) -> Alignment:
    columns = [rows[0].index(name) for name in KEYPOINTS]
    short = [number for number, row in enumerate(rows[1:], 2) if len(row) <= max(columns)]
    if short:
        raise InputError(f"{path}: row {short[0]} has too few columns, expected values of {', '.join(KEYPOINTS)}")
    points = _numbers([[row[column] for column in columns] for row in rows[1:]], path).reshape(-1, 4)
    fixed, moving = points[:, :2], points[:, 2:]
    if len(points) < 3:
        raise InputError(f"{path}: got {len(points)} keypoints, expected 3 or more; set more of them")
    for name, side in (("alignment", moving), ("fixed", fixed)):
        spread = np.linalg.svd(side - side.mean(axis=0), compute_uv=False)
        if spread[1] < 1e-3 * spread[0] or spread[0] == 0:
            raise InputError(f"{path}: the {name} keypoints lie on a line; expected points spread over the tissue")
    matrix = as_matrix(fit_affine(moving, fixed), str(path))
    return Alignment(matrix, np.linalg.norm(apply(matrix, moving) - fixed, axis=1))


def _numbers(rows: Sequence[Sequence[str]], path: str | os.PathLike[str]) -> NDArray[np.float64]:
    try:
        values = np.array([[float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise InputError(f"{path}: {error}; {_FORMATS}") from error
    if not np.isfinite(values).all():
        raise InputError(f"{path}: got values that are not finite; {_FORMATS}")
    return values


def apply(matrix: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Map points (n, 2)."""
    mapped: NDArray[np.float64] = points @ matrix[:2, :2].T + matrix[:2, 2]
    return mapped


def inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrix (3, 3) of the way back."""
    back: NDArray[np.float64] = np.asarray(np.linalg.inv(matrix), dtype=np.float64)
    return back


def scaling(factor: float) -> NDArray[np.float64]:
    """Matrix (3, 3) that scales x and y."""
    return np.diag([factor, factor, 1.0])


def affine(linear: ArrayLike, shift: ArrayLike = (0.0, 0.0)) -> NDArray[np.float64]:
    """Matrix (3, 3) of a linear part (2, 2) and a shift (2,)."""
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def rotation(degrees: float) -> NDArray[np.float64]:
    """Linear part (2, 2) of a rotation from x to y."""
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def decompose(matrix: NDArray[np.float64]) -> Decomposition:
    """Take a matrix apart: rotation after shear after scales after a flip of y, if it is reflected."""
    linear = matrix[:2, :2].copy()
    determinant = float(np.linalg.det(linear))
    if determinant < 0:
        linear[:, 1] *= -1
    scale_x = float(np.hypot(*linear[:, 0]))
    angle = float(np.degrees(np.arctan2(linear[1, 0], linear[0, 0])))
    upright = rotation(-angle) @ linear
    return Decomposition(
        scale_x=scale_x,
        scale_y=float(upright[1, 1]),
        rotation=angle,
        shear=float(upright[0, 1] / upright[1, 1]),
        reflected=determinant < 0,
        determinant=determinant,
    )


def fit_affine(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    stiffness: float = 0.0,
) -> NDArray[np.float64]:
    """Least-squares affine between points (n, 2).

    Parameters
    ----------
    source, target
        Points (n, 2).
    weights
        Weight of each pair (n,).
    stiffness
        Weight of the wish that the linear part is the identity, in pairs at the typical distance from the centre.

    Returns
    -------
    NDArray
        (3, 3), source -> target.
    """
    weights = np.ones(len(source)) if weights is None else weights
    centre = np.average(source, axis=0, weights=weights)
    spread = max(float(np.sqrt(np.average(((source - centre) ** 2).sum(axis=1), weights=weights))), 1e-9)
    root = np.sqrt(weights)[:, None]
    rows = np.column_stack([(source - centre) / spread, np.ones(len(source))]) * root
    moves = (target - source) / spread * root
    prior = np.sqrt(stiffness) * np.eye(3)[:2]
    solution, *_ = np.linalg.lstsq(np.vstack([rows, prior]), np.vstack([moves, np.zeros((2, 2))]), rcond=None)
    linear = np.eye(2) + solution[:2].T
    return affine(linear, centre + solution[2] * spread - linear @ centre)


def fit_robust(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    weights: NDArray[np.float64],
    tolerance: float,
    *,
    seed: int,
    max_change: float = 0.15,
    trials: int = 300,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Affine close to the identity between points of which many may be wrong (random sample consensus).

    Parameters
    ----------
    source, target
        Points (n, 2), n >= 1.
    weights
        Trust in each pair (n,).
    tolerance
        Distance up to which a pair agrees, in the unit of the points.
    seed
        Of the triples that are tried.
    max_change
        Largest entry by which the linear part may differ from the identity.
    trials
        Number of triples.

    Returns
    -------
    matrix
        (3, 3), source -> target, fitted to the pairs that agree.
    agree
        (n,) which ones these are.
    """
    linears, shifts = _trials(source, target, weights / weights.sum(), trials, max_change, seed)
    off = np.einsum("tij,nj->tni", linears, source) + shifts[:, None] - target
    near = (off**2).sum(axis=2) < tolerance**2
    agree = near[(near * weights).sum(axis=1).argmax()]
    for _ in range(5):
        matrix = fit_affine(source[agree], target[agree], weights[agree], stiffness=0.3)
        closer = np.linalg.norm(apply(matrix, source) - target, axis=1) < tolerance
        if not closer.any() or np.array_equal(closer, agree):
            break
        agree = closer
    return matrix, agree


def _trials(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    chance: NDArray[np.float64],
    trials: int,
    max_change: float,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Linear parts (t, 2, 2) and shifts (t, 2): the shift of each pair, and affines of triples of pairs."""
    linears, shifts = np.broadcast_to(np.eye(2), (len(source), 2, 2)), target - source
    if len(source) < 4:
        return linears, shifts
    rng = np.random.default_rng(seed)
    triples = rng.choice(len(source), size=(trials, 3), p=chance)
    edges = [np.swapaxes(points[triples[:, 1:]] - points[triples[:, :1]], 1, 2) for points in (source, target)]
    area = np.abs(np.linalg.det(edges[0]))
    wide = area > 1e-3 * (edges[0] ** 2).sum(axis=(1, 2)) + 1e-9
    found = edges[1][wide] @ np.linalg.inv(edges[0][wide])
    first = triples[wide, 0]
    near = np.abs(found - np.eye(2)).max(axis=(1, 2)) <= max_change
    found, first = found[near], first[near]
    moved = target[first] - np.einsum("tij,tj->ti", found, source[first])
    return np.concatenate([linears, found]), np.concatenate([shifts, moved])
