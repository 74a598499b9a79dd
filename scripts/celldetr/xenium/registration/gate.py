"""The quality gate: H&E nuclei lie on DAPI nuclei, over all regions and in each one, and closer than by chance."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import shapely
from scipy import ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import Floats, inverse
from celldetr.xenium.registration.field import DisplacementField
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
    to_um: Floats,
    he: Pyramid,
    nuclei: DapiNuclei,
    regions: list[Region],
    settings: RegistrationSettings,
    field: DisplacementField | None = None,
) -> Quality:
    """Judge a matrix (3, 3), H&E level-0 px -> um of the Xenium frame, with its field, in the regions of a sample."""
    to_px = inverse(to_um)
    margin = settings.control_shift + _MARGIN
    windows = [read_window(he, to_um, region, settings, margin, field) for region in regions]
    measured, parts = [], []
    for region, seen, blobs in zip(regions, windows, clear_blobs(windows), strict=True):
        distance = nuclei.tree.query(blobs)[0]
        chance = np.array([nuclei.tree.query(blobs + shift)[0] for shift in control_shifts(settings.control_shift)])
        contrast = _contrasts(region, seen, settings)
        figures = _figures(distance, chance, contrast, _MIN_NUCLEI)
        inner = inside(he, to_px, shapely.get_coordinates(shapely.centroid(region.outlines))).mean()
        x, y = region.centre.tolist()
        passed = not any(_too_far(figures, settings))
        where = {"x": x, "y": y, "cell": region.cell, "nuclei": len(region.outlines)}
        parts.append(RegionQuality(**where, inside=inner, passed=passed, **figures))
        measured.append((distance, chance, contrast))
    distance, chance, contrast = (np.concatenate(part, axis=-1) for part in zip(*measured, strict=True))
    # regions mostly outside of the H&E count in `inside` alone
    judged = [part.passed for part in parts if part.inside >= 0.5]
    figures = {
        **_figures(distance, chance, contrast, 1),
        "z": _z(contrast),
        "inside": float(inside(he, to_px, nuclei.centroids).mean()),
        "regions_passed": float(np.mean(judged)) if judged else 0.0,
    }
    failures = (*_too_far(figures, settings), *_failures(figures, settings))
    return Quality(passed=not failures, failures=failures, regions=tuple(parts), **figures)


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


def _figures(distance: Floats, chance: Floats, contrast: Floats, fewest: int) -> dict[str, Any]:
    """Figures of a region or of all; distances of fewer than `fewest` H&E nuclei are not judged."""
    enough = len(distance) >= fewest
    return {
        "distance": float(np.median(distance)) if enough else None,
        "chance": float(np.median(chance, axis=1).mean()) if enough else None,
        "contrast": float(contrast.mean()) if len(contrast) else None,
        "he_nuclei": len(distance),
    }


def _too_far(figures: Mapping[str, Any], settings: RegistrationSettings) -> Iterator[str]:
    distance, chance = figures["distance"], figures["chance"]
    if distance is None:
        yield "no H&E nuclei found under the sample's nuclei"
        return
    if distance > settings.max_distance:
        yield f"median distance {distance:.2f} um, expected {settings.max_distance:g} um or less (max_distance)"
    if distance > settings.max_chance * chance:
        yield (
            f"median distance {distance:.2f} um is {distance / chance:.2f} of the chance level ({chance:.2f} um), "
            f"expected {settings.max_chance:g} or less (max_chance)"
        )


def _failures(figures: Mapping[str, Any], settings: RegistrationSettings) -> Iterator[str]:
    contrast = figures["contrast"]
    if contrast is None or contrast < settings.min_contrast:
        value = "none" if contrast is None else f"{contrast:.2f}"
        yield f"hematoxylin contrast {value}, expected {settings.min_contrast:g} or more (min_contrast)"
    for figure, limit, what, key in (
        ("inside", settings.min_inside, "share of the nuclei inside the H&E", "min_inside"),
        ("regions_passed", settings.min_regions, "share of the regions that pass", "min_regions"),
    ):
        if figures[figure] < limit:
            yield f"{what} {figures[figure]:.0%}, expected {limit:.0%} or more ({key})"


def _z(values: Floats) -> float | None:
    """Mean over its standard error."""
    if len(values) < 2 or values.std() == 0:
        return None
    return float(values.mean() / (values.std(ddof=1) / np.sqrt(len(values))))
