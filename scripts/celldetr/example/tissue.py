"""Growing a tissue scene: regions of different tissue with glands, fat, fibres and nuclei.

Lengths in um, y downwards, from the upper left corner of the tissue.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.styles import MIXTURES, REGIONS, STYLES, Array, GlandStyle, style_values
from celldetr.runtime.errors import ConfigError

Indices = NDArray[np.intp]
_FIELD_AREA = 64.0**2  # um^2 of a PanNuke image: densities refer to it
_REGION = 90.0  # um; typical size of a region
_LONGEST = 24.0  # um; no two nuclei with centres farther apart than this overlap
_EDGE = 6.0  # um between an irregular border of the tissue and the nearest centre of a nucleus
_VERTICES = 36  # of an outline
_CROWDING = 1.7  # nuclei thrown per nucleus wanted: many find no room


@dataclass(frozen=True)
class SceneNuclei:
    """N nuclei: ellipses, and the outlines drawn from them."""

    classes: Indices  # (N,) index into `PANNUKE_CLASSES`
    centres: Array  # (N, 2) x, y
    half: Array  # (N, 2) half of the length and of the width
    angles: Array  # (N,) direction of the long axis, radians from x towards y
    outlines: Array  # (N, V, 2) x, y

    def __len__(self) -> int:
        """Count the nuclei."""
        return len(self.classes)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> "SceneNuclei":
        """Select nuclei by index or mask."""
        return SceneNuclei(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Gland:
    """A ring of cells; `lumen` is None if the cells meet in the middle. Outlines are (V, 2)."""

    style: GlandStyle
    centre: Array
    radius: float
    outline: Array
    lumen: Array | None


@dataclass(frozen=True)
class Flow:
    """The smooth direction field that fibres and spindle nuclei follow, and that warps the borders of regions.

    Fibres are the level lines of a plane with waves.
    """

    direction: float  # mean direction of the fibres in radians
    waves: Array  # (K, 4) amplitude in um, wave vector x and y in 1/um, phase

    def coordinates(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Position along and across the fibres in um, of any shape."""
        c, s = np.cos(self.direction), np.sin(self.direction)
        bent = sum(size * np.sin(kx * x + ky * y + phase) for size, kx, ky, phase in self.waves)
        return c * x + s * y, c * y - s * x + bent

    def angles(self, points: Array) -> Array:
        """(N,) direction of the fibres through (N, 2) points in radians."""
        x, y = points.T
        across = self.coordinates(x, y)[1]
        right, below = self.coordinates(x + 0.1, y)[1], self.coordinates(x, y + 0.1)[1]
        return np.asarray(np.arctan2(across - right, below - across))


@dataclass(frozen=True)
class RegionMap:
    """Which tissue is where: a point belongs to the nearest site, borders are warped by the flow."""

    sites: Array  # (R, 2) x, y
    regions: tuple[str, ...]  # R keys of `REGIONS`
    flow: Flow

    def index(self, points: Array) -> Indices:
        """Index into `regions` at points (..., 2)."""
        along, across = self.flow.coordinates(points[..., 0], points[..., 1])
        bump = np.stack([5.0 * np.sin(along / 9.0), 5.0 * np.sin(across / 7.0)], axis=-1)
        return np.asarray(cKDTree(self.sites).query(points + bump)[1], dtype=np.intp)

    def values(self, names: Sequence[str]) -> Array:
        """(R, names) attributes of `Region`."""
        return np.array([[getattr(REGIONS[region], name) for name in names] for region in self.regions], dtype=float)


@dataclass(frozen=True)
class Scene:
    """A piece of tissue."""

    size: tuple[float, float]  # width and height in um
    border: Array  # (V, 2) outline of the tissue
    nuclei: SceneNuclei  # in the order of drawing: a later one lies above an earlier one; centres lie in the tissue
    glands: tuple[Gland, ...]
    map: RegionMap  # the tissue between the glands


def grow_scene(
    rng: np.random.Generator, size: tuple[float, float], mixture: str = "example", *, irregular: bool = False
) -> Scene:
    """Grow a piece of tissue of a width and height in um and a `mixture` of regions (key of `MIXTURES`).

    If `irregular` it has an irregular border, otherwise it fills the rectangle.

    Raises
    ------
    ConfigError
        The tissue is so small that no nucleus fits in.
    """
    extent = np.asarray(size, dtype=float)
    border = _irregular_border(rng, extent) if irregular else np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * extent
    count = max(1, round(float(np.prod(extent + _REGION)) / _REGION**2))
    sites = rng.uniform(-_REGION / 2, extent + _REGION / 2, (count, 2))
    names, shares = list(MIXTURES[mixture]), np.array(list(MIXTURES[mixture].values()))
    kinds = rng.choice(len(names), size=count, p=shares / shares.sum())
    tissue = RegionMap(sites, tuple(names[k] for k in kinds), _draw_flow(rng))
    glands = _place_glands(rng, tissue, extent)
    nuclei = _place_nuclei(rng, tissue, border, glands)
    if not len(nuclei):
        raise ConfigError(f"example: got no nucleus on tissue of {size[0]} um x {size[1]} um, expected a larger size")
    return Scene(size, border, nuclei, glands, tissue)


def draw_outlines(
    rng: np.random.Generator,
    centres: Array,
    half: Array,
    angles: Array,
    *,
    irregular: Array | float,
    bend: Array | float = 0.0,
    taper: Array | float = 0.0,
) -> Array:
    """Draw N closed outlines (N, V, 2): ellipses with random bumps, bent and tapered along their long axis.

    See `SceneNuclei` for `centres`, `half` and `angles`. `irregular` is the relative size of the bumps, `bend` the
    sagitta of the long axis relative to its half length, `taper` 0 for an ellipse and towards 1 for pointed ends; each
    a number or (N,).
    """
    count = len(centres)
    irregular, bend, taper = (np.broadcast_to(value, count)[:, None] for value in (irregular, bend, taper))
    t = np.linspace(0.0, 2.0 * np.pi, _VERTICES, endpoint=False)
    order = np.arange(2, 7)
    bumps = irregular * rng.standard_normal((count, order.size)) / order**0.7
    phase = rng.uniform(0.0, 2.0 * np.pi, (count, order.size))
    radius = 1.0 + (bumps[..., None] * np.cos(order[:, None] * t + phase[..., None])).sum(axis=1)
    radius = np.clip(radius, 0.5, 1.6)
    u = radius * np.cos(t)
    v = half[:, 1:] * radius * np.sin(t) * np.abs(np.sin(t)) ** taper + bend * half[:, :1] * (0.5 - u**2)
    u = half[:, :1] * u
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.stack([c * u - s * v, s * u + c * v], axis=-1) + centres[:, None]


def _irregular_border(rng: np.random.Generator, extent: Array) -> Array:
    """(V, 2) outline of a piece of tissue that just fits into a rectangle."""
    t = np.linspace(0.0, 2 * np.pi, 160, endpoint=False)
    order = np.arange(1, 9)
    size = 0.10 * rng.standard_normal(order.size) / order**0.6
    phase = rng.uniform(0, 2 * np.pi, order.size)
    radius = 1 + (size[:, None] * np.cos(order[:, None] * t + phase[:, None])).sum(axis=0)
    radius = np.clip(radius, 0.72, 1.3) / (np.abs(np.cos(t)) ** 4 + np.abs(np.sin(t)) ** 4) ** 0.25
    points = radius[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    return np.asarray((points - points.min(axis=0)) / np.ptp(points, axis=0) * extent)


def _draw_flow(rng: np.random.Generator) -> Flow:
    length = rng.uniform(25.0, 90.0, 4)
    towards = rng.uniform(0.0, 2 * np.pi, 4)
    amplitude = length / (2 * np.pi) * rng.uniform(0.1, 0.35, 4)  # slopes that bend fibres without folding them
    k = 2 * np.pi / length
    waves = np.stack([amplitude, k * np.cos(towards), k * np.sin(towards), rng.uniform(0, 2 * np.pi, 4)], axis=1)
    return Flow(float(rng.uniform(0.0, np.pi)), waves)


def _keep_apart(centres: Array, reach: float, needed: Callable[[Indices, Indices], Array]) -> NDArray[np.bool_]:
    """Keep (N,) shapes at centres (N, 2) unless they are too near to an earlier one that is kept.

    `needed` gives the distance that the centres of shapes i and j (index arrays, i < j) need, at most `reach`.
    """
    pairs = cKDTree(centres).query_pairs(reach, output_type="ndarray")
    distance = np.hypot(*(centres[pairs[:, 0]] - centres[pairs[:, 1]]).T)
    conflicts = pairs[distance < needed(pairs[:, 0], pairs[:, 1])]
    kept = np.ones(len(centres), dtype=bool)
    for first, second in conflicts[np.argsort(conflicts[:, 1], kind="stable")].tolist():
        kept[second] &= not kept[first]
    return kept


def _place_glands(rng: np.random.Generator, tissue: RegionMap, extent: Array) -> tuple[Gland, ...]:
    """Fill the glandular regions, and a margin around the tissue, with glands that do not overlap."""
    points = rng.uniform(-40.0, extent + 40.0, (int(np.prod(extent + 80.0) / 600.0) + 1, 2))
    styles = [REGIONS[tissue.regions[k]].glands for k in tissue.index(points)]
    radii = [float(rng.uniform(*style.radius)) if style else 0.0 for style in styles]
    hit = np.flatnonzero(radii)
    apart = _keep_apart(points[hit], 100.0, lambda i, j: np.take(radii, hit[i]) + np.take(radii, hit[j]) + 3.0)
    glands = []
    for k in hit[apart]:
        style, centre, radius = styles[k], points[k], radii[k]
        assert style is not None
        free = radius - style.cell_height
        lumen = _ring(rng, centre, (free, 0.9 * free), 0.12) if free > 2.0 else None
        glands.append(Gland(style, centre, radius, _ring(rng, centre, (radius, 0.93 * radius), 0.04), lumen))
    return tuple(glands)


def _ring(rng: np.random.Generator, centre: Array, half: tuple[float, float], irregular: float) -> Array:
    """(V, 2) outline of a gland or lumen."""
    return draw_outlines(rng, centre[None], np.array([half]), np.zeros(1), irregular=irregular)[0]


def _place_nuclei(rng: np.random.Generator, tissue: RegionMap, border: Array, glands: tuple[Gland, ...]) -> SceneNuclei:
    """Line the glands with nuclei and scatter others between them."""
    parts = [_line_glands(rng, glands), _scatter(rng, tissue, border.max(axis=0))]
    classes, centres, angles = (np.concatenate(part) for part in zip(*parts, strict=True))
    scattered = np.arange(len(classes)) >= len(parts[0][0])
    half = _draw_half_axes(rng, classes)
    separation, clumping = tissue.values(("separation", "clumping"))[tissue.index(centres)].T
    separation = np.where(scattered, separation, 0.8)
    clumped = scattered & (rng.random(len(classes)) < clumping)
    _move_beside(rng, centres, half, angles, np.flatnonzero(clumped), np.flatnonzero(scattered & ~clumped))
    free = np.asarray(((centres >= 0) & (centres < border.max(axis=0))).all(axis=1))
    tips = half[:, :1] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for gland in glands:
        for shift in (-1, 0, 1):
            free &= ~scattered | (np.hypot(*(centres + shift * tips - gland.centre).T) > gland.radius)
    if len(border) > 4:
        free &= shapely.contains_xy(shapely.buffer(shapely.Polygon(border), -_EDGE), *centres.T)
    index = np.flatnonzero(free)

    def needed(i: Indices, j: Indices) -> Array:
        i, j = index[i], index[j]
        direction = np.arctan2(*(centres[j] - centres[i]).T[::-1])
        return separation[j] * (_reach(half, angles, i, direction) + _reach(half, angles, j, direction))

    index = index[_keep_apart(centres[index], _LONGEST, needed)]
    classes, centres, angles, half = classes[index], centres[index], angles[index], half[index]
    bend = style_values("bend", classes) * rng.standard_normal(len(classes))
    irregular, taper = style_values("irregular", classes), style_values("taper", classes)
    outlines = draw_outlines(rng, centres, half, angles, irregular=irregular, bend=bend, taper=taper)
    return SceneNuclei(classes, centres, half, angles, outlines)


def _move_beside(
    rng: np.random.Generator, centres: Array, half: Array, angles: Array, clumped: Indices, single: Indices
) -> None:
    """Move nuclei `clumped` so that they touch the nearest of the nuclei `single`."""
    if len(clumped) and len(single):
        beside = single[cKDTree(centres[single]).query(centres[clumped])[1]]
        direction = rng.uniform(0, 2 * np.pi, len(clumped))
        touching = _reach(half, angles, beside, direction) + _reach(half, angles, clumped, direction)
        centres[clumped] = centres[beside] + touching[:, None] * np.stack([np.cos(direction), np.sin(direction)], 1)


def _line_glands(rng: np.random.Generator, glands: tuple[Gland, ...]) -> tuple[Indices, Array, Array]:
    """Class, centre and angle of the rows of nuclei of glands, long axes towards the lumen."""
    classes, centres, angles = [np.zeros(0, np.intp)], [np.zeros((0, 2))], [np.zeros(0)]
    for gland in glands:
        style, length = gland.style, STYLES[gland.style.nucleus].length
        for row in range(style.rows):
            ring = gland.radius - (0.5 * length + 1.0) - row * 0.5 * length
            count = int(2 * np.pi * ring / style.spacing)
            if count < 3:
                continue
            theta = 2 * np.pi * (np.arange(count) + 0.5 * row) / count
            out, along, tilt = style.disorder * rng.standard_normal((3, count))
            c, s = np.cos(theta), np.sin(theta)
            x, y = (ring + out) * c - along * s, (ring + out) * 0.95 * s + along * c
            centres.append(gland.centre + np.stack([x, y], 1))
            angles.append(theta + tilt / 12)
            classes.append(np.full(count, PANNUKE_CLASSES.index(style.nucleus)))
    return np.concatenate(classes), np.concatenate(centres), np.concatenate(angles)


def _scatter(rng: np.random.Generator, tissue: RegionMap, extent: Array) -> tuple[Indices, Array, Array]:
    """Class, centre and angle of nuclei thrown at the density of their region."""
    regions = [REGIONS[name] for name in tissue.regions]
    density = np.array([region.density for region in regions])
    composition = np.array([[region.composition.get(name, 0.0) for name in PANNUKE_CLASSES] for region in regions])
    count = rng.poisson(_CROWDING * density.max() * np.prod(extent) / _FIELD_AREA)
    centres = rng.uniform(0.0, extent, (count, 2))
    here = tissue.index(centres)
    hit = rng.random(count) < density[here] / density.max()
    centres, here = centres[hit], here[hit]
    limits = np.cumsum(composition, axis=1)[here] / composition.sum(axis=1)[here, None]
    classes = (rng.random(len(here))[:, None] >= limits[:, :-1]).sum(axis=1)
    along = tissue.flow.angles(centres) + 0.15 * rng.standard_normal(len(here))
    spindle = classes == PANNUKE_CLASSES.index("connective")
    return classes, centres, np.where(spindle, along, rng.uniform(0, np.pi, len(here)))


def _draw_half_axes(rng: np.random.Generator, classes: Indices) -> Array:
    """(N, 2) half of the length and of the width of nuclei of given classes."""
    spread = np.clip(rng.standard_normal((2, len(classes))), -2.2, 2.2)
    length = style_values("length", classes) * np.exp(style_values("length_sd", classes) * spread[0])
    aspect = style_values("aspect", classes) + style_values("aspect_sd", classes) * spread[1]
    return 0.5 * np.stack([length, length * np.clip(aspect, 0.12, 1.0)], axis=1)


def _reach(half: Array, angles: Array, index: Indices, direction: Array) -> Array:
    """Distance from the centre of ellipses `index` to their rim in a direction (radians)."""
    turned = direction - angles[index]
    a, b = half[index].T
    return np.asarray(a * b / np.hypot(b * np.cos(turned), a * np.sin(turned)))
