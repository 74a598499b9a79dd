"""Drawing a scene: stained with hematoxylin and eosin, or as a DAPI image.

Light falls off with the optical density of the two stains (Beer-Lambert). An image is drawn in one piece: the H&E takes
about 80 bytes of memory per pixel, the DAPI image about 25.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from celldetr.example.images import label_image
from celldetr.example.styles import Array, style_values
from celldetr.example.tissue import Scene, SceneNuclei

Floats = NDArray[np.float32]
Pixels = tuple[NDArray[np.intp], ...]  # rows and columns
_GROUND = 0.7  # um; grid on which the ground between the nuclei is computed
_COAT = 1.6  # um; reach of a nucleus' coat of cytoplasm
_SPOTS = 8  # most nucleoli or globules of a nucleus
_BLUR, _NOISE = 0.22, 2.5  # um, by the optics; grey values, of the sensor: standard deviations
_PIXEL_BLUR = 0.4  # px; a pixel's own extent softens the edges of masks
_DAPI_BLUR = 0.3  # um
_DAPI_LEVEL = 2600.0  # grey values of a nucleus of 1 unit of hematoxylin
_DAPI_GLASS, _DAPI_TISSUE = 110.0, 90.0  # grey values of the empty frame, and added by tissue


def draw_he(
    rng: np.random.Generator, scene: Scene, mpp: float, *, rim: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draw a scene as an H&E image, in a stain of its own, with `rim` px of empty glass around it.

    Returns
    -------
    image : (H, W, 3) uint8
        RGB.
    nuclei : (H, W) int32
        1 + index in `scene.nuclei` of the uppermost nucleus at the pixel's centre, 0 for none.
    """
    spread = rng.standard_normal(11)
    width, height = (int(np.ceil(extent / mpp)) + 2 * rim for extent in scene.size)
    canvas = _Canvas((height, width), mpp, rim)
    eosin, hematoxylin, membranes, between = _draw_ground(rng, scene, canvas)
    _draw_glands(rng, scene, canvas, eosin, hematoxylin, membranes)
    eosin *= 1 + membranes * (0.9 * np.exp(-((between / 1.1) ** 2)) - 0.15)
    del membranes, between
    nuclei = label_image(canvas.px(scene.nuclei.outlines), canvas.shape)
    _draw_nuclei(rng, scene.nuclei, canvas, nuclei, eosin, hematoxylin)
    return _develop(rng, scene, canvas, spread, eosin, hematoxylin), nuclei


def draw_dapi(
    rng: np.random.Generator, nuclei: SceneNuclei, labels: NDArray[np.int32], border: Array, mpp: float
) -> NDArray[np.uint16]:
    """Draw a DAPI image (H, W) uint16 of nuclei.

    `labels` (H, W) say where they are: 1 + index of a nucleus, 0 for none; `border` (V, 2) is the outline of the tissue
    in px, `mpp` the pixel size in um.
    """
    signal = np.zeros(labels.shape, dtype=np.float32)
    signal[label_image([border], labels.shape) > 0] = _DAPI_TISSUE
    at = np.nonzero(labels)
    own = labels[at] - 1
    spread = np.exp(0.22 * rng.standard_normal(len(nuclei)))
    level = _DAPI_LEVEL * style_values("hematoxylin", nuclei.classes) * spread
    signal[at] = level[own] * _chromatin(rng, nuclei, own, at, mpp)
    signal = ndimage.gaussian_filter(signal, _DAPI_BLUR / mpp, truncate=3.0) + np.float32(_DAPI_GLASS)
    signal += (4.0 + 1.2 * np.sqrt(signal)) * rng.standard_normal(labels.shape, dtype=np.float32)
    return np.clip(signal + 0.5, 0, 65535).astype(np.uint16)


def _widen(outlines: Array, distance: Array | float) -> Array:
    """Move the corners of outlines (N, V, 2) away from their middles by a distance in um."""
    away = outlines - outlines.mean(axis=1, keepdims=True)
    return outlines + distance * away / np.linalg.norm(away, axis=-1, keepdims=True)


@dataclass(frozen=True)
class _Canvas:
    """The pixel grid of an H&E image: rows and columns, um per px, px of glass around the scene."""

    shape: tuple[int, int]
    mpp: float
    rim: int

    def px(self, points: Array) -> Array:
        """Move points (..., 2) from scene um to px."""
        return points / self.mpp + self.rim

    def um(self, at: Pixels) -> tuple[Array, Array]:
        """Centres x, y of pixels in scene um."""
        return (at[1] + 0.5 - self.rim) * self.mpp, (at[0] + 0.5 - self.rim) * self.mpp


def _noise(rng: np.random.Generator, cell: tuple[float, float], first: NDArray[Any], second: NDArray[Any]) -> Floats:
    """Smooth noise in [-1, 1] at points of any shape, with bumps of a size `cell` along the first and second axis."""
    places = [first / cell[0], second / cell[1]]
    whole = [np.floor(place) for place in places]
    # bent, so that linear interpolation is smooth
    places = [low + _step(place - low, 0.0, 1.0) for place, low in zip(places, whole, strict=True)]
    places = [place - np.floor(place.min(initial=0.0)) for place in places]
    lattice = rng.uniform(-1, 1, [int(place.max(initial=0.0)) + 2 for place in places])
    return np.asarray(ndimage.map_coordinates(lattice, places, order=1, output=np.float32))


def _interpolate(values: NDArray[np.floating], y: Array, x: Array) -> Floats:
    """(H, W) linear interpolation of an image at rows `y` (H,) and columns `x` (W,), px."""
    values = values.astype(np.float32)
    row, column = y.astype(np.intp), x.astype(np.intp)
    down, right = (y - row).astype(np.float32)[:, None], (x - column).astype(np.float32)
    bands = values[row] * (1 - down) + values[row + 1] * down
    left = np.take(bands, column, axis=1) * (1 - right)
    return np.asarray(left + np.take(bands, column + 1, axis=1) * right, dtype=np.float32)


def _step(values: Array, low: Array | float, high: Array | float) -> Array:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _draw_ground(rng: np.random.Generator, scene: Scene, canvas: _Canvas) -> tuple[Floats, Floats, Floats, Floats]:
    """Eosin, hematoxylin, contrast of membranes and distance to the border of a cell, of a scene without its nuclei."""
    inner = canvas.shape[0] - 2 * canvas.rim, canvas.shape[1] - 2 * canvas.rim
    y, x = (np.arange(int(count * canvas.mpp / _GROUND) + 4) * _GROUND for count in inner)
    points = np.stack(np.meshgrid(x, y), axis=-1)
    names = ("eosin", "basophilia", "fibre", "granule", "cleft", "membranes")
    here = scene.map.values(names)[scene.map.index(points)]
    eosin, basophilia, fibre, granule, cleft, membranes = np.moveaxis(here, -1, 0)
    along, across = scene.map.flow.coordinates(points[..., 0], points[..., 1])
    clouds = _noise(rng, (17.0, 17.0), points[..., 0], points[..., 1])
    grains = _granules(rng, points[..., 0], points[..., 1])
    strands = _noise(rng, (22.0, 1.7), along, across)
    bundles = _noise(rng, (40.0, 6.0), along, across)
    gap = _noise(rng, (16.0, 2.6), along, across) + 0.5 * bundles
    closed = 1 - _step(gap, 1.05 - 2.6 * cleft, 1.25 - 2.6 * cleft)
    eosin = eosin * (1 + 0.12 * clouds + fibre * (0.55 * strands + 0.75 * bundles) + granule * grains)
    hematoxylin = basophilia * (1 + granule * grains + 0.3 * clouds) * closed
    between = np.full(eosin[::2, ::2].shape, 99.0)
    if len(scene.nuclei) > 1:  # cells meet half way between neighbouring nuclei
        nearest, second = np.moveaxis(cKDTree(scene.nuclei.centres).query(points[::2, ::2], k=2)[0], -1, 0)
        between = np.where(second < 24.0, second - nearest, 99.0)
    y, x = ((np.arange(count) + 0.5) * canvas.mpp / _GROUND for count in inner)
    maps = [
        np.pad(_interpolate(values, y / step, x / step), canvas.rim, mode="edge")
        for values, step in ((eosin * (0.07 + 0.93 * closed), 1), (hematoxylin, 1), (membranes, 1), (between, 2))
    ]
    return maps[0], maps[1], maps[2], maps[3]


def _granules(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Texture of cytoplasm and debris at points of any shape, um."""
    return 0.7 * _noise(rng, (3.1, 3.1), x, y) + 0.6 * _noise(rng, (1.3, 1.3), x, y)


def _draw_glands(
    rng: np.random.Generator, scene: Scene, canvas: _Canvas, eosin: Floats, hematoxylin: Floats, membranes: Floats
) -> None:
    """Stain the walls, cells and lumens of glands."""
    walls = np.array([gland.outline for gland in scene.glands]).reshape(-1, 36, 2)
    style = np.array([(gland.style.eosin, gland.style.basophilia) for gland in scene.glands]).reshape(-1, 2)
    wall = label_image(canvas.px(walls), canvas.shape) > 0
    eosin[wall], membranes[wall] = 0.62, 0.0
    cells = label_image(canvas.px(_widen(walls, -0.9)), canvas.shape)
    at = np.nonzero(cells)
    texture = 1 + 0.14 * _granules(rng, *canvas.um(at))
    eosin[at], hematoxylin[at] = style[cells[at] - 1].T * texture
    membranes[at] = 0.45
    at = np.nonzero(
        label_image([canvas.px(gland.lumen) for gland in scene.glands if gland.lumen is not None], canvas.shape)
    )
    eosin[at] = 0.03 + 0.10 * np.clip(_granules(rng, *canvas.um(at)), 0.0, 1.0)  # secretion
    hematoxylin[at], membranes[at] = 0.02, 0.0


def _draw_nuclei(
    rng: np.random.Generator,
    nuclei: SceneNuclei,
    canvas: _Canvas,
    labels: NDArray[np.int32],
    eosin: Floats,
    hematoxylin: Floats,
) -> None:
    """Stain the pixels of nuclei and of their coats of cytoplasm."""
    cytoplasm = style_values("cytoplasm", nuclei.classes)
    coated = np.flatnonzero(np.abs(cytoplasm) > 0.05)
    coats = label_image(canvas.px(_widen(nuclei.outlines[coated], _COAT)), canvas.shape)
    at = np.nonzero((coats > 0) & (labels == 0))
    own = coated[coats[at] - 1]
    outside = np.clip(-_depth(nuclei, own, *_local(nuclei, own, at, canvas)), 0.0, _COAT)
    eosin[at] = np.maximum(eosin[at] + cytoplasm[own] * (1 - outside / _COAT), 0.03)

    at = np.nonzero(labels)
    own = labels[at].astype(np.intp) - 1
    style = {name: style_values(name, nuclei.classes) for name in ("hematoxylin", "clearing", "rim", "eosin")}
    spread = np.clip(rng.standard_normal(len(nuclei)), -2.0, 2.0)
    dark = style["hematoxylin"] * np.exp(style_values("hematoxylin_sd", nuclei.classes) * spread)
    u, v = _local(nuclei, own, at, canvas)
    depth = np.clip(_depth(nuclei, own, u, v), 0.0, None)
    middle = _step(depth, 0.3, 0.8 * nuclei.half[own, 1])
    value = dark[own] * (1 - style["clearing"][own] * middle) * _chromatin(rng, nuclei, own, at, canvas.mpp)
    value += style["rim"][own] * np.exp(-((depth / 0.55) ** 2))
    nucleoli = np.minimum(rng.poisson(style_values("nucleoli", nuclei.classes)), 3)
    value += 0.75 * _spots(rng, nuclei, own, u, v, nucleoli, (0.55, 0.95))
    broken = rng.random(len(nuclei)) < style_values("globules", nuclei.classes)
    globules = _spots(rng, nuclei, own, u, v, rng.integers(3, _SPOTS, len(nuclei)) * broken, (0.6, 1.0))
    value = np.where(broken[own], dark[own] * (0.22 + 1.15 * globules), value)
    hematoxylin[at], eosin[at] = value, style["eosin"][own]


def _local(nuclei: SceneNuclei, own: NDArray[np.integer], at: Pixels, canvas: _Canvas) -> tuple[Array, Array]:
    """Positions (P,) in um along and across the axes of nuclei `own` at pixels `at`."""
    x, y = canvas.um(at)
    x, y = x - nuclei.centres[own, 0], y - nuclei.centres[own, 1]
    c, s = np.cos(nuclei.angles)[own], np.sin(nuclei.angles)[own]
    return c * x + s * y, c * y - s * x


def _depth(nuclei: SceneNuclei, own: NDArray[np.integer], u: Array, v: Array) -> Array:
    """About how many um points lie inside the rim of the ellipses of nuclei `own`; negative outside."""
    a, b = nuclei.half[own].T
    return np.asarray((1 - np.hypot(u / a, v / b)) * b)


def _chromatin(
    rng: np.random.Generator, nuclei: SceneNuclei, own: NDArray[np.integer], at: Pixels, mpp: float
) -> Array:
    """Relative stain of the chromatin of nuclei `own` at pixels `at`, 1 on average."""
    coarse, contrast = style_values("coarse", nuclei.classes)[own], style_values("chromatin", nuclei.classes)[own]
    clumps, grain = (_noise(rng, (cell / mpp, cell / mpp), *at) for cell in (1.9, 0.7))
    return np.asarray(1 + 1.6 * contrast * (coarse * clumps + (1 - coarse) * grain))


def _spots(
    rng: np.random.Generator,
    nuclei: SceneNuclei,
    own: NDArray[np.integer],
    u: Array,
    v: Array,
    number: NDArray[np.integer],
    radii: tuple[float, float],
) -> Array:
    """1 within `number` (N,) round spots of each nucleus, 0 outside, at the points u, v (P,) of nuclei `own`."""
    value = np.zeros(len(own))
    for k in range(int(number.max(initial=0))):
        distance, direction = 0.7 * np.sqrt(rng.random(len(nuclei))), rng.uniform(0, 2 * np.pi, len(nuclei))
        radius = rng.uniform(*radii, len(nuclei))
        here = np.flatnonzero(number[own] > k)
        one = own[here]
        du = u[here] - (distance * np.cos(direction) * nuclei.half[:, 0])[one]
        dv = v[here] - (distance * np.sin(direction) * nuclei.half[:, 1])[one]
        value[here] = np.maximum(value[here], np.exp(-(((du**2 + dv**2) / radius[one] ** 2) ** 2)))
    return value


def _develop(
    rng: np.random.Generator, scene: Scene, canvas: _Canvas, spread: Array, eosin: Floats, hematoxylin: Floats
) -> NDArray[np.uint8]:
    """Turn stain into light: (H, W, 3) uint8, with glass outside of the tissue.

    `spread` (11,), standard normal, says how stain and light of this section differ from those of others.
    """
    # optical density (natural logarithm) of a unit of stain, and share of light of empty glass, in red, green and blue
    hematoxylin_rgb = np.array([0.72, 0.88, 0.34]) * (1 + 0.05 * spread[0:3]) * np.exp(0.10 * spread[3])
    eosin_rgb = np.array([0.14, 0.78, 0.38]) * (1 + 0.07 * spread[4:7]) * np.exp(0.14 * spread[7])
    glass = np.clip(np.array([0.955, 0.945, 0.955]) + 0.010 * spread[8:11], 0.0, 1.0)
    tissue = np.ones(canvas.shape, dtype=np.float32)
    if canvas.rim:
        tissue = label_image([canvas.px(scene.border)], canvas.shape).astype(np.float32)
        tissue = ndimage.uniform_filter(tissue, max(1, round(2.0 / canvas.mpp)))
    sigma = float(np.hypot(_BLUR / canvas.mpp, _PIXEL_BLUR))
    image = np.empty((*canvas.shape, 3), dtype=np.uint8)
    for channel in range(3):
        density = hematoxylin * np.float32(hematoxylin_rgb[channel]) + eosin * np.float32(eosin_rgb[channel])
        light = ndimage.gaussian_filter(1 + tissue * (np.exp(-density) - 1), sigma, truncate=3.0)
        light *= np.float32(255 * glass[channel])
        noise = rng.standard_normal(canvas.shape, dtype=np.float32)
        light += np.float32(_NOISE) * (0.4 + 0.6 * tissue) * noise
        image[..., channel] = np.clip(light + np.float32(0.5), 0, 255)
    return image
