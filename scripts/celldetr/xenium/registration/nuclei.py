"""Nuclei of both images: outlines of the Xenium sample, blobs of hematoxylin, and windows to look at them."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.images import Grid, Values, hematoxylin, inside, sample, window
from celldetr.xenium.registration.transform import inverse

SPACING = 0.5  # um of a sample in which nuclei are looked for
_SIGMAS = (2.3, 3.3)  # um; discs of radius 3.3 and 4.7 um answer most
_RADIUS = 1.2  # sigmas around a spot in which there is no other
_APART = 2.5  # um between the centres of two nuclei at least
_FEWEST = 8  # nuclei of a region that is worth looking at
_SAMPLE_RADIUS = 3.0  # um; of nuclei that are given as points


@dataclass(frozen=True)
class Region:
    """A place of the sample that stands for its surroundings: index, centre (2,) um, and outlines of nuclei there."""

    index: int
    centre: NDArray[np.float64]
    outlines: NDArray[np.object_]


class Nuclei:
    """Nuclei of a Xenium sample.

    Parameters
    ----------
    geometry
        Polygons (n,) of shapely or centroids (n, 2), um.

    Attributes
    ----------
    outlines
        Polygons (n,), um.
    centroids
        (n, 2) um.
    tree
        Search tree of the centroids.
    """

    def __init__(self, geometry: ArrayLike) -> None:
        values = np.asarray(geometry)
        if values.ndim == 2 and values.shape[1] == 2 and values.dtype.kind in "fiu":
            self.outlines = shapely.buffer(shapely.points(values.astype(np.float64)), _SAMPLE_RADIUS, quad_segs=4)
        else:
            self.outlines = values.astype(object)
        self.centroids = shapely.get_coordinates(shapely.centroid(self.outlines))
        if len(self.centroids) < _FEWEST or not np.isfinite(self.centroids).all():
            raise InputError(
                f"got {len(self.centroids)} nuclei (or outlines without a place), expected {_FEWEST} or more; "
                "a section without nuclei cannot be registered"
            )
        self.tree = cKDTree(self.centroids)

    def regions(self, settings: RegistrationSettings) -> list[Region]:
        """Windows dense in nuclei, one in each cell of a grid over the sample."""
        low, high = np.percentile(self.centroids, [0.5, 99.5], axis=0)
        side = max(float((high - low).max()) / settings.regions, settings.window)
        cells = np.maximum(np.round((high - low) / side), 1).astype(int)
        place = np.clip(((self.centroids - low) / np.maximum(high - low, 1e-9) * cells).astype(int), 0, cells - 1)
        key = place[:, 1] * cells[0] + place[:, 0]
        found = []
        for index in np.unique(key):
            members = self.centroids[key == index]
            centre = densest(members, settings.window)
            near = np.abs(self.centroids - centre).max(axis=1) < settings.window / 2
            if near.sum() >= _FEWEST:
                found.append(Region(int(index), centre, self.outlines[near]))
        if not found:
            raise InputError(
                f"got no window of {settings.window:g} um with {_FEWEST} nuclei; expected denser tissue: raise 'window'"
            )
        return found


def densest(points: NDArray[np.float64], side: float) -> NDArray[np.float64]:
    """Centre (2,) of the square of a side, on a grid of half sides, that has most points."""
    low = points.min(axis=0)
    counts = np.ceil((points.max(axis=0) - low) / (side / 2)).astype(int) + 1
    cell = ((points - low) / (side / 2)).astype(int)
    density = np.bincount(cell[:, 0] * counts[1] + cell[:, 1], minlength=counts.prod()).reshape(counts)
    pairs = density.copy()
    pairs[:-1] += density[1:]
    pairs[:, :-1] = pairs[:, :-1] + pairs[:, 1:]
    best = np.array(np.unravel_index(pairs.argmax(), pairs.shape))
    # a square that hangs over the edge of the cell's points is moved back onto them
    centre = low + (best + 1) * side / 2
    top = points.max(axis=0) - side / 2
    return np.minimum(centre, np.maximum(top, low + np.minimum(side / 2, (points.max(axis=0) - low) / 2)))


def draw_labels(outlines: NDArray[np.object_], grid: Grid) -> NDArray[np.int32]:
    """Numbers 1.. of the nuclei on a grid, 0 elsewhere."""
    picture = Image.new("I", (grid.width, grid.height))
    pen = ImageDraw.Draw(picture)
    for number, outline in enumerate(outlines, 1):
        part = outline if outline.geom_type == "Polygon" else max(outline.geoms, key=lambda piece: piece.area)
        corners = (np.asarray(part.exterior.coords)[:, :2] - (grid.x, grid.y)) / grid.spacing - 0.5
        pen.polygon([tuple(corner) for corner in corners], fill=number)
    return np.asarray(picture, dtype=np.int32)


@dataclass(frozen=True)
class Look:
    """What the H&E shows in a region through some matrix.

    Attributes
    ----------
    grid
        Samples of `stain` in the Xenium frame; reaches beyond the region's window by `margin` um.
    stain
        Hematoxylin (h, w).
    blobs
        (n, 2) H&E nuclei inside the region's window, um of the Xenium frame.
    strength
        (n,) how strongly each of them stands out, in optical density.
    """

    grid: Grid
    stain: Values
    blobs: NDArray[np.float64]
    strength: NDArray[np.float64]


def look(
    he: Pyramid, to_um: NDArray[np.float64], region: Region, settings: RegistrationSettings, margin: float
) -> Look:
    """Read the hematoxylin of a region and find nuclei in it.

    Parameters
    ----------
    he
        The H&E image.
    to_um
        (3, 3), H&E level-0 px -> um of the Xenium frame.
    region
        Where.
    settings
        Size of the window.
    margin
        How far to read beyond it, um.
    """
    grid = window(region.centre, settings.window + 2 * margin, SPACING)
    to_px = inverse(to_um)
    stain = sample(he, grid, to_px, hematoxylin)
    places, strength = find_blobs(stain)
    blobs = places * SPACING + (grid.x, grid.y)
    kept = (np.abs(blobs - region.centre).max(axis=1) < settings.window / 2) & inside(he, to_px, blobs)
    return Look(grid, stain, blobs[kept], strength[kept])


def find_blobs(stain: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres of dark round spots of the sizes of nuclei (Laplacian of Gaussian at several scales).

    Parameters
    ----------
    stain
        Hematoxylin (h, w), samples of `SPACING` um.

    Returns
    -------
    places
        (n, 2) x and y in samples from the corner of the map.
    strength
        (n,) how much a spot is above its surroundings.
    """
    sigmas = np.array(_SIGMAS) / SPACING
    answers = np.stack([-(sigma**2) * ndimage.gaussian_laplace(stain, sigma) for sigma in sigmas])
    scale = answers.argmax(axis=0)
    answer = answers.max(axis=0)
    size = 2 * round(_APART / SPACING) + 1
    row, column = np.nonzero((answer == ndimage.maximum_filter(answer, size)) & (answer > 0))
    middle = (row > 0) & (row < len(answer) - 1) & (column > 0) & (column < answer.shape[1] - 1)
    row, column = row[middle], column[middle]
    kept = _strongest(np.column_stack([column, row]), answer[row, column], sigmas[scale[row, column]])
    row, column = row[kept], column[kept]
    layer = scale[row, column]
    here = answer[row, column]
    offset = []
    for across, down in ((1, 0), (0, 1)):
        before, after = (answers[layer, row + sign * down, column + sign * across] for sign in (-1, 1))
        bend = np.minimum(before - 2 * here + after, -1e-9)
        offset.append(np.clip((before - after) / (2 * bend), -0.5, 0.5))
    places = np.column_stack([column + offset[0] + 0.5, row + offset[1] + 0.5])
    return places.astype(np.float64), here.astype(np.float64)


def _strongest(
    places: NDArray[np.int64], strength: NDArray[np.float32], sigma: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Find the indices of the spots that are not inside a stronger one."""
    if not len(places):
        return np.empty(0, np.int64)
    tree = cKDTree(places)
    alive = np.ones(len(places), dtype=bool)
    for index in np.argsort(-strength, kind="stable"):
        if alive[index]:
            near = tree.query_ball_point(places[index], _RADIUS * sigma[index])
            alive[near] = False
            alive[index] = True
    return np.flatnonzero(alive)


def keep_clear(looks: list[Look]) -> list[NDArray[np.float64]]:
    """Blobs of each region (n, 2) um that stand out as nuclei do; the limit is that of all regions together."""
    strength = np.concatenate([item.strength for item in looks])
    if not len(strength):
        return [item.blobs for item in looks]
    limit = 0.3 * np.percentile(strength, 90)
    return [item.blobs[item.strength >= limit] for item in looks]
