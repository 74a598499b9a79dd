"""Refine a nearly right matrix: shifts of image windows first, then pairs of nuclei."""

import numpy as np
from scipy.spatial import cKDTree

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.affine import Floats, apply, fit_affine, fit_robust, inverse, scaling
from celldetr.xenium.registration.maps import band, intensity, match_blocks, sample, window
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, clear_blobs, read_window

# Spacing of samples, side of a window, and search radius, um; the second step must find what the first one leaves
_STEPS = ((2.0, 260.0, 40.0), (1.0, 200.0, 12.0))
_MAX_DISTANCES = (8.0, 6.0, 5.0, 4.0, *(3.5,) * 12)  # um between the nuclei of a pair, iteration by iteration
_FINE, _WIDE = 1.0, 8.0  # um; structures between these sizes are compared
_MIN_PAIRS = 20  # of nuclei


def refine_windows(
    to_um: Floats, he: Pyramid, dapi: Pyramid, pixel_size: float, regions: list[Region], seed: int
) -> Floats:
    """Improve a matrix that is off by up to 40 um by matching a window at the centre of each region.

    `to_um` (3, 3) maps H&E level-0 px to um of the Xenium frame; `pixel_size` is um per Xenium px.
    """
    centres = np.array([region.centre for region in regions])
    for spacing, side, reach in _STEPS:
        extra = round(reach / spacing)
        to_he, to_dapi = inverse(to_um), scaling(1 / pixel_size)
        larger_side = (round(side / spacing) + 2 * extra) * spacing
        fixed, moving = [], []
        for centre in centres:
            dapi_window = sample(dapi, window(centre, side, spacing), to_dapi, intensity)
            he_window = sample(he, window(centre, larger_side, spacing), to_he, hematoxylin)
            fixed.append(band(dapi_window, _FINE / spacing, _WIDE / spacing))
            moving.append(band(he_window, _FINE / spacing, _WIDE / spacing))
        shifts, score = match_blocks(np.stack(fixed), np.stack(moving))
        if not score.any():
            continue
        moved = centres + shifts * spacing
        update, _ = fit_robust(moved, centres, score + 1e-6, tolerance=max(3 * spacing, reach / 8), seed=seed)
        to_um = update @ to_um
    return to_um


def refine_nuclei(
    to_um: Floats, he: Pyramid, nuclei: DapiNuclei, regions: list[Region], settings: RegistrationSettings
) -> Floats:
    """Improve a matrix that is off by a few um: iterated fit to pairs of mutually nearest H&E and DAPI nuclei.

    Returns the given matrix (3, 3) if there are too few pairs.
    """
    start = np.concatenate(clear_blobs([read_window(he, to_um, region, settings, 4.0) for region in regions]))
    if len(start) < _MIN_PAIRS:
        return to_um
    update = np.eye(3)
    for limit in _MAX_DISTANCES:
        points = apply(update, start)
        distance, partner = nuclei.tree.query(points, distance_upper_bound=limit)
        near = np.flatnonzero(np.isfinite(distance))
        if len(near) < _MIN_PAIRS:
            return to_um
        _, back = cKDTree(points).query(nuclei.centroids[partner[near]])
        mutual = near[back == near]
        if len(mutual) < _MIN_PAIRS:
            return to_um
        # Tukey's biweight: the farther apart, the less a pair counts
        weights = (1 - (distance[mutual] / limit) ** 2) ** 2 + 1e-6
        update = fit_affine(start[mutual], nuclei.centroids[partner[mutual]], weights, stiffness=0.01 * len(mutual))
    return update @ to_um
