"""A smooth field of displacements: how a section was stretched locally between the Xenium run and its H&E image.

The field is a uniform cubic B-spline. It maps um of the Xenium frame to the um where the affine of the registration
puts what lies there: a nucleus at p is seen in the H&E at the inverse of the affine, applied to p + displacement(p).
"""

import hashlib
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from scipy import ndimage, sparse
from scipy.interpolate import BSpline
from scipy.sparse.linalg import cg

from celldetr.config.base import Settings
from celldetr.runtime.errors import InputError
from celldetr.xenium.registration.affine import Floats

KNOTS = 50.0  # um between knots: six for the shortest wave that is followed
_DIGITS = 3  # of a coefficient, um
_DECAY = 100.0  # um; length over which the field falls to nothing beside the nuclei
_LARGEST = 50.0  # um; of a coefficient in a file
_PRECISION = 1e-7  # relative residual of a fit; coefficients are then right to their last digit


def _as_coefficients(values: object) -> Floats:
    array = np.array(values, dtype=np.float64)
    if array.ndim != 3 or array.shape[0] != 2 or min(array.shape[1:]) < 4 or not np.isfinite(array).all():
        raise InputError(f"got coefficients of shape {array.shape}, expected finite ones (2, rows, columns), 4 or more")
    if np.abs(array).max() > _LARGEST:
        raise InputError(f"got a displacement of {np.abs(array).max():.0f} um, expected at most {_LARGEST:g}")
    return array


Coefficients = Annotated[
    Floats, BeforeValidator(_as_coefficients), PlainSerializer(lambda array: array.tolist(), return_type=list)
]


class DisplacementField(Settings):
    """Displacements, um, over the Xenium frame, um; constant beyond its knots."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    format: Literal["celldetr displacement field 1"] = "celldetr displacement field 1"
    x: float = Field(description="Position of the first knot, um")
    y: float = Field(description="Position of the first knot, um")
    spacing: float = Field(gt=0, description="Distance between knots, um")
    coefficients: Coefficients = Field(description="(2, rows, columns), of x and y; uniform cubic B-spline")

    @model_validator(mode="after")
    def _finite(self) -> Self:
        if not np.isfinite([self.x, self.y, self.spacing]).all():
            raise ValueError(f"x, y, spacing: got {self.x}, {self.y}, {self.spacing}, expected finite numbers")
        return self

    @property
    def digest(self) -> str:
        """Fingerprint of what the field does."""
        values = np.concatenate([[self.x, self.y, self.spacing], self.coefficients.shape, self.coefficients.ravel()])
        return hashlib.sha256(np.round(values, _DIGITS).astype("<f8").tobytes()).hexdigest()[:16]

    def displacement(self, points: NDArray[np.floating]) -> Floats:
        """Displacements (n, 2) at points (n, 2), um."""
        rows, columns = self.coefficients.shape[1:]
        across = np.clip((points[:, 0] - self.x) / self.spacing, 1, columns - 2)
        down = np.clip((points[:, 1] - self.y) / self.spacing, 1, rows - 2)
        # without the prefilter, a spline of scipy.ndimage is the sum of B-splines with these coefficients
        options = {"order": 3, "prefilter": False, "mode": "nearest"}
        return np.column_stack(
            [ndimage.map_coordinates(layer, [down, across], **options) for layer in self.coefficients]
        )

    def over(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Move the places in columns x (1, w) and rows y (h, 1), um; returns x and y, each (h, w)."""
        across, down = np.broadcast_arrays(x, y)
        moved = self.move(np.column_stack([across.ravel(), down.ravel()]))
        return moved[:, 0].reshape(across.shape), moved[:, 1].reshape(across.shape)

    def move(self, points: NDArray[np.floating]) -> Floats:
        """Add their displacement to points (n, 2), um."""
        return np.asarray(points + self.displacement(points))


class FieldFit:
    """Least squares of a field over points (n, 2), um: stiff (thin-plate energy), and nothing far from all points."""

    def __init__(self, points: Floats, stiffness: float, spacing: float = KNOTS) -> None:
        """`stiffness` is the weight of the bending energy, in points per knot."""
        low, high = points.min(axis=0) - 3 * spacing, points.max(axis=0) + 3 * spacing
        self.low, self.spacing = low, spacing
        self.columns, self.rows = (np.ceil((high - low) / spacing).astype(int) + 1).tolist()
        self.design = self._design(points)
        self.penalty = stiffness * (
            self._bending() + (spacing / _DECAY) ** 4 * sparse.eye_array(self.rows * self.columns)
        )

    def _design(self, points: Floats) -> sparse.csr_array:
        """B-splines (columns) at points (rows)."""
        parts = []
        for axis, count in enumerate((self.columns, self.rows)):
            at = np.clip((points[:, axis] - self.low[axis]) / self.spacing, 1, count - 2)
            found = BSpline.design_matrix(at, np.arange(-2.0, count + 2), 3)
            parts.append((found.indices.reshape(-1, 4), found.data.reshape(-1, 4)))
        (column, across), (row, down) = parts
        index = (row[:, :, None] * self.columns + column[:, None, :]).ravel()
        values = (down[:, :, None] * across[:, None, :]).ravel()
        start = np.arange(len(points) + 1) * 16
        return sparse.csr_array((values, index, start), shape=(len(points), self.rows * self.columns))

    def _bending(self) -> sparse.csr_array:
        """Thin-plate energy of the coefficients."""

        def steps(count: int, order: int) -> sparse.csr_array:
            return sparse.csr_array(np.diff(np.eye(count), n=order, axis=0))

        def square(rows: sparse.csr_array, columns: sparse.csr_array) -> sparse.csr_array:
            both = sparse.kron(rows, columns, format="csr")
            return both.T @ both

        whole_rows, whole_columns = sparse.eye_array(self.rows), sparse.eye_array(self.columns)
        return (
            square(steps(self.rows, 2), whole_columns)
            + square(whole_rows, steps(self.columns, 2))
            + 2 * square(steps(self.rows, 1), steps(self.columns, 1))
        )

    def solve(self, which: NDArray[np.integer], shifts: Floats, weights: Floats) -> DisplacementField:
        """Fit the field to shifts (m, 2), um, with weights (m,), of the points `which` (m,)."""
        rows = self.design[which]
        weighted = rows.T.multiply(weights).tocsr()
        matrix, right = (weighted @ rows + self.penalty).tocsr(), weighted @ shifts
        # conjugate gradients, since factors of the matrix of a large section take more time and memory
        diagonal = sparse.diags_array(1 / matrix.diagonal())
        solution = [cg(matrix, column, rtol=_PRECISION, M=diagonal)[0] for column in right.T]
        coefficients = np.round(np.reshape(solution, (2, self.rows, self.columns)), _DIGITS)
        return DisplacementField(
            x=float(self.low[0]), y=float(self.low[1]), spacing=self.spacing, coefficients=coefficients
        )
