"""The registration of a sample: the matrix, what was checked, and its file.

Reading it needs numpy and pydantic alone.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from celldetr.config.base import Settings
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.xenium.registration.transform import as_matrix, decompose, inverse, scaling

Origin = Literal["file", "file, refined", "estimated"]
Direction = Literal["H&E level-0 pixel (x, y, 1) -> Xenium pixel"]
Units = Literal["px; um = Xenium pixel * pixel_size"]


def _matrix(values: object) -> NDArray[np.float64]:
    try:
        return as_matrix(values, "matrix")  # type: ignore[arg-type]
    except (InputError, TypeError) as error:
        raise ValueError(str(error)) from error


Matrix = Annotated[
    NDArray[np.float64], BeforeValidator(_matrix), PlainSerializer(lambda matrix: matrix.tolist(), return_type=list)
]


class RegionQuality(Settings):
    """Figures of one region."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    x: float = Field(description="Centre in the Xenium frame, um")
    y: float = Field(description="Centre in the Xenium frame, um")
    nuclei: int = Field(description="DAPI nuclei in the window")
    he_nuclei: int = Field(description="H&E nuclei found in the window")
    distance: float | None = Field(description="Median distance from an H&E nucleus to the nearest DAPI nucleus, um")
    chance: float | None = Field(description="The same with the H&E nuclei shifted, um; mean over 8 directions")
    contrast: float | None = Field(description="Hematoxylin inside nuclei minus that at shifted positions, deviations")
    inside: float = Field(description="Share of the window's DAPI nuclei that lie inside the H&E image")
    passed: bool


class Quality(Settings):
    """Figures of a check, over all regions, and its verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    passed: bool
    failures: tuple[str, ...] = Field(description="Each figure that is not as expected, with what was expected")
    distance: float | None = Field(description="Median distance from an H&E nucleus to the nearest DAPI nucleus, um")
    chance: float | None = Field(description="The same with the H&E nuclei shifted, um; mean over 8 directions")
    contrast: float | None = Field(description="Hematoxylin inside nuclei minus that at shifted positions, deviations")
    z: float | None = Field(description="That difference over its standard error, over nuclei")
    inside: float = Field(description="Share of the sample's nuclei that lie inside the H&E image")
    he_nuclei: int = Field(description="H&E nuclei found in all windows")
    regions_passed: float = Field(description="Share that passes on its own, of the regions inside the H&E image")
    regions: tuple[RegionQuality, ...]

    def summary(self) -> str:
        """Figures in a line."""
        return (
            f"median distance {_text(self.distance)} um (chance {_text(self.chance)} um), contrast "
            f"{_text(self.contrast)} (z {_text(self.z, 0)}), {self.inside:.0%} of the nuclei inside the H&E, "
            f"{self.regions_passed:.0%} of {len(self.regions)} regions pass"
        )


class Attempt(Settings):
    """One way that was tried to get the matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    matrix: Matrix
    quality: Quality


class Keypoints(Settings):
    """How well the keypoints of an alignment file agree with the affine that was fitted to them."""

    number: int
    median: float = Field(description="Median distance to the fit, um")
    worst: float = Field(description="Largest distance to the fit, um")


class Registration(Settings):
    """How the H&E of a sample lies on its Xenium image.

    Attributes
    ----------
    matrix
        (3, 3), H&E level-0 px (x, y, 1) -> Xenium px.
    pixel_size
        um per Xenium px.
    he_mpp
        um per H&E level-0 px that the matrix means.
    origin
        Where the matrix is from.
    quality
        Figures of the matrix.
    quality_before
        Figures of the file's matrix; None without a file.
    keypoints
        Fit of the keypoints; None when the file is a matrix.
    attempts
        All that was tried.
    warnings
        What a person should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    format: Literal["celldetr registration 1"] = "celldetr registration 1"
    direction: Direction = "H&E level-0 pixel (x, y, 1) -> Xenium pixel"
    units: Units = "px; um = Xenium pixel * pixel_size"
    matrix: Matrix
    pixel_size: float = Field(gt=0)
    he_mpp: float = Field(gt=0)
    origin: Origin
    quality: Quality
    quality_before: Quality | None = None
    keypoints: Keypoints | None = None
    attempts: tuple[Attempt, ...] = ()
    warnings: tuple[str, ...] = ()

    def he_to_um(self) -> NDArray[np.float64]:
        """Matrix (3, 3) from H&E level-0 px to um of the Xenium frame."""
        return scaling(self.pixel_size) @ self.matrix

    def um_to_he(self) -> NDArray[np.float64]:
        """Matrix (3, 3) from um of the Xenium frame to H&E level-0 px."""
        return inverse(self.he_to_um())

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the parts of the matrix for people."""
        parts = decompose(self.matrix)
        return super().to_dict() | {
            "parts": {
                "scale_x": parts.scale_x,
                "scale_y": parts.scale_y,
                "rotation_degrees": parts.rotation,
                "shear": parts.shear,
                "reflected": parts.reflected,
                "determinant": parts.determinant,
            }
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file."""
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def read_registration(path: str | os.PathLike[str]) -> Registration:
    """Read a registration.

    Raises
    ------
    InputError
        No such file, or it is not one that `Registration.write` wrote, or its parts contradict each other.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, expected an object")
        content.pop("parts", None)
        found = Registration.model_validate(content)
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no registration that can be read; run the registration again ({error})") from error
    effective = found.pixel_size * decompose(found.matrix).scale
    if abs(effective / found.he_mpp - 1) > 1e-3:
        raise InputError(
            f"{path}: got he_mpp {found.he_mpp:g}, expected {effective:g} from matrix and pixel_size; the file was "
            "edited: run the registration again"
        )
    return found


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
