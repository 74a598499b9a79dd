"""Growing a tissue scene: regions of different architecture with glands, fat, fibres and nuclei.

Lengths in um, y downwards.
"""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from celldetr.example.looks import ARCHITECTURES, LOOKS, MIXTURE, Architecture, Glands
from celldetr.example.shapes import Array, outline, reach

FIELD_AREA = 64.0**2  # um^2 of a PanNuke image: what densities refer to
_TRIES = 8  # places tried for a nucleus before it is given up
_CELL = 20.0  # um; longer than any nucleus, so that touching ones lie in neighbouring cells of the grid


@dataclass(frozen=True)
class Nucleus:
    """One nucleus.

    Attributes
    ----------
    look
        Its kind, a key of `LOOKS` (the PanNuke class).
    centre
        (2,) x, y.
    half
        Half of the length and of the width of the ellipse it was drawn from.
    angle
        Direction of its long axis, radians from x towards y.
    outline
        (V, 2) x, y of the outline.
    """

    look: str
    centre: Array
    half: tuple[float, float]
    angle: float
    outline: Array


@dataclass(frozen=True)
class Gland:
    """One gland: a ring of cells of a kind with a lumen (None when the cells meet in the middle)."""

    centre: Array
    radius: float
    kind: Glands
    outline: Array
    lumen: Array | None


@dataclass(frozen=True)
class Flow:
    """The smooth direction field that fibres and spindle nuclei follow, and that warps the borders of regions.

    Fibres are the level lines of the stream function ``across``, a tilted plane with waves on it.

    Attributes
    ----------
    direction
        Mean direction of the fibres in radians.
    waves
        (K, 4) amplitude in um, wave vector x and y in 1/um, phase.
    """

    direction: float
    waves: Array

    def coordinates(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Position along and across the fibres in um, of any shape."""
        c, s = np.cos(self.direction), np.sin(self.direction)
        across = -s * x + c * y
        for amplitude, kx, ky, phase in self.waves:
            across = across + amplitude * np.sin(kx * x + ky * y + phase)
        return c * x + s * y, across

    def angle(self, x: float, y: float) -> float:
        """Direction of the fibre through a point, in radians."""
        gx, gy = -math.sin(self.direction), math.cos(self.direction)
        for amplitude, kx, ky, phase in self.waves.tolist():
            slope = amplitude * math.cos(kx * x + ky * y + phase)
            gx, gy = gx + slope * kx, gy + slope * ky
        return math.atan2(-gx, gy)


@dataclass(frozen=True)
class Scene:
    """A piece of tissue from (0, 0) to (width, height) um.

    Attributes
    ----------
    nuclei
        In the order of drawing: a later one lies above an earlier one. Their centres lie inside the scene.
    glands, vacuoles
        Glands, and (V, 2) outlines of fat vacuoles.
    sites, architectures
        (K, 2) x, y and their kinds: a point belongs to the region of the nearest site, borders warped by the flow.
    flow
        Direction of the fibres.
    """

    width: float
    height: float
    nuclei: tuple[Nucleus, ...]
    glands: tuple[Gland, ...]
    vacuoles: tuple[Array, ...]
    sites: Array
    architectures: tuple[str, ...]
    flow: Flow

    def region(self, x: Array, y: Array) -> NDArray[np.intp]:
        """Index into `architectures` of the region that holds each point."""
        along, across = self.flow.coordinates(x, y)
        bump = 5.0 * np.sin(along / 9.0), 5.0 * np.sin(across / 7.0)
        nearest = np.zeros(np.shape(along), dtype=np.intp)
        best = np.full(np.shape(along), np.inf)
        for index, (sx, sy) in enumerate(self.sites):
            distance = (x + bump[0] - sx) ** 2 + (y + bump[1] - sy) ** 2
            nearest = np.where(distance < best, index, nearest)
            best = np.minimum(distance, best)
        return nearest

    def architecture(self, points: Array) -> list[Architecture]:
        """Kind of tissue at each of (N, 2) points x, y."""
        return [ARCHITECTURES[self.architectures[k]] for k in self.region(points[:, 0], points[:, 1])]


def grow_scene(
    rng: np.random.Generator,
    width: float,
    height: float,
    *,
    density: float = 1.0,
    mixture: Mapping[str, float] = MIXTURE,
    region: float = 90.0,
) -> Scene:
    """Grow a piece of tissue.

    Parameters
    ----------
    rng
        Source of all randomness.
    width, height
        Size in um.
    density
        Factor on the number of nuclei; above 1 it ends where there is no room, and glands keep their rows.
    mixture
        Architecture (a key of `ARCHITECTURES`) -> share of the area.
    region
        Typical size of a region in um.
    """
    count = max(1, round((width + region) * (height + region) / region**2))
    sites = rng.uniform(-region / 2, (width + region / 2, height + region / 2), (count, 2))
    shares = np.array(list(mixture.values()), dtype=float)
    kinds = rng.choice(len(shares), size=count, p=shares / shares.sum())
    names = list(mixture)
    scene = Scene(width, height, (), (), (), sites, tuple(names[k] for k in kinds), _flow(rng))
    grower = _Grower(rng, scene, density)
    grower.place_glands()
    grower.place_vacuoles()
    grower.line_glands()
    grower.scatter()
    return replace(
        scene,
        nuclei=grower.nuclei(),
        glands=tuple(grower.glands),
        vacuoles=tuple(v for *_, v in grower.vacuoles),
    )


@dataclass
class _Candidate:
    """A nucleus that has no outline yet: kind, centre, half axes, direction, bend."""

    look: str
    x: float
    y: float
    half: tuple[float, float]
    angle: float
    bend: float

    def nucleus(self, rng: np.random.Generator) -> Nucleus:
        """Draw its outline."""
        kind, centre = LOOKS[self.look], np.array([self.x, self.y])
        shape = outline(rng, centre, self.half, self.angle, irregular=kind.irregular, bend=self.bend, taper=kind.taper)
        return Nucleus(self.look, centre, self.half, self.angle, shape)


def _candidate(
    rng: np.random.Generator, look: str, centre: tuple[float, float], angle: float, *, size: float = 1.0
) -> _Candidate:
    """Draw the size of a nucleus of a kind at a place, with its long axis in a direction; `size` scales its length."""
    kind = LOOKS[look]
    spread = rng.standard_normal(3).tolist()
    length = size * kind.length * math.exp(kind.length_sd * min(max(spread[0], -2.2), 2.2))
    aspect = min(max(kind.aspect + kind.aspect_sd * spread[1], 0.12), 1.0)
    return _Candidate(look, *centre, (length / 2, length * aspect / 2), angle, kind.bend * spread[2])


def _flow(rng: np.random.Generator) -> Flow:
    length = rng.uniform(25.0, 90.0, 4)
    towards = rng.uniform(0.0, 2 * np.pi, 4)
    amplitude = length / (2 * np.pi) * rng.uniform(0.1, 0.35, 4)  # slopes that bend fibres without folding them
    k = 2 * np.pi / length
    waves = np.stack([amplitude, k * np.cos(towards), k * np.sin(towards), rng.uniform(0, 2 * np.pi, 4)], axis=1)
    return Flow(float(rng.uniform(0.0, np.pi)), waves)


class _Grower:
    """Fills a scene; nuclei are kept in a grid, so that neighbours are found in constant time."""

    def __init__(self, rng: np.random.Generator, scene: Scene, density: float) -> None:
        self.rng, self.scene, self.density = rng, scene, density
        self.placed: list[_Candidate] = []
        self.glands: list[Gland] = []
        self.vacuoles: list[tuple[Array, float, Array]] = []
        self._grid: dict[tuple[int, int], list[_Candidate]] = defaultdict(list)
        self._rounds = np.zeros((0, 3))

    def nuclei(self) -> tuple[Nucleus, ...]:
        """Draw the nuclei that have found a place."""
        return tuple(candidate.nucleus(self.rng) for candidate in self.placed)

    def _darts(self, spacing: float, margin: float) -> list[tuple[Array, Architecture]]:
        size = np.array([self.scene.width, self.scene.height])
        count = int(np.ceil(6 * np.prod(size + 2 * margin) / spacing**2))
        places = self.rng.uniform(-margin, size + margin, (count, 2))
        return list(zip(places, self.scene.architecture(places), strict=True))

    def place_glands(self) -> None:
        """Throw glands into the glandular regions; they do not overlap."""
        for centre, here in self._darts(60.0, 40.0):
            kind = here.glands
            if kind is None:
                continue
            radius = float(self.rng.uniform(*kind.radius))
            if any(np.hypot(*(centre - g.centre)) < radius + g.radius + 3.0 for g in self.glands):
                continue
            outer = outline(self.rng, centre, (radius, 0.93 * radius), 0.0, irregular=0.04, vertices=60)
            free = radius - kind.cell_height
            lumen = None
            if free > 2.0:
                lumen = outline(self.rng, centre, (free, 0.9 * free), 0.0, irregular=0.12, vertices=60)
            self.glands.append(Gland(centre, radius, kind, outer, lumen))

    def place_vacuoles(self) -> None:
        """Pack fat vacuoles into the fatty regions: large ones first, thin septa between them."""
        for round_ in range(2):
            for centre, here in self._darts(24.0, 25.0):
                sizes = here.vacuole
                if sizes is None:
                    continue
                gaps = [np.hypot(*(centre - c)) - r for c, r, _ in self.vacuoles]
                gaps += [np.hypot(*(centre - g.centre)) - g.radius for g in self.glands]
                radius = min(float(self.rng.uniform(*sizes)), min(gaps, default=np.inf) - 0.9)
                if radius > (sizes[0] if round_ == 0 else 3.0):
                    shape = outline(self.rng, centre, (radius, radius), 0.0, irregular=0.02, vertices=48)
                    self.vacuoles.append((centre, radius, shape))

    def line_glands(self) -> None:
        """Line each gland with its rows of nuclei, long axes towards the lumen."""
        for gland in self.glands:
            for row in range(gland.kind.rows):
                self._line(gland, row)

    def _line(self, gland: Gland, row: int) -> None:
        kind = gland.kind
        length = LOOKS[kind.look].length
        ring = gland.radius - (0.5 * length + 1.0) - row * 0.5 * length
        count = int(2 * np.pi * ring / kind.spacing)
        if count < 3:
            return
        chance = self.rng.random(count) <= self.density
        for step, jitter in enumerate(kind.disorder * self.rng.standard_normal((count, 3))):
            theta = 2 * math.pi * (step + 0.5 * row) / count
            c, s = math.cos(theta), math.sin(theta)
            x = float(gland.centre[0] + (ring + jitter[0]) * c - jitter[1] * s)
            y = float(gland.centre[1] + (ring + jitter[0]) * 0.95 * s + jitter[1] * c)
            if chance[step] and self._inside(x, y):
                size = 0.92 if kind.rows > 1 else 1.0
                self._try(_candidate(self.rng, kind.look, (x, y), theta + float(jitter[2]) / 12, size=size), 0.80)

    def scatter(self) -> None:
        """Scatter the nuclei between the glands."""
        rounds = [(*g.centre, g.radius) for g in self.glands] + [(*c, r) for c, r, _ in self.vacuoles]
        self._rounds = np.array(rounds, dtype=float).reshape(-1, 3)
        densest = max(ARCHITECTURES[name].density for name in self.scene.architectures)
        size = self.scene.width, self.scene.height
        count = self.rng.poisson(self.density * densest * size[0] * size[1] / FIELD_AREA)
        places = self.rng.uniform(0.0, size, (count, 2))
        for place, here in zip(places.tolist(), self.scene.architecture(places), strict=True):
            if self.rng.random() < here.density / densest:
                self._scatter_one(place[0], place[1], here)

    def _scatter_one(self, x: float, y: float, here: Architecture) -> None:
        limits = list(itertools.accumulate(here.composition.values()))
        look = list(here.composition)[bisect.bisect_left(limits, self.rng.random() * limits[-1])]
        clumped = self.rng.random() < here.clumping
        for _ in range(_TRIES):
            if look == "connective":
                angle = self.scene.flow.angle(x, y) + 0.15 * self.rng.standard_normal()
            else:
                angle = math.pi * self.rng.random()
            nucleus = _candidate(self.rng, look, (x, y), angle)
            if clumped:
                self._move_beside_another(nucleus)
            if self._inside(nucleus.x, nucleus.y) and self._is_ground(nucleus) and self._try(nucleus, here.separation):
                return
            x, y = x + 6.0 * self.rng.standard_normal(), y + 6.0 * self.rng.standard_normal()

    def _inside(self, x: float, y: float) -> bool:
        return 0 <= x < self.scene.width and 0 <= y < self.scene.height

    def _is_ground(self, nucleus: _Candidate) -> bool:
        """Whether a nucleus lies outside of glands and vacuoles: its middle and the ends of its long axis."""
        if not self._rounds.size:
            return True
        tips = np.array([-1.0, 0.0, 1.0])[:, None] * nucleus.half[0]
        dx = nucleus.x + tips * math.cos(nucleus.angle) - self._rounds[:, 0]
        dy = nucleus.y + tips * math.sin(nucleus.angle) - self._rounds[:, 1]
        return bool(np.all(dx * dx + dy * dy > self._rounds[:, 2] ** 2))

    def _neighbours(self, x: float, y: float) -> list[_Candidate]:
        column, row = int(x // _CELL), int(y // _CELL)
        cells = [(column + i, row + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return [candidate for cell in cells if cell in self._grid for candidate in self._grid[cell]]

    def _move_beside_another(self, nucleus: _Candidate) -> None:
        """Move a nucleus so that it touches one nearby."""
        near = self._neighbours(nucleus.x, nucleus.y)
        if near:
            other = near[int(self.rng.integers(len(near)))]
            direction = 2 * math.pi * self.rng.random()
            distance = _touching(other, nucleus, direction)
            nucleus.x = other.x + distance * math.cos(direction)
            nucleus.y = other.y + distance * math.sin(direction)

    def _try(self, nucleus: _Candidate, separation: float) -> bool:
        """Keep a nucleus unless it overlaps others too much."""
        for other in self._neighbours(nucleus.x, nucleus.y):
            dx, dy = nucleus.x - other.x, nucleus.y - other.y
            distance = math.hypot(dx, dy)
            if distance < separation * (nucleus.half[0] + other.half[0]) and distance < separation * _touching(
                other, nucleus, math.atan2(dy, dx)
            ):
                return False
        self._grid[int(nucleus.x // _CELL), int(nucleus.y // _CELL)].append(nucleus)
        self.placed.append(nucleus)
        return True


def _touching(one: _Candidate, other: _Candidate, direction: float) -> float:
    """Centre distance at which two nuclei touch, as ellipses, in a direction."""
    return reach(one.half, one.angle, direction) + reach(other.half, other.angle, direction)
