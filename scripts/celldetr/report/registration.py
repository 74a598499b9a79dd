"""A picture by which a person judges a registration in seconds: the whole section, three places, the distances."""

import os
from dataclasses import dataclass, replace

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.files import atomic
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.gate import control_shifts
from celldetr.xenium.registration.maps import Grid, Values, colour, sample, window
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, clear_blobs, densest, read_window
from celldetr.xenium.registration.result import Registration

_PLACES = 3
_PLACE = 90.0  # um along the side of a place
_THUMBNAIL = 900  # samples along the longer side of the whole section
_OUTLINE, _GOOD, _BAD = "#00E5FF", "#1B7F3B", "#C62828"
_DENSITY = "#0B3D91"
_CHANCE = "#999999"


@dataclass(frozen=True)
class _Scene:
    """All that is drawn from."""

    registration: Registration
    he: Pyramid
    nuclei: DapiNuclei
    regions: list[Region]
    settings: RegistrationSettings


def draw(
    registration: Registration, he: Pyramid, nuclei_um: object, settings: RegistrationSettings, *, name: str
) -> Figure:
    """Draw the H&E in the Xenium frame with the sample's nuclei over it.

    Parameters
    ----------
    registration
        What was found.
    he
        The H&E image.
    nuclei_um
        As `register` takes them.
    settings
        Those of the registration.
    name
        Name of the sample.
    """
    nuclei = DapiNuclei(nuclei_um)  # type: ignore[arg-type]
    scene = _Scene(registration, he, nuclei, nuclei.regions(settings), settings)
    figure = Figure(figsize=(15, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, _PLACES)
    whole, distances = figure.add_subplot(grid[0, : _PLACES - 1]), figure.add_subplot(grid[0, _PLACES - 1])
    places = [figure.add_subplot(grid[1, column]) for column in range(_PLACES)]
    chosen = _choose(scene)
    _draw_whole(whole, scene, chosen)
    _draw_distances(distances, scene)
    for number, (axes, region) in enumerate(zip(places, chosen, strict=False), 1):
        _draw_place(axes, scene, region, number)
    for axes in places[len(chosen) :]:
        axes.set_axis_off()
    quality = registration.quality
    verdict = "passes" if quality.passed else "FAILS"
    figure.suptitle(
        f"{name}: registration {verdict} ({registration.origin})\n{quality.summary()}",
        color=_GOOD if quality.passed else _BAD,
        fontsize=12,
    )
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _choose(scene: _Scene) -> list[Region]:
    """Choose regions dense in nuclei and far from each other, and the densest place in each."""
    counts = np.array([len(region.outlines) for region in scene.regions])
    centres = np.array([region.centre for region in scene.regions])
    dense = np.flatnonzero(counts >= np.median(counts))
    chosen = [int(dense[counts[dense].argmax()])]
    while len(chosen) < min(_PLACES, len(dense)):
        apart = np.linalg.norm(centres[dense, None] - centres[chosen], axis=2).min(axis=1)
        chosen.append(int(dense[apart.argmax()]))
    places = []
    for index in chosen:
        region = scene.regions[index]
        centres = shapely.get_coordinates(shapely.centroid(region.outlines))
        places.append(replace(region, centre=densest(centres, _PLACE)))
    return places


def _picture(scene: _Scene, grid: Grid) -> Values:
    """H&E (h, w, 3) in the Xenium frame, 0 to 1."""
    values = sample(scene.he, grid, scene.registration.um_to_he(), colour)
    return np.clip(values / 255, 0, 1).astype(np.float32)


def _extent(grid: Grid) -> tuple[float, float, float, float]:
    right, bottom = grid.x + grid.width * grid.spacing, grid.y + grid.height * grid.spacing
    return grid.x, right, bottom, grid.y


def _draw_whole(axes: Axes, scene: _Scene, chosen: list[Region]) -> None:
    """Thumbnail, contours of the density of nuclei, regions with their distance, and the three places."""
    points = scene.nuclei.centroids
    low, high = points.min(axis=0), points.max(axis=0)
    rim = 0.04 * float((high - low).max())
    spacing = (float((high - low).max()) + 2 * rim) / _THUMBNAIL
    size = np.ceil((high - low + 2 * rim) / spacing).astype(int)
    grid = Grid(low[0] - rim, low[1] - rim, spacing, int(size[0]), int(size[1]))
    axes.imshow(_picture(scene, grid), extent=_extent(grid), interpolation="nearest")
    density, x, y = _density(points, grid)
    if density.max() > 0:
        axes.contour(x, y, density, levels=density.max() * np.array([0.1, 0.4, 0.7]), colors=_DENSITY, linewidths=0.8)
    for region, figures in zip(scene.regions, scene.registration.quality.regions, strict=False):
        text = "-" if figures.distance is None else f"{figures.distance:.1f}"
        paint = _GOOD if figures.passed else _BAD
        axes.text(
            region.centre[0],
            region.centre[1],
            text,
            color="white",
            fontsize=8,
            ha="center",
            va="center",
            bbox={"color": paint},
        )
    for number, region in enumerate(chosen, 1):
        left, top = region.centre - _PLACE / 2
        axes.plot(
            [left, left + _PLACE, left + _PLACE, left, left],
            [top, top, top + _PLACE, top + _PLACE, top],
            color="black",
            linewidth=1.5,
            zorder=4,
        )
        axes.annotate(
            str(number), (left + _PLACE, top), fontsize=12, fontweight="bold", xytext=(3, 3), textcoords="offset points"
        )
    axes.set_xlim(*_extent(grid)[:2])
    axes.set_ylim(*_extent(grid)[2:])
    axes.set_title(
        "H&E in the Xenium frame (um); contours: density of DAPI nuclei; numbers: median distance, um", fontsize=9
    )


def _density(
    points: NDArray[np.float64], grid: Grid
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Nuclei per cell, smoothed, (rows, columns), with the centres of the columns and rows, um."""
    left, right, bottom, top = _extent(grid)
    columns = 120
    rows = max(round(columns * (bottom - top) / (right - left)), 2)
    counts, y, x = np.histogram2d(
        points[:, 1], points[:, 0], bins=(rows, columns), range=((top, bottom), (left, right))
    )
    return ndimage.gaussian_filter(counts, 2), (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2


def _draw_place(axes: Axes, scene: _Scene, region: Region, number: int) -> None:
    grid = window(region.centre, _PLACE, 0.25)
    axes.imshow(_picture(scene, grid), extent=_extent(grid), interpolation="nearest")
    rings = [np.asarray(part.exterior.coords)[:, :2] for part in shapely.get_parts(region.outlines)]
    axes.add_collection(LineCollection(rings, colors=_OUTLINE, linewidths=1.0))
    axes.set_xlim(*_extent(grid)[:2])
    axes.set_ylim(*_extent(grid)[2:])
    axes.set_title(f"{number}: outlines of the DAPI nuclei on the H&E (um)", fontsize=9)


def _draw_distances(axes: Axes, scene: _Scene) -> None:
    """Distances from H&E nuclei to the nearest DAPI nucleus, and from shifted places."""
    windows = [
        read_window(scene.he, scene.registration.he_to_um(), region, scene.settings, 0.0) for region in scene.regions
    ]
    blobs = np.concatenate(clear_blobs(windows))
    bins = np.linspace(0, 15, 46).tolist()
    if len(blobs):
        near = scene.nuclei.tree.query(blobs)[0]
        shifts = control_shifts(scene.settings.control_shift)
        far = np.concatenate([scene.nuclei.tree.query(blobs + shift)[0] for shift in shifts])
        axes.hist(far, bins=bins, weights=np.full(len(far), 1 / len(far)), color=_CHANCE, label="shifted (chance)")
        axes.hist(
            near,
            bins=bins,
            weights=np.full(len(near), 1 / len(near)),
            histtype="step",
            color=_GOOD if scene.registration.quality.passed else _BAD,
            linewidth=2,
            label="as registered",
        )
        axes.legend(frameon=False, fontsize=9)
    axes.axvline(scene.settings.max_distance, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("to the nearest DAPI nucleus (um); dotted: limit")
    axes.set_ylabel("share of H&E nuclei")
    axes.set_title(f"{len(blobs)} H&E nuclei, {len(scene.nuclei.centroids)} DAPI nuclei", fontsize=9)
