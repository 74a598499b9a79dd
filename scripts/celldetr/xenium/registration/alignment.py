"""The alignment file of a sample (H&E px -> Xenium px): read it, judge it without the images, name likely mistakes."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import shapely

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.xenium.registration.affine import Floats, apply, as_matrix, decompose, fit_affine, inverse, scaling

KEYPOINTS = ("fixedX", "fixedY", "alignmentX", "alignmentY")
_FORMATS = (
    "expected a matrix of 3 rows of 3 numbers without header, or a table of keypoints with the header "
    f"{','.join(KEYPOINTS)}"
)
_SWAP = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
_UNUSUAL_SHEAR, _MAX_SHEAR = 0.03, 0.2
_MIN_OVERLAP, _CLEAR_OVERLAP = 0.3, 0.5


@dataclass(frozen=True)
class Alignment:
    """Content of an alignment file."""

    matrix: Floats  # (3, 3), H&E level-0 px -> Xenium px
    residuals: Floats  # (n,) distance of each keypoint to the fit, Xenium px; empty if the file holds a matrix
    keypoints: Floats = field(default_factory=lambda: np.empty((0, 4)))  # (n, 4) x, y: Xenium px, then H&E px
    name: str = "alignment file"  # for the user


def read_alignment(path: str | os.PathLike[str]) -> Alignment:
    """Read an alignment file: a 3 x 3 matrix without header, or a table of keypoints.

    Keypoints pair a point of the Xenium image (``fixedX``, ``fixedY``) with a point of the H&E (``alignmentX``,
    ``alignmentY``), px; the matrix is their least-squares fit. Raises InputError if the file has another format, fewer
    than 3 keypoints, or all of them on a line.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as handle:
            rows = [[cell.strip() for cell in row] for row in csv.reader(handle) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_FORMATS}") from error
    if not rows:
        raise InputError(f"{path}: got an empty file, {_FORMATS}")
    if set(KEYPOINTS) <= set(rows[0]):
        return _fit_keypoints(rows, path)
    if len(rows) != 3 or any(len(row) != 3 for row in rows):
        raise InputError(f"{path}: got {len(rows)} rows that begin with {','.join(rows[0])[:60]!r}, {_FORMATS}")
    return Alignment(as_matrix(_numbers(rows, path), str(path)), np.empty(0))


def _fit_keypoints(rows: Sequence[Sequence[str]], path: str | os.PathLike[str]) -> Alignment:
    columns = [rows[0].index(name) for name in KEYPOINTS]
    short = [number for number, row in enumerate(rows[1:], 2) if len(row) <= max(columns)]
    if short:
        raise InputError(f"{path}: row {short[0]} has too few columns, expected values of {', '.join(KEYPOINTS)}")
    points = _numbers([[row[column] for column in columns] for row in rows[1:]], path)
    if len(points) < 3:
        raise InputError(f"{path}: got {len(points)} keypoints, expected 3 or more; set more of them")
    fixed, moving = points[:, :2], points[:, 2:]
    for name, side in (("alignment", moving), ("fixed", fixed)):
        spread = np.linalg.svd(side - side.mean(axis=0), compute_uv=False)
        if spread[1] < 1e-3 * spread[0] or spread[0] == 0:
            raise InputError(f"{path}: the {name} keypoints lie on a line; expected points spread over the tissue")
    matrix = as_matrix(fit_affine(moving, fixed), str(path))
    return Alignment(matrix, np.linalg.norm(apply(matrix, moving) - fixed, axis=1), points)


def _numbers(rows: Sequence[Sequence[str]], path: str | os.PathLike[str]) -> Floats:
    try:
        values = np.array([[float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise InputError(f"{path}: {error}; {_FORMATS}") from error
    if not np.isfinite(values).all():
        raise InputError(f"{path}: got values that are not finite; {_FORMATS}")
    return values


@dataclass(frozen=True)
class Plausibility:
    """Judgement of a matrix without the images."""

    problems: list[str]  # reasons why the matrix cannot be right; empty if it can
    notes: list[str]  # unusual properties
    mistakes: dict[str, Floats]  # what the file may hold instead -> corrected matrix (3, 3), for the images to confirm


def check_plausible(
    matrix: Floats,
    he_mpp: float | None,
    pixel_size: float,
    settings: RegistrationSettings,
    he_size: tuple[int, int],
    xenium_size: tuple[int, int],
) -> Plausibility:
    """Judge a matrix (3, 3), H&E level-0 px -> Xenium px, by its scale, its shear, and the overlap of the two images.

    `he_mpp` may be None; the sizes are width and height in px.
    """
    problems = list(_problems(matrix, he_mpp, pixel_size, settings))
    overlap = _overlap(matrix, he_size, xenium_size)
    if not problems and overlap < _MIN_OVERLAP:
        problems.append(f"it puts the H&E beside the Xenium image: they share {overlap:.0%} of the smaller one")
    parts = decompose(matrix)
    notes = []
    if parts.reflected:
        notes.append("the H&E is mirrored against the Xenium image (the section may have been turned over)")
    if abs(parts.shear) > _UNUSUAL_SHEAR:
        notes.append(f"shear of {parts.shear:.3f}")
    mistakes = {
        what: corrected
        for what, corrected in _corrections(matrix, he_mpp, pixel_size).items()
        if _overlap(corrected, he_size, xenium_size) >= _CLEAR_OVERLAP
        and not any(_problems(corrected, he_mpp, pixel_size, settings))
    }
    return Plausibility(problems, notes, mistakes)


def _problems(matrix: Floats, he_mpp: float | None, pixel_size: float, settings: RegistrationSettings) -> Iterator[str]:
    parts = decompose(matrix)
    if he_mpp is None:
        low, high = settings.scale_range
        expected = f"{low:g} to {high:g} (scale_range; the size of an H&E pixel is unknown)"
    else:
        low = high = he_mpp / pixel_size
        expected = f"{low:.4g} ({he_mpp:g} um per H&E px over {pixel_size:g} um per Xenium px)"
    if not low * (1 - settings.scale_tolerance) <= parts.scale <= high * (1 + settings.scale_tolerance):
        yield f"scale {parts.scale:.4g} Xenium px per H&E px (determinant {parts.determinant:.4g}), expected {expected}"
    if abs(parts.shear) > _MAX_SHEAR:
        yield f"shear {parts.shear:.3g}, expected less than {_MAX_SHEAR:g}"
    ratio = parts.scale_x / parts.scale_y
    if not 0.9 < ratio < 1.1:
        yield f"scales {parts.scale_x:.4g} in x and {parts.scale_y:.4g} in y, expected about the same"


def _corrections(matrix: Floats, he_mpp: float | None, pixel_size: float) -> dict[str, Floats]:
    back = inverse(matrix)
    to_px = scaling(1 / pixel_size)
    corrections = {
        "the inverse (Xenium px -> H&E px)": back,
        "x and y swapped": _SWAP @ matrix @ _SWAP,
        "x and y of the H&E swapped": matrix @ _SWAP,
        "x and y of the Xenium image swapped": _SWAP @ matrix,
        "um instead of Xenium px (H&E px -> um)": to_px @ matrix,
        "the inverse, and um instead of Xenium px (um -> H&E px)": to_px @ back,
    }
    if he_mpp is not None:
        corrections["um instead of H&E px (H&E um -> Xenium px)"] = matrix @ scaling(he_mpp)
        corrections["um on both sides (H&E um -> Xenium um)"] = to_px @ matrix @ scaling(he_mpp)
    return corrections


def _overlap(matrix: Floats, he_size: tuple[int, int], xenium_size: tuple[int, int]) -> float:
    """Area that the two images share, over the smaller area."""
    he = shapely.transform(shapely.box(0, 0, *he_size), lambda corners: apply(matrix, corners))
    xenium = shapely.box(0, 0, *xenium_size)
    return float(he.intersection(xenium).area / min(he.area, xenium.area))
