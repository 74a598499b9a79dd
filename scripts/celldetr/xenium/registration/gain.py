"""Whether one matrix puts the nuclei of both images closer to each other than another one: a paired test."""

from dataclasses import dataclass

import numpy as np
import shapely
from scipy import stats
from scipy.spatial import cKDTree

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import Floats
from celldetr.xenium.registration.nuclei import Region, clear_blobs, read_window

_FAR = 4.0  # um; a nucleus farther from all others has no partner, and says nothing
_SQUARE = 50.0  # um; nuclei of a square are off in the same direction: each square counts once
_MOST_P = 1e-4  # a refined matrix was fitted to the nuclei that it is judged by: ask for more than chance's 0.05


@dataclass(frozen=True)
class Gain:
    """By how much the distance between nuclei falls from one matrix to another."""

    mean: float  # um
    p: float  # chance of such a fall if there is none, one-sided
    squares: int  # that were compared

    @property
    def significant(self) -> bool:
        """Whether the second matrix is clearly better."""
        return self.mean > 0 and self.p < _MOST_P

    def summary(self) -> str:
        """Figures in one line."""
        what = "clearly closer" if self.significant else "not clearly closer"
        return f"nuclei {what} (by {self.mean:.2f} um, p {self.p:.1g}, {self.squares} squares of {_SQUARE:g} um)"


def gain(before: Floats, after: Floats, he: Pyramid, regions: list[Region], settings: RegistrationSettings) -> Gain:
    """Compare two matrices (3, 3), H&E level-0 px -> um of the Xenium frame, in the regions of a sample."""
    centroids = np.concatenate([shapely.get_coordinates(shapely.centroid(region.outlines)) for region in regions])
    distances = [_distances(to_um, he, regions, settings) for to_um in (before, after)]
    return compare(centroids, *distances)


def compare(places: Floats, before: Floats, after: Floats) -> Gain:
    """Compare distances (n,), um, of the same nuclei at `places` (n, 2), um, by a t-test over squares of tissue."""
    _, square = np.unique((places // _SQUARE).astype(np.int64), axis=0, return_inverse=True)
    count = np.bincount(square.ravel())
    fall = np.bincount(square.ravel(), before - after)
    mean = float(fall.sum() / count.sum())
    number = len(count)
    if number < 2:
        return Gain(mean, 1.0, number)
    # standard error of a ratio of sums over squares
    error = float(np.sqrt(np.sum((fall - mean * count) ** 2) * number / (number - 1)) / count.sum())
    p = float(stats.t.sf(mean / error, number - 1)) if error > 0 else float(mean <= 0)
    return Gain(mean, p, number)


def _distances(to_um: Floats, he: Pyramid, regions: list[Region], settings: RegistrationSettings) -> Floats:
    """Distance (n,), um, at most `_FAR`, from each DAPI nucleus of the regions to the nearest H&E nucleus."""
    windows = [read_window(he, to_um, region, settings, 2 * _FAR) for region in regions]
    found = []
    for region, blobs in zip(regions, clear_blobs(windows, margin=True), strict=True):
        centroids = shapely.get_coordinates(shapely.centroid(region.outlines))
        distance = cKDTree(blobs).query(centroids)[0] if len(blobs) else np.full(len(centroids), _FAR)
        found.append(np.minimum(distance, _FAR))
    return np.concatenate(found)
