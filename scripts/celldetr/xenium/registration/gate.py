"""The quality gate: H&E nuclei lie on DAPI nuclei, over all regions and in each one, and closer than by chance."""

from collections.abc import Iterator

import numpy as np
import shapely
from scipy import ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import Floats, inverse
from celldetr.xenium.registration.maps import inside
from celldetr.xenium.registration.nuclei import (
    SPACING,
    DapiNuclei,
    Region,
    StainWindow,
    clear_blobs,
    draw_labels,
    read_window,
)
from celldetr.xenium.registration.result import Quality, RegionQuality

_MARGIN = 8.0  # um; half of a large nucleus
_MIN_NUCLEI = 8  # H&E nuclei in a region that can be judged


def control_shifts(length: float) -> Floats:
    """Shifts (8, 2) of a length in 8 directions, um."""
    angle = np.arange(8) * np.pi / 4
    return length * np.column_stack([np.cos(angle), np.sin(angle)])


def check(
    to_um: Floats, he: Pyramid, nuclei: DapiNuclei, regions: list[Region], settings: RegistrationSettings
) -> Quality:
    """Judge a matrix (3, 3), H&E level-0 px -> um of the Xenium frame, in the regions of a sample."""
    to_px = inverse(to_um)
    windows = [read_window(he, to_um, region, settings, settings.control_shift + _MARGIN) for region in regions]
    blobs = clear_blobs(windows)
    measured, parts = [], []
    for region, seen, points in zip(regions, windows, blobs, strict=True):
        distance, chance = _distances(points, nuclei, settings)
        contrast = _contrasts(region, seen, settings)
        share = float(inside(he, to_px, shapely.get_coordinates(shapely.centroid(region.outlines))).mean())
        parts.append(_region_quality(region, share, distance, chance, contrast, settings))
        measured.append((distance, chance, contrast))
    distance, chance, contrast = (np.concatenate(part, axis=-1) for part in zip(*measured, strict=True))
    # regions mostly outside of the H&E count in `inside` alone
    passed = [part.passed for part in parts if part.inside >= 0.5]
    figures = {
        "distance": _median(distance),
        "chance": _chance(chance),
        "contrast": _mean(contrast),
        "z": _z(contrast),
        "inside": float(inside(he, to_px, nuclei.centroids).mean()),
        "he_nuclei": sum(len(points) for points in blobs),
        "regions_passed": float(np.mean(passed)) if passed else 0.0,
    }
    failures = tuple(_failures(figures, settings))
    return Quality(passed=not failures, failures=failures, regions=tuple(parts), **figures)


def _distances(blobs: Floats, nuclei: DapiNuclei, settings: RegistrationSettings) -> tuple[Floats, Floats]:
    """Distances of blobs to the nearest nucleus: as they are (n,), and shifted in 8 directions (8, n)."""
    if not len(blobs):
        return np.empty(0), np.empty((8, 0))
    distance, _ = nuclei.tree.query(blobs)
    chance = [nuclei.tree.query(blobs + shift)[0] for shift in control_shifts(settings.control_shift)]
    return distance, np.array(chance)


def _contrasts(region: Region, seen: StainWindow, settings: RegistrationSettings) -> Floats:
    """Hematoxylin inside each nucleus minus the mean at its shifted positions, in deviations of the map (n,)."""
    labels = draw_labels(region.outlines, seen.grid)
    numbers = np.unique(labels[labels > 0])
    deviation = float(seen.stain.std())
    if not len(numbers) or deviation == 0:
        return np.empty(0)
    steps = np.round(control_shifts(settings.control_shift) / SPACING).astype(int)
    here = ndimage.mean(seen.stain, labels, numbers)
    there = [ndimage.mean(np.roll(seen.stain, (-y, -x), (0, 1)), labels, numbers) for x, y in steps]
    return np.asarray((here - np.mean(there, axis=0)) / deviation)


def _region_quality(
    region: Region, share: float, distance: Floats, chance: Floats, contrast: Floats, settings: RegistrationSettings
) -> RegionQuality:
    enough = len(distance) >= _MIN_NUCLEI
    median, expected = (_median(distance), _chance(chance)) if enough else (None, None)
    limit = min(settings.max_distance, settings.max_chance * expected) if expected is not None else 0.0
    passed = median is not None and median <= limit
    return RegionQuality(
        x=float(region.centre[0]),
        y=float(region.centre[1]),
        nuclei=len(region.outlines),
        he_nuclei=len(distance),
        distance=median,
        chance=expected,
        contrast=_mean(contrast),
        inside=share,
        passed=passed,
    )


def _failures(figures: dict[str, float | None], settings: RegistrationSettings) -> Iterator[str]:
    distance, chance, contrast = figures["distance"], figures["chance"], figures["contrast"]
    if distance is None or chance is None:
        yield "no H&E nuclei found under the sample's nuclei"
    else:
        if distance > settings.max_distance:
            yield f"median distance {distance:.2f} um, expected {settings.max_distance:g} um or less (max_distance)"
        if distance > settings.max_chance * chance:
            yield (
                f"median distance {distance:.2f} um is {distance / chance:.2f} of the chance level ({chance:.2f} um), "
                f"expected {settings.max_chance:g} or less (max_chance)"
            )
    if contrast is None or contrast < settings.min_contrast:
        value = "none" if contrast is None else f"{contrast:.2f}"
        yield f"hematoxylin contrast {value}, expected {settings.min_contrast:g} or more (min_contrast)"
    for figure, limit, what, key in (
        ("inside", settings.min_inside, "share of the nuclei inside the H&E", "min_inside"),
        ("regions_passed", settings.min_regions, "share of the regions that pass", "min_regions"),
    ):
        share = figures[figure]
        if share is None or share < limit:
            yield f"{what} {share:.0%}, expected {limit:.0%} or more ({key})"


def _median(values: Floats) -> float | None:
    return float(np.median(values)) if len(values) else None


def _chance(values: Floats) -> float | None:
    """Mean over the 8 shifts of the median distance."""
    return float(np.median(values, axis=1).mean()) if values.size else None


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _z(values: Floats) -> float | None:
    """Mean over its standard error."""
    if len(values) < 2 or values.std() == 0:
        return None
    return float(values.mean() / (values.std(ddof=1) / np.sqrt(len(values))))
