"""Staining a scene with hematoxylin and eosin, at any resolution and window by window.

Light falls off with the optical density of the two stains (Beer-Lambert). Every texture is a function of position, so
that windows of a scene fit together seamlessly: a whole slide can be rendered tile by tile.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from celldetr.example import textures
from celldetr.example.looks import ARCHITECTURES, LOOKS
from celldetr.example.shapes import Array, Window, rasterise
from celldetr.example.textures import Axis, Floats
from celldetr.example.tissue import Gland, Nucleus, Scene

_STEP = 2.0  # um; lattice on which slowly changing fields are computed
_COAT = 1.6  # um; reach of a nucleus' coat of cytoplasm
_FIELDS = ("eosin", "basophilia", "fibre", "granule", "cleft", "membranes")
_PIXEL = 0.4  # blur of a pixel's own extent, as a share of it: softens the edges of masks
_SPOTS = 8  # most nucleoli or globules of a nucleus


@dataclass(frozen=True)
class Stain:
    """How a section was stained and scanned.

    Attributes
    ----------
    hematoxylin, eosin
        (3,) optical density (natural logarithm) of a unit of stain in red, green and blue.
    light
        (3,) what empty glass lets through, in [0, 1].
    blur
        Standard deviation of the optics' blur in um.
    noise
        Standard deviation of the sensor's noise in grey values.
    """

    hematoxylin: Array
    eosin: Array
    light: Array
    blur: float = 0.22
    noise: float = 2.5


def draw_stain(rng: np.random.Generator, *, variation: float = 1.0, contrast: float = 1.0) -> Stain:
    """Draw the stain of a section.

    Parameters
    ----------
    rng
        Source of the variation between sections.
    variation
        Factor on how much sections differ; 0 makes all alike.
    contrast
        Factor on the hematoxylin: above 1, nuclei stand out more.
    """
    spread = variation * rng.standard_normal(11)
    hematoxylin = np.array([0.72, 0.88, 0.34]) * (1 + 0.05 * spread[0:3]) * np.exp(0.10 * spread[3]) * contrast
    eosin = np.array([0.14, 0.78, 0.38]) * (1 + 0.07 * spread[4:7]) * np.exp(0.14 * spread[7])
    light = np.clip(np.array([0.955, 0.945, 0.955]) + 0.010 * spread[8:11], 0.0, 1.0)
    return Stain(hematoxylin, eosin, light)


@dataclass(frozen=True)
class Rendering:
    """A stained window.

    Attributes
    ----------
    image
        (R, C, 3) uint8 RGB.
    nucleus
        (R, C) int32: 1 + index in `Scene.nuclei` of the uppermost nucleus at the pixel's centre, 0 where there is none.
    """

    image: NDArray[np.uint8]
    nucleus: NDArray[np.int32]


class Renderer:
    """Renders windows of one scene.

    Parameters
    ----------
    scene
        What to draw.
    stain
        How to stain it.
    seed
        Seed of the textures and of each nucleus' chromatin.
    """

    def __init__(self, scene: Scene, stain: Stain, seed: int) -> None:
        self.scene, self.stain = scene, stain
        self._seeds = [textures.mixed(seed, k) for k in range(16)]
        rng = np.random.default_rng([seed, 16])
        looks = [LOOKS[n.look] for n in scene.nuclei]
        spread = np.clip(rng.standard_normal(len(looks)), -2.0, 2.0)
        self._dark = [k.hematoxylin * float(np.exp(k.hematoxylin_sd * z)) for k, z in zip(looks, spread, strict=True)]
        self._nucleoli = np.minimum(rng.poisson([k.nucleoli for k in looks]), 3)
        self._globules = rng.integers(3, _SPOTS, len(looks)) * (rng.random(len(looks)) < [k.globules for k in looks])
        self._spots = rng.random((len(looks), _SPOTS, 3))
        kinds = [ARCHITECTURES[name] for name in scene.architectures]
        self._kinds = np.array([[getattr(kind, f) for f in _FIELDS] for kind in kinds], dtype=np.float32)
        self._bounds = _bounds([n.outline for n in scene.nuclei], _COAT)
        self._gland_bounds = _bounds([g.outline for g in scene.glands], 0.0)
        self._vacuole_bounds = _bounds(list(scene.vacuoles), 1.0)
        self._tree: cKDTree | None = None

    def window(self, mpp: float, origin: tuple[int, int], shape: tuple[int, int]) -> Rendering:
        """Render a window.

        Parameters
        ----------
        mpp
            Pixel size in um.
        origin
            Row and column of the window's first pixel; pixel (0, 0) begins at (0, 0) um of the scene. May be negative
            or reach beyond the scene, where there is tissue without nuclei.
        shape
            Rows and columns of the window.
        """
        sigma = float(np.hypot(self.stain.blur, _PIXEL * mpp)) / mpp
        margin = max(1, int(np.ceil(3.0 * sigma)))
        canvas = _Canvas(mpp, (origin[0] - margin, origin[1] - margin), (shape[0] + 2 * margin, shape[1] + 2 * margin))
        self._paint_ground(canvas)
        for index in _touching(self._gland_bounds, canvas):
            self._paint_gland(canvas, self.scene.glands[index])
        for index in _touching(self._vacuole_bounds, canvas):
            self._paint_vacuole(canvas, self.scene.vacuoles[index])
        self._paint_membranes(canvas)
        hit = _touching(self._bounds, canvas)
        if hit.size:
            canvas.grain = textures.noise(self._seeds[0], canvas.y, canvas.x, 0.7)
            canvas.clumps = textures.noise(self._seeds[1], canvas.y, canvas.x, 1.9)
        for index in hit:
            self._paint_nucleus(canvas, int(index))
        return Rendering(self._develop(canvas, sigma, margin), canvas.nucleus[margin:-margin, margin:-margin].copy())

    def _paint_ground(self, canvas: "_Canvas") -> None:
        rows, columns = Axis(canvas.y, _STEP, smooth=False), Axis(canvas.x, _STEP, smooth=False)
        y, x = np.meshgrid(rows.nodes * _STEP, columns.nodes * _STEP, indexing="ij")
        kind = self._kinds[self.scene.region(x, y)]
        eosin, basophilia, fibre, granule, cleft, membranes = (
            textures.interpolate(kind[..., k], rows, columns) for k in range(len(_FIELDS))
        )
        along, across = (
            textures.interpolate(values.astype(np.float32), rows, columns)
            for values in self.scene.flow.coordinates(x, y)
        )
        canvas.granules = 0.6 * textures.noise(self._seeds[2], canvas.y, canvas.x, 1.3)
        canvas.granules += 0.7 * textures.noise(self._seeds[7], canvas.y, canvas.x, 3.1)
        strands = textures.noise_along(self._seeds[3], along, across, (22.0, 1.7))
        bundles = textures.noise_along(self._seeds[4], along, across, (40.0, 6.0))
        clouds = textures.noise(self._seeds[5], canvas.y, canvas.x, 17.0)
        body = 1 + 0.12 * clouds + fibre * (0.55 * strands + 0.75 * bundles) + granule * canvas.granules
        gap = textures.noise_along(self._seeds[6], along, across, (16.0, 2.6)) + 0.5 * bundles
        open_ = textures.step(gap, 1.05 - 2.6 * cleft, 1.25 - 2.6 * cleft) * np.minimum(cleft * 50, 1)
        canvas.eosin = eosin * body * (1 - 0.93 * open_)
        canvas.hematoxylin = basophilia * (1 + granule * canvas.granules + 0.3 * clouds) * (1 - open_)
        canvas.membranes = membranes

    def _paint_gland(self, canvas: "_Canvas", gland: Gland) -> None:
        outer = canvas.rasterise(gland.outline)
        if outer is None:
            return
        inner = canvas.rasterise(gland.centre + (gland.outline - gland.centre) * (1 - 0.9 / gland.radius))
        benign = gland.kind.look == "epithelial"
        at, mask = outer.index, outer.mask
        texture = 1 + 0.14 * canvas.granules[at][mask]
        canvas.eosin[at][mask] = (0.34 if benign else 0.42) * texture
        canvas.hematoxylin[at][mask] = (0.10 if benign else 0.20) * texture
        canvas.membranes[at][mask] = 0.45
        wall = canvas.mask(outer)
        if inner is not None:
            wall[inner.index] &= ~inner.mask
        canvas.eosin[wall] = 0.62
        canvas.membranes[wall] = 0.0
        lumen = None if gland.lumen is None else canvas.rasterise(gland.lumen)
        if lumen is not None:
            at, mask = lumen.index, lumen.mask
            secretion = np.clip(canvas.granules[at][mask], 0.0, 1.0)
            canvas.eosin[at][mask] = 0.03 + 0.10 * secretion
            canvas.hematoxylin[at][mask] = 0.02
            canvas.membranes[at][mask] = 0.0

    def _paint_vacuole(self, canvas: "_Canvas", outline: Array) -> None:
        centre = outline.mean(axis=0)
        radius = float(np.hypot(*(outline - centre).T).mean())
        for grow, eosin in ((1 + 0.7 / radius, 0.55), (1.0, 0.02)):
            window = canvas.rasterise(centre + (outline - centre) * grow)
            if window is not None:
                canvas.eosin[window.index][window.mask] = eosin
                canvas.hematoxylin[window.index][window.mask] = 0.0
                canvas.membranes[window.index][window.mask] = 0.0

    def _paint_membranes(self, canvas: "_Canvas") -> None:
        """Draw borders between cells, half way between neighbouring nuclei."""
        if len(self.scene.nuclei) < 2 or canvas.membranes.max() < 0.02:
            return
        if self._tree is None:
            self._tree = cKDTree([n.centre for n in self.scene.nuclei])
        rows, columns = Axis(canvas.y, 1.0, smooth=False), Axis(canvas.x, 1.0, smooth=False)
        points = np.stack(np.meshgrid(columns.nodes, rows.nodes), axis=-1).astype(float)
        distance, _ = self._tree.query(points, k=2, distance_upper_bound=24.0)
        between = np.where(np.isfinite(distance[..., 1]), distance[..., 1], 24.0)
        between = between - np.where(np.isfinite(distance[..., 0]), distance[..., 0], 0.0)
        gap = textures.interpolate(between.astype(np.float32), rows, columns)
        canvas.eosin *= 1 + canvas.membranes * (0.9 * np.exp(-((gap * (1 / 1.1)) ** 2)) - 0.15)

    def _paint_nucleus(self, canvas: "_Canvas", index: int) -> None:
        nucleus = self.scene.nuclei[index]
        look = LOOKS[nucleus.look]
        local = canvas.local(nucleus.outline, _COAT if look.cytoplasm else 0.0)
        if local is None:
            return
        at, mask, outside = local.at, local.mask, local.outside
        if look.cytoplasm:
            coat = ~mask & (outside < _COAT) & (canvas.nucleus[at] == 0)
            added = look.cytoplasm * (1 - outside[coat] * (1 / _COAT))
            canvas.eosin[at][coat] = np.maximum(canvas.eosin[at][coat] + added, 0.03)
        if not mask.any():
            return
        canvas.hematoxylin[at][mask] = self._chromatin(canvas, index, local)
        canvas.eosin[at][mask] = look.eosin
        canvas.nucleus[at][mask] = index + 1

    def _chromatin(self, canvas: "_Canvas", index: int, local: "_Local") -> Floats:
        """Hematoxylin at the pixels of a nucleus."""
        nucleus, mask, dark = self.scene.nuclei[index], local.mask, self._dark[index]
        look = LOOKS[nucleus.look]
        y, x = local.y[mask], local.x[mask]
        if self._globules[index]:
            spots = self._spots[index, : self._globules[index]]
            return dark * (0.22 + 1.15 * _discs(nucleus, spots, (0.6, 1.0), y, x))
        depth = local.inside[mask]
        texture = look.coarse * canvas.clumps[local.at][mask] + (1 - look.coarse) * canvas.grain[local.at][mask]
        middle = textures.step(depth, 0.3, 0.8 * nucleus.half[1])
        stain = dark * (1 - look.clearing * middle) * (1 + 1.6 * look.chromatin * texture)
        stain += look.rim * np.exp(-((depth * (1 / 0.55)) ** 2))
        spots = self._spots[index, : self._nucleoli[index]]
        return stain + 0.75 * _discs(nucleus, spots, (0.55, 0.95), y, x)

    def _develop(self, canvas: "_Canvas", sigma: float, margin: int) -> NDArray[np.uint8]:
        rows = canvas.origin[0] + np.arange(margin, canvas.shape[0] - margin)
        columns = canvas.origin[1] + np.arange(margin, canvas.shape[1] - margin)
        image = np.empty((rows.size, columns.size, 3), dtype=np.uint8)
        taps = np.exp(-0.5 * (np.arange(-margin, margin + 1) / sigma) ** 2)
        taps /= taps.sum()
        for channel in range(3):
            density = canvas.hematoxylin * np.float32(self.stain.hematoxylin[channel])
            density += canvas.eosin * np.float32(self.stain.eosin[channel])
            light = np.exp(-density) * np.float32(255 * self.stain.light[channel])
            light = ndimage.correlate1d(light, taps, axis=0)[margin:-margin]
            light = ndimage.correlate1d(light, taps, axis=1)[:, margin:-margin]
            light += np.float32(self.stain.noise) * textures.white(self._seeds[8 + channel], rows, columns)
            image[..., channel] = np.clip(light + np.float32(0.5), 0, 255)
        return image


def render(
    scene: Scene, mpp: float, origin: tuple[int, int], shape: tuple[int, int], *, stain: Stain, seed: int
) -> Rendering:
    """Render one window of a scene; see `Renderer`, which is faster for several windows of a scene."""
    return Renderer(scene, stain, seed).window(mpp, origin, shape)


@dataclass(frozen=True)
class _Local:
    """The part of a nucleus' surroundings that lies on the canvas: index, mask, distances and positions in um."""

    at: tuple[slice, slice]
    mask: NDArray[np.bool_]
    inside: Floats
    outside: Floats
    y: Floats
    x: Floats


class _Canvas:
    """Stain per pixel of a window and its margin."""

    eosin: Floats
    hematoxylin: Floats
    membranes: Floats
    granules: Floats
    grain: Floats
    clumps: Floats

    def __init__(self, mpp: float, origin: tuple[int, int], shape: tuple[int, int]) -> None:
        self.mpp, self.origin, self.shape = mpp, origin, shape
        self.y = (origin[0] + np.arange(shape[0]) + 0.5) * mpp
        self.x = (origin[1] + np.arange(shape[1]) + 0.5) * mpp
        self.nucleus = np.zeros(shape, dtype=np.int32)

    def rasterise(self, polygon: Array) -> Window | None:
        return rasterise(polygon, self.mpp, (self.origin[1] * self.mpp, self.origin[0] * self.mpp), self.shape)

    def mask(self, window: Window) -> NDArray[np.bool_]:
        full = np.zeros(self.shape, dtype=bool)
        full[window.index] = window.mask
        return full

    def local(self, polygon: Array, reach: float) -> _Local | None:
        """Whole mask of a nucleus and its distances, cut to the canvas; None when it is smaller than a pixel.

        Distances outside of the nucleus are wanted up to `reach`; 0 leaves them out.
        """
        low = np.floor((polygon.min(axis=0) - reach) / self.mpp).astype(int)
        high = np.ceil((polygon.max(axis=0) + reach) / self.mpp).astype(int) + 1
        size = int(high[1] - low[1]), int(high[0] - low[0])
        window = rasterise(polygon, self.mpp, (low[0] * self.mpp, low[1] * self.mpp), size)
        r0, r1 = max(low[1], self.origin[0]), min(high[1], self.origin[0] + self.shape[0])
        c0, c1 = max(low[0], self.origin[1]), min(high[0], self.origin[1] + self.shape[1])
        if window is None or r0 >= r1 or c0 >= c1:
            return None
        mask = np.zeros(size, dtype=bool)
        mask[window.index] = window.mask
        cut = slice(r0 - low[1], r1 - low[1]), slice(c0 - low[0], c1 - low[0])
        inside = ndimage.distance_transform_edt(mask)[cut] * self.mpp
        outside = ndimage.distance_transform_edt(~mask)[cut] * self.mpp if reach else np.zeros(inside.shape)
        at = slice(r0 - self.origin[0], r1 - self.origin[0]), slice(c0 - self.origin[1], c1 - self.origin[1])
        y, x = np.broadcast_arrays(self.y[at[0], None], self.x[at[1]])
        return _Local(at, mask[cut], inside.astype(np.float32), outside.astype(np.float32), y, x)


def _bounds(outlines: list[Array], reach: float) -> Array:
    """(N, 4) lowest x, y and highest x, y of outlines, widened by `reach`."""
    boxes = [np.concatenate([o.min(axis=0) - reach, o.max(axis=0) + reach]) for o in outlines]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def _touching(bounds: Array, canvas: _Canvas) -> NDArray[np.intp]:
    """Find the shapes whose bounds reach into the canvas; their indices in order."""
    columns = (bounds[:, 2] >= canvas.x[0]) & (bounds[:, 0] <= canvas.x[-1])
    rows = (bounds[:, 3] >= canvas.y[0]) & (bounds[:, 1] <= canvas.y[-1])
    return np.flatnonzero(rows & columns)


def _discs(nucleus: Nucleus, spots: Array, radii: tuple[float, float], y: Floats, x: Floats) -> Floats:
    """1 within round spots in a nucleus, 0 outside of them, at points; spots (K, 3) are uniform random numbers."""
    c, s = np.cos(nucleus.angle), np.sin(nucleus.angle)
    value = np.zeros(y.shape, dtype=np.float32)
    for distance, direction, size in spots:
        u = 0.7 * np.sqrt(distance) * nucleus.half[0] * np.cos(2 * np.pi * direction)
        v = 0.7 * np.sqrt(distance) * nucleus.half[1] * np.sin(2 * np.pi * direction)
        radius = radii[0] + size * (radii[1] - radii[0])
        squared = (x - nucleus.centre[0] - c * u + s * v) ** 2 + (y - nucleus.centre[1] - s * u - c * v) ** 2
        np.maximum(value, np.exp(-((squared / radius**2) ** 2)), out=value)
    return value
