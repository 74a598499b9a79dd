"""Picture of a registration for a quick visual check: the whole section, three details, the distances of nuclei."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.report.style import styled
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.gate import control_shifts
from celldetr.xenium.registration.maps import Grid, colour, sample, window
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, clear_blobs, densest, read_window
from celldetr.xenium.registration.result import Registration

_DETAILS = 3
_DETAIL = 90.0  # um along the side of a detail
_THUMBNAIL = 900  # samples along the longer side of the whole section
_OUTLINE, _PASSED, _FAILED = "#00E5FF", "#1B7F3B", "#C62828"
_DENSITY, _CHANCE, _BEFORE = "#0B3D91", "#999999", "#FF8F00"
_ARROWS = 16  # along the longer side of the section


@dataclass(frozen=True)
class _Scene:
    """Everything that is drawn."""

    registration: Registration
    he: Pyramid
    nuclei: DapiNuclei
    regions: list[Region]
    settings: RegistrationSettings


@styled
def registration_figure(
    registration: Registration, he: Pyramid, outlines: NDArray[np.object_], settings: RegistrationSettings, *, name: str
) -> Figure:
    """Draw the H&E in the Xenium frame with the nuclei of sample `name` (as given to `register`) over it."""
    nuclei = DapiNuclei(outlines)
    scene = _Scene(registration, he, nuclei, nuclei.regions(settings), settings)
    figure = Figure(figsize=(15, 9.6), layout="constrained")
    grid = figure.add_gridspec(2, _DETAILS)
    details = _choose_details(scene)
    _draw_section(figure.add_subplot(grid[0, : _DETAILS - 1]), scene, details)
    _draw_distances(figure.add_subplot(grid[0, _DETAILS - 1]), scene)
    for number, region in enumerate(details, 1):
        _draw_detail(figure.add_subplot(grid[1, number - 1]), scene, region, number)
    quality = registration.quality
    verdict, paint = ("passes", _PASSED) if quality.passed else ("FAILS", _FAILED)
    title = f"{name}: registration {verdict} ({registration.origin})\n{quality.summary()}"
    if registration.distortion:
        title += f"\nlocal distortion {registration.distortion.summary()}"
    figure.suptitle(title, color=paint, fontsize=12)
    return figure


def _choose_details(scene: _Scene) -> list[Region]:
    """Choose up to three dense regions far from each other; centre each on its densest place."""
    counts = np.array([len(region.outlines) for region in scene.regions])
    centres = np.array([region.centre for region in scene.regions])
    dense = np.flatnonzero(counts >= np.median(counts))
    chosen = [int(dense[counts[dense].argmax()])]
    while len(chosen) < min(_DETAILS, len(dense)):
        apart = np.linalg.norm(centres[dense, None] - centres[chosen], axis=2).min(axis=1)
        chosen.append(int(dense[apart.argmax()]))
    regions = [scene.regions[index] for index in chosen]
    return [
        replace(region, centre=densest(shapely.get_coordinates(shapely.centroid(region.outlines)), _DETAIL))
        for region in regions
    ]


def _show(axes: Axes, scene: _Scene, grid: Grid) -> None:
    """Show the H&E in the Xenium frame, um, as the matrix alone puts it there."""
    values = sample(scene.he, grid, scene.registration.um_to_he(), colour)
    left, right, bottom, top = extent = _extent(grid)
    axes.imshow(np.clip(values / 255, 0, 1), extent=extent, interpolation="nearest")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.autoscale(False)


def _extent(grid: Grid) -> tuple[float, float, float, float]:
    """Left, right, bottom and top, um; y points down."""
    return grid.x, grid.x + grid.width * grid.spacing, grid.y + grid.height * grid.spacing, grid.y


def _draw_section(axes: Axes, scene: _Scene, details: list[Region]) -> None:
    """Whole section: contours of the density of nuclei, regions with their distance, and frames of the details."""
    points = scene.nuclei.centroids
    low, high = points.min(axis=0), points.max(axis=0)
    rim = 0.04 * float((high - low).max())
    spacing = (float((high - low).max()) + 2 * rim) / _THUMBNAIL
    size = np.ceil((high - low + 2 * rim) / spacing).astype(int)
    grid = Grid(low[0] - rim, low[1] - rim, spacing, int(size[0]), int(size[1]))
    _show(axes, scene, grid)
    density, x, y = _density(points, grid)
    if density.max() > 0:
        axes.contour(x, y, density, levels=density.max() * np.array([0.1, 0.4, 0.7]), colors=_DENSITY, linewidths=0.8)
    for region, figures in zip(scene.regions, scene.registration.quality.regions, strict=False):
        text = "-" if figures.distance is None else f"{figures.distance:.1f}"
        box = {"color": _PASSED if figures.passed else _FAILED}
        axes.text(
            region.centre[0], region.centre[1], text, color="white", fontsize=8, ha="center", va="center", bbox=box
        )
    if scene.registration.field is not None:
        _draw_arrows(axes, scene, scene.registration.field)
    for number, region in enumerate(details, 1):
        left, top = region.centre - _DETAIL / 2
        axes.add_patch(Rectangle((left, top), _DETAIL, _DETAIL, fill=False, linewidth=1.5, zorder=4))
        corner, bold = (left + _DETAIL, top), FontProperties(size=12, weight="bold")
        axes.annotate(str(number), corner, xytext=(3, 3), textcoords="offset points", fontproperties=bold)
    axes.set_title(
        "H&E in the Xenium frame (um); contours: density of DAPI nuclei; numbers: median distance, um", fontsize=9
    )


def _draw_arrows(axes: Axes, scene: _Scene, field: DisplacementField) -> None:
    """Displacements, enlarged, where there are nuclei."""
    points = scene.nuclei.centroids
    low, high = points.min(axis=0), points.max(axis=0)
    step = float((high - low).max()) / _ARROWS
    places = np.stack(np.meshgrid(*(np.arange(a + step / 2, b, step) for a, b in zip(low, high, strict=True))), axis=-1)
    places = places.reshape(-1, 2)
    places = places[scene.nuclei.tree.query(places)[0] < step / 2]
    shifts = field.displacement(places)
    longest = float(np.linalg.norm(shifts, axis=1).max())
    options: Any = {"angles": "xy", "scale_units": "xy", "scale": longest / step, "width": 0.004, "color": _BEFORE}
    arrows = axes.quiver(*places.T, *shifts.T, zorder=5, **options)
    axes.quiverkey(arrows, 0.9, 0.02, longest, f"{longest:.1f} um", labelpos="N", fontproperties={"size": 9})


def _density(
    points: NDArray[np.float64], grid: Grid
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Smoothed nuclei per cell (rows, columns), and the centres of columns and rows, um."""
    left, right, bottom, top = _extent(grid)
    columns = 120
    rows = max(round(columns * (bottom - top) / (right - left)), 2)
    bounds = ((top, bottom), (left, right))
    counts, y, x = np.histogram2d(points[:, 1], points[:, 0], bins=(rows, columns), range=bounds)
    return ndimage.gaussian_filter(counts, 2), (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2


def _draw_detail(axes: Axes, scene: _Scene, region: Region, number: int) -> None:
    _show(axes, scene, window(region.centre, _DETAIL, 0.25))
    rings = [np.asarray(part.exterior.coords)[:, :2] for part in region.outlines]
    title = f"{number}: outlines of the DAPI nuclei on the H&E (um)"
    if scene.registration.field is not None:
        axes.add_collection(LineCollection(rings, colors=_BEFORE, linewidths=0.9))
        title = f"{number}: DAPI nuclei on the H&E (um); orange: without displacements"
    moved = [scene.registration.on_affine(ring) for ring in rings]
    axes.add_collection(LineCollection(moved, colors=_OUTLINE, linewidths=1.0))
    axes.set_title(title, fontsize=9)


def _draw_distances(axes: Axes, scene: _Scene) -> None:
    """Distances from H&E nuclei to the nearest DAPI nucleus, as registered and shifted."""
    to_um, settings, field = scene.registration.he_to_um(), scene.settings, scene.registration.field
    windows = [read_window(scene.he, to_um, region, settings, 0.0, field) for region in scene.regions]
    blobs = np.concatenate(clear_blobs(windows))
    bins = np.linspace(0, 15, 46).tolist()
    if len(blobs):
        near = scene.nuclei.tree.query(blobs)[0]
        shifts = control_shifts(settings.control_shift)
        far = np.concatenate([scene.nuclei.tree.query(blobs + shift)[0] for shift in shifts])
        paint = _PASSED if scene.registration.quality.passed else _FAILED
        line: Any = {"histtype": "step", "color": paint, "linewidth": 2}
        axes.hist(far, bins, weights=np.full(len(far), 1 / len(far)), color=_CHANCE, label="shifted (chance)")
        axes.hist(near, bins, weights=np.full(len(near), 1 / len(near)), label="as registered", **line)
        if field is not None:
            straight = [read_window(scene.he, to_um, region, settings, 0.0) for region in scene.regions]
            before = scene.nuclei.tree.query(np.concatenate(clear_blobs(straight)))[0]
            weights = np.full(len(before), 1 / len(before))
            axes.hist(before, bins, weights=weights, histtype="step", color=_BEFORE, label="without displacements")
        axes.legend(frameon=False, fontsize=9)
    axes.axvline(settings.max_distance, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("to the nearest DAPI nucleus (um); dotted: limit")
    axes.set_ylabel("share of H&E nuclei")
    axes.set_title(f"{len(blobs)} H&E nuclei, {len(scene.nuclei.centroids)} DAPI nuclei", fontsize=9)
