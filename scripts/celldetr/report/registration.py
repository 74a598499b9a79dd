"""Picture of a registration for a quick visual check: the whole section, three details, the distances of nuclei."""

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.report.style import cased, styled
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.gate import pair_nuclei, read_windows
from celldetr.xenium.registration.maps import Grid, colour, sample, window
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, densest
from celldetr.xenium.registration.result import RegionQuality, Registration

_DETAILS = 3
_DETAIL = 90.0  # um along the side of a detail
_THUMBNAIL = 900  # samples along the longer side of the whole section
_LARGEST_NUCLEUS = 15.0  # um from its centroid to its rim
_LINE = 175  # characters of a line above the panels
_OUTLINE, _PASSED, _FAILED, _UNJUDGED, _WARNING = "#00E5FF", "#1B7F3B", "#C62828", "#777777", "#A85500"
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


@dataclass(frozen=True)
class _Detail:
    """A square of a region that is shown enlarged."""

    centre: NDArray[np.float64]  # (2,) um
    region: RegionQuality


@styled
def registration_figure(
    registration: Registration,
    he: Pyramid,
    outlines: NDArray[np.object_],
    settings: RegistrationSettings,
    *,
    name: str,
    refusal: str = "",
) -> Figure:
    """Draw the H&E in the Xenium frame with the nuclei of sample `name` (as given to `register`) over it.

    The registration may be one that does not pass; `refusal` is what the user is told of it.
    """
    nuclei = DapiNuclei(outlines)
    scene = _Scene(registration, he, nuclei, nuclei.regions(settings), settings)
    lines = _wrapped([(line, _FAILED) for line in refusal.splitlines()] or _head(registration, name))
    head = 0.24 * len(lines)  # inches
    figure = Figure(figsize=(15, 9.2 + head), layout=ConstrainedLayoutEngine(h_pad=0.1))
    grid = figure.add_gridspec(3, _DETAILS, height_ratios=(max(head, 0.1), 4.6, 4.6))
    _write_head(figure.add_subplot(grid[0, :]), lines)
    details = _choose_details(scene)
    _draw_section(figure.add_subplot(grid[1, : _DETAILS - 1]), scene, details)
    _draw_distances(figure.add_subplot(grid[1, _DETAILS - 1]), scene)
    for number, detail in enumerate(details, 1):
        _draw_detail(figure.add_subplot(grid[2, number - 1]), scene, detail, number)
    return figure


def _head(registration: Registration, name: str) -> list[tuple[str, str]]:
    """Texts above the panels, and their colours: verdict, figures, why it fails, warnings."""
    quality = registration.quality
    verdict, paint = ("passes", _PASSED) if quality.passed else ("FAILS", _FAILED)
    texts = [(f"{name}: registration {verdict} ({registration.origin})", paint), (quality.summary(), paint)]
    if registration.distortion:
        texts.append((f"local distortion: {registration.distortion.summary()}", paint))
    texts += [(failure, _FAILED) for failure in quality.failures]
    return texts + [(f"Warning: {text}", _WARNING) for text in registration.warnings]


def _wrapped(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(line, paint) for text, paint in texts for line in textwrap.wrap(text, _LINE)]


def _write_head(axes: Axes, lines: list[tuple[str, str]]) -> None:
    axes.axis("off")
    for number, (line, paint) in enumerate(lines):
        place = (0.5, 1 - (number + 0.5) / len(lines))
        axes.text(*place, line, color=paint, fontsize=11, ha="center", va="center", transform=axes.transAxes)


def _choose_details(scene: _Scene) -> list[_Detail]:
    """Choose up to three regions: of most nuclei, of the largest distance, and far from both."""
    regions = scene.registration.quality.regions
    centres = np.array([(region.x, region.y) for region in regions])
    counts = np.array([region.nuclei for region in regions])
    distances = np.array([-1 if region.distance is None else region.distance for region in regions])
    chosen = [int(counts.argmax())]
    if len(regions) > 1:
        distances[chosen] = -2
        chosen.append(int(distances.argmax()))
    while len(chosen) < min(_DETAILS, len(regions)):
        apart = np.linalg.norm(centres[:, None] - centres[chosen], axis=2).min(axis=1)
        dense = (counts >= np.median(counts)) & (apart > 0)
        chosen.append(int(np.where(dense | (not dense.any()), apart, -1).argmax()))
    return [_detail(scene, regions[index]) for index in chosen]


def _detail(scene: _Scene, region: RegionQuality) -> _Detail:
    """Densest square of what was examined of a region; it does not reach into the next region."""
    low, high = np.array(region.cell).reshape(2, 2)
    points = scene.nuclei.centroids
    near = np.abs(points - (region.x, region.y)).max(axis=1) < scene.settings.window / 2
    near &= np.all((points >= low) & (points < high), axis=1)
    centre = densest(points[near], _DETAIL) if near.any() else (low + high) / 2
    half = np.minimum(_DETAIL, high - low) / 2
    return _Detail(np.clip(centre, low + half, high - half), region)


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


def _draw_section(axes: Axes, scene: _Scene, details: list[_Detail]) -> None:
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
    title = (
        f"H&E in the Xenium frame (um); contours: density of the {len(points):,} DAPI nuclei\n"
        "Regions with their median distance, um; red: fails, gives no patches; grey: too few nuclei to judge"
    )
    if scene.registration.field is not None:
        longest = _draw_arrows(axes, scene, scene.registration.field)
        title += f"\nArrows: displacements, enlarged; the longest is {longest:.1f} um"
    for number, detail in enumerate(details, 1):
        left, top = detail.centre - _DETAIL / 2
        axes.add_patch(
            Rectangle(
                (left, top), _DETAIL, _DETAIL, fill=False, linewidth=1.5, zorder=6, path_effects=cased(3, "white")
            )
        )
        text: Any = {"fontsize": 11, "fontweight": "bold", "va": "top", "zorder": 7, "path_effects": cased(3, "white")}
        axes.annotate(str(number), (left, top), xytext=(3, -2), textcoords="offset points", **text)
    for region in scene.registration.quality.regions:
        _draw_region(axes, region, [detail.centre for detail in details if detail.region is region])
    axes.set_title(title, fontsize=9)


def _draw_region(axes: Axes, region: RegionQuality, details: list[NDArray[np.float64]]) -> None:
    """Frame of a region, and its distance in a corner away from the square that is enlarged."""
    x0, y0, x1, y1 = region.cell
    paint = (_PASSED if region.passed else _FAILED) if region.judged else _UNJUDGED
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=paint, linewidth=0.8, zorder=3))
    x, y = details[0] if details else ((x0 + x1) / 2, (y0 + y1) / 2)
    across, down = x <= (x0 + x1) / 2, y < (y0 + y1) / 2
    corner, offset = (x1 if across else x0, y1 if down else y0), (-4 if across else 4, 4 if down else -4)
    text = "-" if region.distance is None else f"{region.distance:.1f}"
    style: Any = {"color": "white", "fontsize": 8, "zorder": 8, "bbox": {"color": paint, "pad": 1.5}}
    sides: Any = {"ha": "right" if across else "left", "va": "bottom" if down else "top"}
    axes.annotate(text, corner, xytext=offset, textcoords="offset points", **sides, **style)


def _draw_arrows(axes: Axes, scene: _Scene, field: DisplacementField) -> float:
    """Displacements, enlarged, where there are nuclei; returns the longest, um."""
    points = scene.nuclei.centroids
    low, high = points.min(axis=0), points.max(axis=0)
    step = float((high - low).max()) / _ARROWS
    places = np.stack(np.meshgrid(*(np.arange(a + step / 2, b, step) for a, b in zip(low, high, strict=True))), axis=-1)
    places = places.reshape(-1, 2)
    places = places[scene.nuclei.tree.query(places)[0] < step / 2]
    shifts = field.displacement(places)
    longest = float(np.linalg.norm(shifts, axis=1).max())
    options: Any = {"angles": "xy", "scale_units": "xy", "scale": longest / step, "width": 0.004, "color": _BEFORE}
    axes.quiver(*places.T, *shifts.T, zorder=5, **options)
    return longest


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


def _draw_detail(axes: Axes, scene: _Scene, detail: _Detail, number: int) -> None:
    _show(axes, scene, window(detail.centre, _DETAIL, 0.25))
    reach = _DETAIL / 2 + _LARGEST_NUCLEUS
    shown = scene.nuclei.outlines[np.abs(scene.nuclei.centroids - detail.centre).max(axis=1) < reach]
    rings = [np.asarray(part.exterior.coords)[:, :2] for part in shown]
    if scene.registration.field is not None:
        axes.add_collection(LineCollection(rings, colors=_BEFORE, linewidths=0.9))
    moved = [scene.registration.on_affine(ring) for ring in rings]
    axes.add_collection(LineCollection(moved, colors=_OUTLINE, linewidths=1.0))
    before = "; orange: without displacements" if scene.registration.field is not None else ""
    verdict = ("" if detail.region.passed else " (region fails)") if detail.region.judged else " (region not judged)"
    axes.set_title(f"{number}{verdict}: DAPI nuclei on the H&E (um){before}", fontsize=9)


def _draw_distances(axes: Axes, scene: _Scene) -> None:
    """Distances between H&E and DAPI nuclei that are each other's nearest, as registered and shifted."""
    settings, field = scene.settings, scene.registration.field
    near, far = _pairs(scene, field)
    bins = np.linspace(0, 15, 46).tolist()
    if len(near) and len(far):
        paint = _PASSED if scene.registration.quality.passed else _FAILED
        line: Any = {"histtype": "step", "color": paint, "linewidth": 2}
        axes.hist(far, bins, weights=np.full(len(far), 1 / len(far)), color=_CHANCE, label="shifted (chance)")
        axes.hist(near, bins, weights=np.full(len(near), 1 / len(near)), label="as registered", **line)
        if field is not None:
            before, _ = _pairs(scene, None)
            weights = np.full(len(before), 1 / len(before))
            axes.hist(before, bins, weights=weights, histtype="step", color=_BEFORE, label="without displacements")
        axes.legend(frameon=False, fontsize=9)
    axes.axvline(settings.max_distance, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("between mutually nearest nuclei (um); dotted: limit of the median")
    axes.set_ylabel("share of the pairs")
    quality = scene.registration.quality
    examined = f"windows of {settings.window:g} um: {len(quality.regions)}"
    axes.set_title(f"{quality.he_nuclei:,} H&E nuclei ({examined})", fontsize=9)


def _pairs(scene: _Scene, field: DisplacementField | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of the pairs of nuclei in all windows, um, as the gate sees them: as registered, and shifted."""
    windows = read_windows(scene.registration.he_to_um(), scene.he, scene.regions, scene.settings, field)
    pairs = pair_nuclei(windows, scene.nuclei, scene.settings)
    return np.concatenate([item.distance for item in pairs]), np.concatenate([item.chance for item in pairs])
