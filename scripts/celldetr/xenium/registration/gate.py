"""The quality gate: H&E nuclei lie on DAPI nuclei, over all and in each region, and more so than by chance."""

from collections.abc import Iterator

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.images import inside
from celldetr.xenium.registration.nuclei import SPACING, Look, Nuclei, Region, draw_labels, keep_clear, look
from celldetr.xenium.registration.result import Quality, RegionQuality
from celldetr.xenium.registration.transform import inverse

_LARGE = 8.0  # um; half of a large nucleus
_FEWEST = 8  # H&E nuclei of a region that can be judged


def directions(length: float) -> NDArray[np.float64]:
    """Shifts (8, 2) of a length, um."""
    angle = np.arange(8) * np.pi / 4
    return length * np.column_stack([np.cos(angle), np.sin(angle)])


def check(
    to_um: NDArray[np.float64], he: Pyramid, nuclei: Nuclei, regions: list[Region], settings: RegistrationSettings
) -> Quality:
    """Judge a matrix.

    Parameters
    ----------
    to_um
        (3, 3), H&E level-0 px -> um of the Xenium frame.
    he
        The H&E image.
    nuclei
        The sample's nuclei.
    regions
        Where to look.
    settings
        Limits of the gate.
    """
    to_px = inverse(to_um)
    within = float(inside(he, to_px, nuclei.centroids).mean())
    looks = [look(he, to_um, region, settings, settings.control_shift + _LARGE) for region in regions]
    blobs = keep_clear(looks)
    near, far, contrasts, parts = [], [], [], []
    for region, seen, points in zip(regions, looks, blobs, strict=True):
        distance, chance = _distances(points, nuclei, settings)
        difference = _contrasts(region, seen, settings)
        near.append(distance)
        far.append(chance)
        contrasts.append(difference)
        share = float(inside(he, to_px, shapely.get_coordinates(shapely.centroid(region.outlines))).mean())
        parts.append(_region(region, share, points, distance, chance, difference, settings))
    pooled = np.concatenate(contrasts)
    distances, chances = np.concatenate(near), np.concatenate(far, axis=1)
    figures = {
        "distance": _median(distances),
        "chance": float(np.median(chances, axis=1).mean()) if chances.size else None,
        "contrast": _mean(pooled),
        "z": _z(pooled),
        "inside": within,
        "he_nuclei": sum(len(points) for points in blobs),
        "regions_passed": _share_passed(parts),
    }
    failures = tuple(_failures(figures, settings))
    return Quality(passed=not failures, failures=failures, regions=tuple(parts), **figures)


def _distances(
    blobs: NDArray[np.float64], nuclei: Nuclei, settings: RegistrationSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances from blobs to nuclei: as they are (n,), and shifted in 8 directions (8, n)."""
    if not len(blobs):
        return np.empty(0), np.empty((8, 0))
    distance, _ = nuclei.tree.query(blobs)
    chance = [nuclei.tree.query(blobs + shift)[0] for shift in directions(settings.control_shift)]
    return distance, np.array(chance)


def _contrasts(region: Region, seen: Look, settings: RegistrationSettings) -> NDArray[np.float64]:
    """Hematoxylin inside each nucleus minus the mean at its shifted places, in deviations of the map (n,)."""
    labels = draw_labels(region.outlines, seen.grid)
    numbers = np.unique(labels[labels > 0])
    deviation = float(seen.stain.std())
    if not len(numbers) or deviation == 0:
        return np.empty(0)
    steps = np.round(directions(settings.control_shift) / SPACING).astype(int)
    here = ndimage.mean(seen.stain, labels, numbers)
    there = [ndimage.mean(np.roll(seen.stain, (-y, -x), (0, 1)), labels, numbers) for x, y in steps]
    difference: NDArray[np.float64] = (here - np.mean(there, axis=0)) / deviation
    return difference


def _region(
    region: Region,
    share: float,
    blobs: NDArray[np.float64],
    distance: NDArray[np.float64],
    chance: NDArray[np.float64],
    contrast: NDArray[np.float64],
    settings: RegistrationSettings,
) -> RegionQuality:
    enough = len(blobs) >= _FEWEST
    median = _median(distance) if enough else None
    expected = float(np.median(chance, axis=1).mean()) if enough else None
    passed = (
        median is not None
        and expected is not None
        and median <= settings.max_distance
        and median <= settings.max_chance * expected
    )
    return RegionQuality(
        x=float(region.centre[0]),
        y=float(region.centre[1]),
        nuclei=len(region.outlines),
        he_nuclei=len(blobs),
        distance=median,
        chance=expected,
        contrast=_mean(contrast),
        inside=share,
        passed=passed,
    )


def _share_passed(parts: list[RegionQuality]) -> float:
    """Share of the regions that pass; regions that are mostly outside of the H&E are counted by `inside` alone."""
    there = [part.passed for part in parts if part.inside >= 0.5]
    return float(np.mean(there)) if there else 0.0


def _failures(figures: dict[str, float | None], settings: RegistrationSettings) -> Iterator[str]:
    distance, chance, contrast = figures["distance"], figures["chance"], figures["contrast"]
    if distance is None or chance is None:
        yield "no H&E nuclei found under the sample's nuclei"
    else:
        if distance > settings.max_distance:
            yield f"median distance {distance:.2f} um, expected {settings.max_distance:g} um or less (max_distance)"
        if distance > settings.max_chance * chance:
            yield (
                f"median distance {distance:.2f} um is {distance / chance:.2f} of what chance gives ({chance:.2f} um), "
                f"expected {settings.max_chance:g} or less (max_chance)"
            )
    if contrast is None or contrast < settings.min_contrast:
        value = "none" if contrast is None else f"{contrast:.2f}"
        yield f"hematoxylin contrast {value}, expected {settings.min_contrast:g} or more (min_contrast)"
    for name, limit, what in (
        ("inside", settings.min_inside, "share of the nuclei inside the H&E"),
        ("regions_passed", settings.min_regions, "share of the regions that pass"),
    ):
        share = figures[name]
        if share is None or share < limit:
            yield f"{what} {share:.0%}, expected {limit:.0%} or more ({name.replace('regions_passed', 'regions')})"


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _z(values: NDArray[np.float64]) -> float | None:
    if len(values) < 2 or values.std() == 0:
        return None
    return float(values.mean() / (values.std(ddof=1) / np.sqrt(len(values))))
