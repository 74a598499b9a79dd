"""The quality gate: H&E and DAPI nuclei lie on each other, over all regions and in each one, closer than by chance."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import shapely
from scipy import ndimage
from scipy.spatial import cKDTree

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
_MIN_PAIRS = 8  # of nuclei in a region that can be judged
_MIN_Z = 8.0  # standard errors of the contrast; of a few dozen nuclei, right matrices reach 12, wrong ones 6


@dataclass(frozen=True)
class Pairs:
    """H&E and DAPI nuclei that are each other's nearest."""

    blobs: Floats  # (n, 2) all H&E nuclei of the windows, um
    distance: Floats  # (k,) um, of the pairs
    chance: Floats  # (m,) um, of the pairs after shifts of the H&E nuclei in 8 directions


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
    windows = read_windows(to_um, he, regions, settings, field)
    measured, parts = [], []
    for region, seen, pairs in zip(regions, windows, pair_nuclei(windows, nuclei, settings), strict=True):
        contrast = _contrasts(region, seen, settings)
        figures = _figures(pairs, contrast, _MIN_PAIRS)
        inner = inside(he, to_px, shapely.get_coordinates(shapely.centroid(region.outlines))).mean()
        x, y = region.centre.tolist()
        passed = not any(_too_far(figures, settings))
        where = {"x": x, "y": y, "cell": region.cell, "nuclei": len(region.outlines)}
        parts.append(RegionQuality(**where, inside=inner, passed=passed, **figures))
        measured.append((*astuple(pairs), contrast))
    blobs, distance, chance, contrast = (np.concatenate(part) for part in zip(*measured, strict=True))
    judged = [part.passed for part in parts if part.judged]
    figures = {
        **_figures(Pairs(blobs, distance, chance), contrast, 1),
        "z": _z(contrast),
        "inside": float(inside(he, to_px, nuclei.centroids).mean()),
        "regions_passed": float(np.mean(judged)) if judged else 0.0,
    }
    shown = len(judged) / max(sum(part.inside >= 0.5 for part in parts), 1)
    failures = (*_too_far(figures, settings), *_failures({**figures, "judged": shown}, settings))
    return Quality(passed=not failures, failures=failures, regions=tuple(parts), **figures)


def read_windows(
    to_um: Floats,
    he: Pyramid,
    regions: list[Region],
    settings: RegistrationSettings,
    field: DisplacementField | None = None,
) -> list[StainWindow]:
    """Read the windows of all regions, with as much around each as the shifts need."""
    return [read_window(he, to_um, region, settings, settings.control_shift + _MARGIN, field) for region in regions]


def pair_nuclei(windows: list[StainWindow], nuclei: DapiNuclei, settings: RegistrationSettings) -> list[Pairs]:
    """Pair the nuclei of each window of `read_windows`.

    A nucleus that only one of both images shows (not segmented, too pale) is seldom the nearest of its nearest: what
    counts are nuclei that both show. Pairs farther apart than the shift do not count: one image shows nothing there.
    """
    reach = settings.control_shift
    shifts = control_shifts(reach)
    return [
        Pairs(
            blobs,
            _pair(blobs, around, nuclei, np.zeros(2), reach),
            np.concatenate([_pair(blobs, around, nuclei, shift, reach) for shift in shifts]),
        )
        for blobs, around in zip(clear_blobs(windows), clear_blobs(windows, margin=True), strict=True)
    ]


def _pair(blobs: Floats, around: Floats, nuclei: DapiNuclei, shift: Floats, reach: float) -> Floats:
    """Distances (k,) of the pairs of blobs (n, 2) that are shifted, as their neighbours `around` (m, 2) are."""
    if not len(blobs):
        return np.empty(0)
    distance, partner = nuclei.tree.query(blobs + shift)
    _, back = cKDTree(around).query(nuclei.centroids[partner] - shift)
    return np.asarray(distance[np.all(around[back] == blobs, axis=1) & (distance <= reach)])


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


def _figures(pairs: Pairs, contrast: Floats, fewest: int) -> dict[str, Any]:
    """Figures of a region or of all; distances of fewer than `fewest` pairs are not judged."""
    enough = len(pairs.distance) >= fewest and len(pairs.chance) > 0
    return {
        "distance": float(np.median(pairs.distance)) if enough else None,
        "chance": float(np.median(pairs.chance)) if enough else None,
        "contrast": float(contrast.mean()) if len(contrast) else None,
        "he_nuclei": len(pairs.blobs),
    }


def _too_far(figures: Mapping[str, Any], settings: RegistrationSettings) -> Iterator[str]:
    distance, chance = figures["distance"], figures["chance"]
    if distance is None:
        yield "no H&E nuclei found near the sample's nuclei"
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
    elif (figures["z"] or 0) < _MIN_Z:
        yield f"hematoxylin contrast of {figures['z'] or 0:.1f} standard errors, expected {_MIN_Z:g} or more"
    for figure, limit, what, key in (
        ("inside", settings.min_inside, "share of the nuclei inside the H&E", "min_inside"),
        ("judged", settings.min_inside, "share of the regions where both images show nuclei", "min_inside"),
        ("regions_passed", settings.min_regions, "share of the regions that pass", "min_regions"),
    ):
        if figures[figure] < limit:
            yield f"{what} {figures[figure]:.0%}, expected {limit:.0%} or more ({key})"


def _z(values: Floats) -> float | None:
    """Mean over its standard error."""
    if len(values) < 2 or values.std() == 0:
        return None
    return float(values.mean() / (values.std(ddof=1) / np.sqrt(len(values))))
