"""The registration of a sample: matrix, figures of the gate, and the file registration.json."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from celldetr.config.base import Settings
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import write_json
from celldetr.xenium.registration.affine import Floats, as_matrix, decompose, inverse, scaling
from celldetr.xenium.registration.distortion import Distortion
from celldetr.xenium.registration.field import DisplacementField

_FORMAT = "celldetr registration 2"
Origin = Literal["file", "file, refined", "file, repaired", "file, repaired and refined", "estimated"]
Matrix = Annotated[
    Floats, BeforeValidator(as_matrix), PlainSerializer(lambda matrix: matrix.tolist(), return_type=list)
]


class _Figures(Settings):
    passed: bool
    distance: float | None = Field(
        description="Median distance between H&E and DAPI nuclei that are each other's nearest, um"
    )
    chance: float | None = Field(description="The same after shifts of the H&E nuclei in 8 directions, um")
    contrast: float | None = Field(description="Hematoxylin inside nuclei minus that at shifted positions, deviations")
    inside: float = Field(description="Share of the DAPI nuclei that lie inside the H&E image")
    he_nuclei: int = Field(description="H&E nuclei found in the window, or in all windows")


class RegionQuality(_Figures):
    """Figures of one region."""

    x: float = Field(description="Centre in the Xenium frame, um")
    y: float = Field(description="Centre in the Xenium frame, um")
    cell: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1, um: the area that it stands for")
    nuclei: int = Field(description="DAPI nuclei in the window")

    @property
    def judged(self) -> bool:
        """Whether both images show nuclei there, so that the region counts in `regions_passed`."""
        return self.inside >= 0.5 and self.distance is not None


class Quality(_Figures):
    """Figures of a check over all regions, and its verdict."""

    failures: tuple[str, ...] = Field(description="Figures that miss their limit, each with the limit")
    z: float | None = Field(description="Mean contrast over its standard error")
    regions_passed: float = Field(description="Share that passes, of the regions where both images show nuclei")
    regions: tuple[RegionQuality, ...]

    def summary(self) -> str:
        """Figures in one line."""
        judged = sum(region.judged for region in self.regions)
        return (
            f"median distance {_text(self.distance)} um (chance {_text(self.chance)} um), contrast "
            f"{_text(self.contrast)} (z {_text(self.z, 0)}), {self.inside:.0%} of the nuclei inside the H&E, "
            f"{self.regions_passed:.0%} of {judged} regions pass"
            + (f" ({len(self.regions) - judged} more lack nuclei in one image)" if judged < len(self.regions) else "")
        )


class Attempt(Settings):
    """One matrix that was checked; its name begins with its origin."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    matrix: Matrix
    quality: Quality
    field: str | None = Field(None, description="Digest of the displacement field that was checked with the matrix")


class Keypoints(Settings):
    """Fit of the keypoints of an alignment file."""

    number: int
    median: float = Field(description="Median distance to the fit, um")
    worst: float = Field(description="Largest distance to the fit, um")


class Registration(Settings):
    """Position of a sample's H&E on its Xenium image."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)

    matrix: Matrix = Field(description="(3, 3), H&E level-0 px (x, y, 1) -> Xenium px")
    pixel_size: float = Field(gt=0, description="um per Xenium px")
    origin: Origin = Field(description="Source of the matrix; repaired: a mistake of the file was undone")
    quality: Quality
    quality_before: Quality | None = Field(None, description="Quality of the file's matrix; None without a file")
    keypoints: Keypoints | None = Field(None, description="None if the file holds a matrix")
    attempts: tuple[Attempt, ...] = Field((), description="All matrices that were checked")
    warnings: tuple[str, ...] = Field((), description="Messages for the user")
    distortion: Distortion | None = Field(None, description="Local distortion; None if it was not examined")
    field: DisplacementField | None = Field(None, description="Displacements of nuclei; None if the affine is enough")

    @property
    def he_mpp(self) -> float:
        """Size of an H&E level-0 pixel by the matrix, um."""
        return decompose(self.matrix).scale * self.pixel_size

    def he_to_um(self) -> Floats:
        """Matrix (3, 3) from H&E level-0 px to um of the Xenium frame."""
        return scaling(self.pixel_size) @ self.matrix

    def um_to_he(self) -> Floats:
        """Matrix (3, 3) from um of the Xenium frame to H&E level-0 px."""
        return inverse(self.he_to_um())

    def on_affine(self, points: NDArray[np.floating]) -> NDArray[np.floating]:
        """Points (n, 2), um of the Xenium frame, moved to where the matrix alone puts what the H&E shows there."""
        return points if self.field is None else self.field.move(points)

    def failed(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Whether points (n, 2), um of the Xenium frame, lie in regions that do not pass."""
        cells = np.array([region.cell for region in self.quality.regions if not region.passed]).reshape(-1, 4)
        inside = np.all((points[:, None] >= cells[:, :2]) & (points[:, None] < cells[:, 2:]), axis=2)
        return np.asarray(np.any(inside, axis=1))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the meaning and the parts of the matrix for readers of the file."""
        return {
            "format": _FORMAT,
            "direction": "H&E level-0 pixel (x, y, 1) -> Xenium pixel; field: Xenium um -> um of the matrix",
            "units": "px; um = Xenium pixel * pixel_size",
            **super().to_dict(),
            "he_mpp": self.he_mpp,
            "parts": asdict(decompose(self.matrix)),
        }

    def write(self, path: str | os.PathLike[str], sample: str) -> None:
        """Write registration.json of a sample."""
        write_json(path, {"sample": sample, **self.to_dict()})


def read_registration(path: str | os.PathLike[str], sample: str) -> Registration:
    """Read a file of `Registration.write`.

    Raises InputError if it holds none, or one of another sample, or one that did not pass, or a matrix that the figures
    in the file contradict.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = Registration.model_validate(content)
        problem = next(_contradictions(found, content, sample), None)
    except (OSError, ValueError, TypeError, AttributeError, InputError) as error:
        text = str(error)
        if isinstance(error, ValidationError):
            text = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InputError(f"{path}: got no readable registration ({text}); run the registration again") from error
    if problem:
        raise InputError(
            f"{path}: got a registration {problem}; run it again, and give a matrix of your own as alignment file"
        )
    return found


def _contradictions(found: Registration, content: Mapping[str, Any], sample: str) -> Iterator[str]:
    """Reasons not to use a registration: it is of another sample, did not pass, or parts of the file disagree."""
    quality = found.quality
    if (version := content.get("format")) != _FORMAT:
        yield f"of format {version!r}, expected {_FORMAT!r}"
    if (name := content.get("sample")) != sample:
        yield f"of sample {name!r}, expected that of {sample!r}"
    if not quality.passed or quality.failures:
        yield f"that does not pass ({'; '.join(quality.failures) or quality.summary()})"
    judged = [region.passed for region in quality.regions if region.judged]
    written = {**content.get("parts", {}), "he_mpp": content.get("he_mpp"), "regions_passed": quality.regions_passed}
    computed = {
        **asdict(decompose(found.matrix)),
        "he_mpp": found.he_mpp,
        "regions_passed": sum(judged) / max(len(judged), 1),
    }
    for key, value in computed.items():
        if not np.isclose(value, written.get(key) or 0, rtol=1e-6, atol=1e-9):
            yield f"whose {key} is {written.get(key)}, while its matrix and regions give {value:.6g}"
    same = [item for item in found.attempts if item.quality == quality and np.allclose(item.matrix, found.matrix)]
    digest = found.field.digest if found.field else None
    if not same:
        yield "whose matrix and figures are those of none of its attempts"
    elif all(item.field != digest for item in same):
        wanted = ", ".join(str(item.field) for item in same)
        yield f"with the displacement field {digest}, while its figures are those of {wanted}"


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
