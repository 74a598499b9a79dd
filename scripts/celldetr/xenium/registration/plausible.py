"""What a matrix tells without the images: direction, units, order of the axes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.config.xenium import RegistrationSettings
from celldetr.xenium.registration.transform import apply, decompose, inverse, scaling

_SWAP = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
_ODD_SHEAR, _WRONG_SHEAR = 0.03, 0.2
_LITTLE_OVERLAP, _MUCH_OVERLAP = 0.3, 0.5


@dataclass(frozen=True)
class Mistake:
    """A likely mistake in a file: what it holds instead, and the matrix (3, 3) with the mistake undone."""

    what: str
    corrected: NDArray[np.float64]


@dataclass(frozen=True)
class Plausibility:
    """What can be said of a matrix without looking at the images.

    Attributes
    ----------
    problems
        Why it cannot be right; empty when it can.
    notes
        What is unusual.
    mistakes
        Mistakes that would explain the problems; also those that nothing but the images can tell.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    mistakes: tuple[Mistake, ...]


def check_plausible(
    matrix: NDArray[np.float64],
    he_mpp: float | None,
    pixel_size: float,
    settings: RegistrationSettings,
    he_size: tuple[int, int] | None = None,
    xenium_size: tuple[int, int] | None = None,
) -> Plausibility:
    """Judge a matrix by its scale, its shape, and where it puts the H&E.

    Parameters
    ----------
    matrix
        (3, 3), said to be H&E level-0 px -> Xenium px.
    he_mpp
        um per H&E px, if known.
    pixel_size
        um per Xenium px.
    settings
        Tolerances.
    he_size, xenium_size
        Width and height of the images, px.
    """
    problems = list(_problems(matrix, he_mpp, pixel_size, settings))
    overlap = _overlap(matrix, he_size, xenium_size)
    if not problems and overlap is not None and overlap < _LITTLE_OVERLAP:
        problems.append(f"it puts the H&E beside the Xenium image: they share {overlap:.0%} of the smaller one")
    parts = decompose(matrix)
    notes = []
    if parts.reflected:
        notes.append("the H&E is mirrored against the Xenium image (the section may have been turned over)")
    if abs(parts.shear) > _ODD_SHEAR:
        notes.append(f"shear of {parts.shear:.3f}")
    mistakes = []
    for mistake in _mistakes(matrix, he_mpp, pixel_size):
        share = _overlap(mistake.corrected, he_size, xenium_size)
        if (share is None or share >= _MUCH_OVERLAP) and not any(
            _problems(mistake.corrected, he_mpp, pixel_size, settings)
        ):
            mistakes.append(mistake)
    return Plausibility(tuple(problems), tuple(notes), tuple(mistakes))


def _problems(
    matrix: NDArray[np.float64], he_mpp: float | None, pixel_size: float, settings: RegistrationSettings
) -> Iterator[str]:
    parts = decompose(matrix)
    low, high = settings.scale_range
    if he_mpp is not None:
        low = high = he_mpp / pixel_size
    if not low * (1 - settings.scale_tolerance) <= parts.scale <= high * (1 + settings.scale_tolerance):
        expected = (
            f"{low:.4g} ({he_mpp:g} um per H&E px over {pixel_size:g} um per Xenium px)"
            if he_mpp is not None
            else f"{low:g} to {high:g} (scale_range; the size of an H&E pixel is unknown)"
        )
        yield f"scale {parts.scale:.4g} Xenium px per H&E px (determinant {parts.determinant:.4g}), expected {expected}"
    if abs(parts.shear) > _WRONG_SHEAR:
        yield f"shear {parts.shear:.3g}, expected less than {_WRONG_SHEAR:g}"
    ratio = parts.scale_x / parts.scale_y
    if not 0.9 < ratio < 1.1:
        yield f"scales {parts.scale_x:.4g} in x and {parts.scale_y:.4g} in y, expected about the same"


def _mistakes(matrix: NDArray[np.float64], he_mpp: float | None, pixel_size: float) -> Iterator[Mistake]:
    back = inverse(matrix)
    to_px = scaling(1 / pixel_size)
    yield Mistake("the inverse (Xenium px -> H&E px)", back)
    yield Mistake("x and y swapped", _SWAP @ matrix @ _SWAP)
    yield Mistake("x and y of the H&E swapped", matrix @ _SWAP)
    yield Mistake("x and y of the Xenium image swapped", _SWAP @ matrix)
    yield Mistake("um instead of Xenium px (H&E px -> um)", to_px @ matrix)
    yield Mistake("the inverse, and um instead of Xenium px (um -> H&E px)", to_px @ back)
    if he_mpp is not None:
        yield Mistake("um instead of H&E px (H&E um -> Xenium px)", matrix @ scaling(he_mpp))
        yield Mistake("um on both sides (H&E um -> Xenium um)", to_px @ matrix @ scaling(he_mpp))


def _overlap(
    matrix: NDArray[np.float64], he_size: tuple[int, int] | None, xenium_size: tuple[int, int] | None
) -> float | None:
    """Area that the two images share, over the smaller of their areas."""
    if he_size is None or xenium_size is None:
        return None
    width, height = he_size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    he, xenium = shapely.Polygon(apply(matrix, corners)), shapely.box(0, 0, *xenium_size)
    return float(he.intersection(xenium).area / min(he.area, xenium.area))
