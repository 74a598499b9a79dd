"""Growing a tissue scene: regions of different architecture with glands, fat, fibres and nuclei.

Lengths in um, y downwards.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from celldetr.data.synthetic.looks import ARCHITECTURES, LOOKS, Architecture, Glands, Look
from celldetr.data.synthetic.shapes import Array, outline, reach

FIELD_AREA = 64.0**2  # um^2 of a PanNuke image: what densities refer to
MIXTURE: Mapping[str, float] = {
    "tumour nest": 0.30,
    "tumour glands": 0.15,
    "benign glands": 0.21,
    "fibrous stroma": 0.17,
    "inflamed stroma": 0.08,
    "necrosis": 0.05,
    "fat": 0.04,
}  # shares of the area that give about PanNuke's class balance
BALANCED: Mapping[str, float] = {
    "tumour nest": 0.12,
    "benign glands": 0.30,
    "fibrous stroma": 0.12,
    "inflamed stroma": 0.12,
    "necrosis": 0.34,
}  # shares that give each class about as many nuclei
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
    """One gland: a ring of cells with a lumen (None when the cells meet in the middle)."""

    centre: Array
    radius: float
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

    def _phase(self, x: Array, y: Array) -> list[tuple[float, float, float, Array]]:
        return [(a, kx, ky, kx * x + ky * y + p) for a, kx, ky, p in self.waves]

    def coordinates(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Position along and across the fibres in um, of any shape."""
        c, s = np.cos(self.direction), np.sin(self.direction)
        across = -s * x + c * y
        for amplitude, _, _, phase in self._phase(x, y):
            across = across + amplitude * np.sin(phase)
        return c * x + s * y, across

    def angle(self, x: float, y: float) -> float:
        """Direction of the fibre through a point, in radians."""
        gx, gy = -np.sin(self.direction), np.cos(self.direction)
        for amplitude, kx, ky, phase in self._phase(np.asarray(x), np.asarray(y)):
            gx, gy = gx + amplitude * kx * np.cos(phase), gy + amplitude * ky * np.cos(phase)
        return float(np.arctan2(-gx, gy))


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
        nuclei=tuple(grower.nuclei),
        glands=tuple(grower.glands),
        vacuoles=tuple(v for *_, v in grower.vacuoles),
    )


def draw_nucleus(rng: np.random.Generator, look: str, centre: Array, angle: float, *, size: float = 1.0) -> Nucleus:
    """Draw one nucleus of a kind at a place, with its long axis in a direction; `size` scales its length."""
    kind: Look = LOOKS[look]
    length = size * kind.length * float(np.exp(kind.length_sd * np.clip(rng.standard_normal(), -2.2, 2.2)))
    aspect = float(np.clip(kind.aspect + kind.aspect_sd * rng.standard_normal(), 0.12, 1.0))
    half = length / 2, length * aspect / 2
    bend = kind.bend * float(rng.standard_normal())
    shape = outline(rng, centre, half, angle, irregular=kind.irregular, bend=bend, taper=kind.taper)
    return Nucleus(look, np.asarray(centre, dtype=float), half, angle, shape)


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
        self.nuclei: list[Nucleus] = []
        self.glands: list[Gland] = []
        self.vacuoles: list[tuple[Array, float, Array]] = []
        self._grid: dict[tuple[int, int], list[int]] = defaultdict(list)

    def architecture(self, centre: Array) -> Architecture:
        """Architecture of the region at a point."""
        index = int(self.scene.region(np.asarray(centre[0]), np.asarray(centre[1])))
        return ARCHITECTURES[self.scene.architectures[index]]

    def _darts(self, spacing: float, margin: float) -> Array:
        size = np.array([self.scene.width, self.scene.height])
        count = int(np.ceil(6 * np.prod(size + 2 * margin) / spacing**2))
        return self.rng.uniform(-margin, size + margin, (count, 2))

    def place_glands(self) -> None:
        """Throw glands into the glandular regions; they do not overlap."""
        for centre in self._darts(60.0, 40.0):
            kind = self.architecture(centre).glands
            if kind is None:
                continue
            radius = float(self.rng.uniform(*kind.radius))
            if any(np.hypot(*(centre - g.centre)) < radius + g.radius + 3.0 for g in self.glands):
                continue
            seed = self.rng.spawn(1)[0]
            outer = outline(seed, centre, (radius, 0.93 * radius), 0.0, irregular=0.04, vertices=60)
            free = radius - kind.cell_height
            lumen = outline(seed, centre, (free, 0.9 * free), 0.0, irregular=0.12, vertices=60) if free > 2.0 else None
            self.glands.append(Gland(centre, radius, outer, lumen))

    def place_vacuoles(self) -> None:
        """Pack fat vacuoles into the fatty regions: large ones first, thin septa between them."""
        for round_ in range(2):
            for centre in self._darts(24.0, 25.0):
                sizes = self.architecture(centre).vacuole
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
            kind = self.architecture(gland.centre).glands
            assert kind is not None
            for row in range(kind.rows):
                self._line(gland, kind, row)

    def _line(self, gland: Gland, kind: Glands, row: int) -> None:
        base = 0.5 * LOOKS[kind.look].length + 1.0
        ring = gland.radius - base - row * 0.5 * LOOKS[kind.look].length
        count = int(2 * np.pi * ring / kind.spacing)
        if count < 3:
            return
        for step in range(count):
            if self.rng.random() > self.density:
                continue
            theta = 2 * np.pi * (step + 0.5 * row) / count
            jitter = kind.disorder * self.rng.standard_normal(3)
            centre = gland.centre + (ring + jitter[0]) * np.array([np.cos(theta), 0.95 * np.sin(theta)])
            centre = centre + jitter[1] * np.array([-np.sin(theta), np.cos(theta)])
            if self._inside(centre):
                nucleus = draw_nucleus(
                    self.rng, kind.look, centre, theta + jitter[2] / 12, size=0.92 if kind.rows > 1 else 1
                )
                self._try(nucleus, 0.80)

    def scatter(self) -> None:
        """Scatter the nuclei between the glands."""
        present = {self.scene.architectures[int(k)] for k in range(len(self.scene.sites))}
        densest = max(ARCHITECTURES[name].density for name in present)
        area = self.scene.width * self.scene.height
        for _ in range(self.rng.poisson(self.density * densest * area / FIELD_AREA)):
            centre = self.rng.uniform(0.0, (self.scene.width, self.scene.height))
            here = self.architecture(centre)
            if self.rng.random() < here.density / densest:
                self._scatter_one(centre, here)

    def _scatter_one(self, centre: Array, here: Architecture) -> None:
        shares = np.array(list(here.composition.values()))
        look = list(here.composition)[int(self.rng.choice(len(shares), p=shares / shares.sum()))]
        clumped = bool(self.rng.random() < here.clumping)
        for _ in range(_TRIES):
            if look == "connective":
                angle = self.scene.flow.angle(*centre) + 0.15 * float(self.rng.standard_normal())
            else:
                angle = float(self.rng.uniform(0.0, np.pi))
            nucleus = draw_nucleus(self.rng, look, centre, angle)
            if clumped:
                nucleus = self._beside_another(nucleus)
            if self._inside(nucleus.centre) and self._is_ground(nucleus) and self._try(nucleus, here.separation):
                return
            centre = centre + 6.0 * self.rng.standard_normal(2)

    def _inside(self, centre: Array) -> bool:
        return bool(0 <= centre[0] < self.scene.width and 0 <= centre[1] < self.scene.height)

    def _is_ground(self, nucleus: Nucleus) -> bool:
        """Whether a nucleus lies outside of glands and vacuoles."""
        tips = np.array([-1.0, 0.0, 1.0])[:, None] * nucleus.half[0]
        points = nucleus.centre + tips * np.array([np.cos(nucleus.angle), np.sin(nucleus.angle)])
        rounds = [(g.centre, g.radius) for g in self.glands] + [(c, r) for c, r, _ in self.vacuoles]
        return all(np.hypot(*(points - c).T).min() > r for c, r in rounds)

    def _neighbours(self, centre: Array) -> list[Nucleus]:
        column, row = (int(v // _CELL) for v in centre)
        cells = [(column + i, row + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return [self.nuclei[k] for cell in cells for k in self._grid.get(cell, ())]

    def _beside_another(self, nucleus: Nucleus) -> Nucleus:
        """Move a nucleus so that it touches one nearby."""
        near = self._neighbours(nucleus.centre)
        if not near:
            return nucleus
        other = near[int(self.rng.integers(len(near)))]
        direction = self.rng.uniform(0.0, 2 * np.pi)
        distance = _touching([other], nucleus, np.array([direction]))[0]
        centre = other.centre + distance * np.array([np.cos(direction), np.sin(direction)])
        return replace(nucleus, centre=centre, outline=nucleus.outline + (centre - nucleus.centre))

    def _try(self, nucleus: Nucleus, separation: float) -> bool:
        """Keep a nucleus unless it overlaps others too much."""
        near = self._neighbours(nucleus.centre)
        if near:
            between = nucleus.centre - np.array([n.centre for n in near])
            direction = np.arctan2(between[:, 1], between[:, 0])
            if np.any(np.hypot(*between.T) < separation * _touching(near, nucleus, direction)):
                return False
        self._grid[int(nucleus.centre[0] // _CELL), int(nucleus.centre[1] // _CELL)].append(len(self.nuclei))
        self.nuclei.append(nucleus)
        return True


def _touching(others: list[Nucleus], nucleus: Nucleus, direction: Array) -> Array:
    """Centre distance at which `nucleus` touches each of `others` in a direction (both as ellipses)."""
    half, angle = np.array([n.half for n in others]), np.array([n.angle for n in others])
    return reach(half, angle, direction) + reach(np.array(nucleus.half), np.array(nucleus.angle), direction)
