"""Nuclei for registration: DAPI outlines of the Xenium sample, and blobs of hematoxylin found in windows of the H&E."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.affine import Floats, inverse
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.maps import Grid, Values, inside, peak_offset, sample, window

SPACING = 0.5  # um of a sample in which blobs are searched
_SIGMAS = (2.3, 3.3)  # um; strongest response to discs of radius 3.3 and 4.7 um
_RADIUS = 1.2  # sigmas around a blob without another one
_APART = 2.5  # um between the centres of two blobs at least
# Least contrast of a nucleus, optical density. Below are 0.1 % of 4,700 nuclei of CoNSeP and of Naylor et al. (2018),
# 3 % of the latter's with a third of their stain, and glass with noise of 10 grey levels, after JPEG, or as grey as 150
_FLOOR = 0.01
_STRONG = 87  # percentile of the contrasts of the blobs of a sample that is taken for that of a strong nucleus
_MIN_NUCLEI = 8  # in a region


@dataclass(frozen=True)
class Region:
    """A window of the sample: centre (2,) um, and the outlines of its DAPI nuclei."""

    centre: Floats
    outlines: NDArray[np.object_]
    cell: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # x0, y0, x1, y1, um: what the window stands for


class DapiNuclei:
    """Nuclei of a Xenium sample: outlines (n,), polygons of shapely, um; centroids (n, 2), um; their search tree."""

    def __init__(self, outlines: NDArray[np.object_]) -> None:
        self.outlines = outlines[~shapely.is_empty(outlines)]
        self.centroids = shapely.get_coordinates(shapely.centroid(self.outlines))
        if len(self.centroids) < _MIN_NUCLEI:
            raise InputError(
                f"got {len(self.centroids)} nuclei, expected {_MIN_NUCLEI} or more; a section without nuclei cannot be "
                "registered"
            )
        self.tree = cKDTree(self.centroids)

    def regions(self, settings: RegistrationSettings) -> list[Region]:
        """Windows dense in nuclei, one in each cell of a grid over the sample."""
        low, high = np.percentile(self.centroids, [0.5, 99.5], axis=0)
        side = max(float((high - low).max()) / settings.regions, settings.window)
        cells = np.maximum(np.round((high - low) / side), 1).astype(int)
        place = np.clip(((self.centroids - low) / np.maximum(high - low, 1e-9) * cells).astype(int), 0, cells - 1)
        key = place[:, 1] * cells[0] + place[:, 0]
        edges = [np.linspace(start, stop, count + 1) for start, stop, count in zip(low, high, cells, strict=True)]
        for axis, edge in enumerate(edges):  # the outer cells hold all nuclei
            edge[[0, -1]] = self.centroids[:, axis].min() - 1, self.centroids[:, axis].max() + 1
        found = []
        for index in np.unique(key):
            centre = densest(self.centroids[key == index], settings.window)
            near = np.abs(self.centroids - centre).max(axis=1) < settings.window / 2
            if near.sum() >= _MIN_NUCLEI:
                row, column = divmod(int(index), int(cells[0]))
                (x0, x1), (y0, y1) = (edges[axis][at : at + 2].tolist() for axis, at in enumerate((column, row)))
                found.append(Region(centre, self.outlines[near], (x0, y0, x1, y1)))
        if not found:
            raise InputError(
                f"got no window of {settings.window:g} um with {_MIN_NUCLEI} nuclei; expected denser tissue: raise "
                "xenium.registration.window"
            )
        return found


def densest(points: Floats, side: float) -> Floats:
    """Centre (2,) of the square with most points, on a grid of half sides."""
    low = points.min(axis=0)
    counts = np.ceil((points.max(axis=0) - low) / (side / 2)).astype(int) + 1
    cell = ((points - low) / (side / 2)).astype(int)
    density = np.bincount(cell[:, 0] * counts[1] + cell[:, 1], minlength=counts.prod()).reshape(counts)
    pairs = density.copy()
    pairs[:-1] += density[1:]
    pairs[:, :-1] = pairs[:, :-1] + pairs[:, 1:]
    best = np.array(np.unravel_index(pairs.argmax(), pairs.shape))
    # move a square that hangs over the edge of the points back onto them
    centre = low + (best + 1) * side / 2
    top = points.max(axis=0) - side / 2
    return np.minimum(centre, np.maximum(top, low + np.minimum(side / 2, (points.max(axis=0) - low) / 2)))


def draw_labels(outlines: NDArray[np.object_], grid: Grid) -> NDArray[np.int32]:
    """Label map (height, width): k inside the k-th outline (from 1), 0 elsewhere."""
    picture = Image.new("I", (grid.width, grid.height))
    pen = ImageDraw.Draw(picture)
    for number, outline in enumerate(outlines, 1):
        corners = (np.asarray(outline.exterior.coords)[:, :2] - (grid.x, grid.y)) / grid.spacing - 0.5
        pen.polygon([tuple(corner) for corner in corners], fill=number)
    return np.asarray(picture, dtype=np.int32)


@dataclass(frozen=True)
class StainWindow:
    """Hematoxylin of a region, read through a matrix, and the H&E nuclei found in it."""

    grid: Grid  # samples of `stain` in the Xenium frame; exceeds the region's window by a margin
    stain: Values  # hematoxylin (h, w), optical density
    blobs: Floats  # (n, 2) H&E nuclei, um of the Xenium frame
    strength: Floats  # (n,) contrast of each blob to its surroundings, optical density
    within: NDArray[np.bool_]  # (n,) inside of the region's window


def read_window(
    he: Pyramid,
    to_um: Floats,
    region: Region,
    settings: RegistrationSettings,
    margin: float,
    field: DisplacementField | None = None,
) -> StainWindow:
    """Read the hematoxylin of a region and find nuclei in it.

    `to_um` (3, 3) maps H&E level-0 px to um of the Xenium frame, where the `field`, if any, corrects the places;
    `margin` (um) is read around the region's window.
    """
    grid = window(region.centre, settings.window + 2 * margin, SPACING)
    to_px = inverse(to_um)
    stain = sample(he, grid, to_px, hematoxylin, field)
    positions, strength = find_blobs(blob_responses(stain))
    blobs = positions * SPACING + (grid.x, grid.y)
    shown = inside(he, to_px, blobs)
    blobs, strength = blobs[shown], strength[shown]
    return StainWindow(grid, stain, blobs, strength, np.abs(blobs - region.centre).max(axis=1) < settings.window / 2)


def blob_responses(stain: Values) -> Values:
    """Contrast (scales, h, w) to its surroundings of what lies at each sample of hematoxylin (h, w), small scale first.

    It is the Laplacian of Gaussian, highest in the middle of dark round blobs of the size of nuclei.
    """
    sigmas = np.array(_SIGMAS) / SPACING
    smooth, layers = stain, []
    for sigma, before in zip(sigmas, (0, *sigmas), strict=False):  # each scale from the one before: short filters
        smooth = ndimage.gaussian_filter(smooth, np.sqrt(sigma**2 - before**2))
        layers.append(-(sigma**2) * ndimage.laplace(smooth))
    return np.stack(layers)


def find_blobs(responses: Values) -> tuple[Floats, Floats]:
    """Find dark round blobs of the size of nuclei in the result of `blob_responses`.

    Returns positions (n, 2), x and y in samples from the corner of the map, and contrasts (n,) to the surroundings.
    """
    sigmas = np.array(_SIGMAS) / SPACING
    scale, response = responses.argmax(axis=0), responses.max(axis=0)
    size = 2 * round(_APART / SPACING) + 1
    row, column = np.nonzero((response == ndimage.maximum_filter(response, size)) & (response > _FLOOR))
    middle = (row > 0) & (row < len(response) - 1) & (column > 0) & (column < response.shape[1] - 1)
    row, column = row[middle], column[middle]
    tree = cKDTree(np.column_stack([column, row]))
    kept = np.ones(len(row), dtype=bool)
    for index in np.argsort(-response[row, column], kind="stable"):  # drop the blobs inside of a stronger one
        if kept[index]:
            kept[tree.query_ball_point(tree.data[index], _RADIUS * sigmas[scale[row[index], column[index]]])] = False
            kept[index] = True
    row, column = row[kept], column[kept]
    layer, here = scale[row, column], response[row, column]
    x = column + peak_offset(responses[layer, row, column - 1], here, responses[layer, row, column + 1])
    y = row + peak_offset(responses[layer, row - 1, column], here, responses[layer, row + 1, column])
    return np.column_stack([x + 0.5, y + 0.5]).astype(np.float64), here.astype(np.float64)


def clear_blobs(windows: list[StainWindow], *, margin: bool = False) -> list[Floats]:
    """Blobs (n, 2), um, as strong as nuclei in the window of each region, or with the `margin` around it.

    The limit is common to all regions.
    """
    strength = np.concatenate([item.strength[item.within] for item in windows])
    limit = 0.3 * np.percentile(strength, _STRONG) if len(strength) else 0
    return [item.blobs[(item.strength >= limit) & (item.within | margin)] for item in windows]
