"""From a nearly right matrix to one that puts nuclei on nuclei: windows of both images, then the nuclei themselves."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.images import Values, hematoxylin, intensity, sample, window
from celldetr.xenium.registration.matching import band, match_blocks
from celldetr.xenium.registration.nuclei import Nuclei, Region, keep_clear, look
from celldetr.xenium.registration.transform import apply, fit_affine, fit_robust, inverse, scaling

# um of a sample, side of a window and how far away it may be, um; each must find what the one before leaves
_STEPS = ((2.0, 260.0, 40.0), (1.0, 200.0, 12.0))
_CAPS = (8.0, 6.0, 5.0, 4.0, *(3.5,) * 12)  # um between partners, iteration by iteration
_FINE, _WIDE = 1.0, 8.0  # um; what is between these sizes is compared
_FEWEST = 20  # pairs of nuclei that can move a matrix


def refine_windows(
    to_um: NDArray[np.float64], he: Pyramid, dapi: Pyramid, pixel_size: float, regions: list[Region], seed: int
) -> NDArray[np.float64]:
    """Improve a matrix that is off by up to 40 um by the shifts of windows.

    Parameters
    ----------
    to_um
        (3, 3), H&E level-0 px -> um of the Xenium frame.
    he, dapi
        The images.
    pixel_size
        um per Xenium px.
    regions
        Where the windows are.
    seed
        Of the choice of windows that a fit begins with.

    Returns
    -------
    NDArray
        Improved matrix.
    """
    centres = np.array([region.centre for region in regions])
    for spacing, side, reach in _STEPS:
        extra = round(reach / spacing)
        to_he, to_dapi = inverse(to_um), scaling(1 / pixel_size)
        count = round(side / spacing)
        fixed, moving = [], []
        for centre in centres:
            fixed.append(_banded(sample(dapi, window(centre, side, spacing), to_dapi, intensity), spacing))
            larger = window(centre, (count + 2 * extra) * spacing, spacing)
            moving.append(_banded(sample(he, larger, to_he, hematoxylin), spacing))
        shifts, score = match_blocks(np.stack(fixed), np.stack(moving))
        if not score.any():
            continue
        moved = centres + shifts * spacing
        update, _ = fit_robust(moved, centres, score + 1e-6, tolerance=max(3 * spacing, reach / 8), seed=seed)
        to_um = update @ to_um
    return to_um


def _banded(values: Values, spacing: float) -> Values:
    return band(values, _FINE / spacing, _WIDE / spacing)


def refine_nuclei(
    to_um: NDArray[np.float64], he: Pyramid, nuclei: Nuclei, regions: list[Region], settings: RegistrationSettings
) -> NDArray[np.float64]:
    """Improve a matrix that is off by a few um: H&E nuclei and DAPI nuclei that are each other's nearest must meet.

    Returns
    -------
    NDArray
        Improved matrix (3, 3); the given one when there are too few pairs.
    """
    looks = [look(he, to_um, region, settings, 4.0) for region in regions]
    start = np.concatenate(keep_clear(looks))
    if len(start) < _FEWEST:
        return to_um
    update = np.eye(3)
    for cap in _CAPS:
        points = apply(update, start)
        distance, partner = nuclei.tree.query(points, distance_upper_bound=cap)
        near = np.flatnonzero(np.isfinite(distance))
        if len(near) < _FEWEST:
            return to_um
        _, back = cKDTree(points).query(nuclei.centroids[partner[near]])
        mutual = near[back == near]
        if len(mutual) < _FEWEST:
            return to_um
        # Tukey's weights: a pair counts less the farther it is apart
        weights = (1 - (distance[mutual] / cap) ** 2) ** 2 + 1e-6
        update = fit_affine(start[mutual], nuclei.centroids[partner[mutual]], weights, stiffness=0.01 * len(mutual))
    return update @ to_um
