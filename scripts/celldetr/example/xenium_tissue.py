"""A piece of tissue as H&E and Xenium see it: its outline on the glass, the planted affine, nuclei and cells.

Scene coordinates are um from the upper left corner of the tissue; those of the H&E image begin a rim further out.
"""

from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.example.shapes import Array
from celldetr.example.tissue import Scene
from celldetr.runtime.errors import ConfigError

_FRAME = 20.0  # um of empty glass around the tissue in the Xenium images
_EDGE = 6.0  # um between the tissue's outline and the nearest centre of a nucleus
_CYTOPLASM = 4.0  # um by which cells are larger than their nuclei
_PAIR = 12.0  # um; largest distance of the nuclei of one cell


@dataclass(frozen=True)
class AffinePlan:
    """How the Xenium frame lies to the H&E: um of the H&E -> um of the Xenium frame.

    Attributes
    ----------
    rotation_deg
        Turn from x towards y (clockwise on the screen).
    shift_um
        Moves the tissue within the Xenium frame; below 0, the frame cuts off a part of the tissue.
    shear
        Shift along x per um of y, before the turn.
    scale_error
        Relative error of the H&E's pixel size: its true size is `he_mpp` * (1 + scale_error).
    reflect
        Whether the H&E is a mirror image.
    """

    rotation_deg: float = 0.0
    shift_um: tuple[float, float] = (0.0, 0.0)
    shear: float = 0.0
    scale_error: float = 0.0
    reflect: bool = False

    def linear(self) -> Array:
        """(2, 2) linear part."""
        c, s = np.cos(np.deg2rad(self.rotation_deg)), np.sin(np.deg2rad(self.rotation_deg))
        mirror = np.diag([-1.0 if self.reflect else 1.0, 1.0])
        linear: Array = (
            np.array([[c, -s], [s, c]]) @ np.array([[1.0, self.shear], [0.0, 1.0]]) @ mirror * (1 + self.scale_error)
        )
        return linear


@dataclass(frozen=True)
class Frames:
    """Where the images lie.

    Attributes
    ----------
    tissue
        (V, 2) outline of the tissue, scene um.
    rim_px
        Pixels of glass around the scene in the H&E.
    he_size, xenium_size
        Width and height in px.
    he_mpp, pixel_size
        Pixel sizes of the H&E and of the Xenium images, um.
    to_xenium
        (2, 3) scene um -> Xenium um.
    """

    tissue: Array
    rim_px: int
    he_size: tuple[int, int]
    xenium_size: tuple[int, int]
    he_mpp: float
    pixel_size: float
    to_xenium: Array

    @property
    def matrix(self) -> Array:
        """(3, 3) H&E px -> Xenium px."""
        scene = np.array([[self.he_mpp, 0, -self.rim_um], [0, self.he_mpp, -self.rim_um], [0, 0, 1.0]])
        whole: Array = np.diag([1 / self.pixel_size, 1 / self.pixel_size, 1.0])
        return whole @ np.vstack([self.to_xenium, [0, 0, 1.0]]) @ scene

    @property
    def rim_um(self) -> float:
        """Width of the rim of glass in um."""
        return self.rim_px * self.he_mpp

    def xenium_um(self, points: Array) -> Array:
        """Move (V, 2) points from scene um to Xenium um."""
        moved: Array = points @ self.to_xenium[:, :2].T + self.to_xenium[:, 2]
        return moved

    def he_px(self, points: Array) -> Array:
        """Move (V, 2) points from scene um to H&E px."""
        return (points + self.rim_um) / self.he_mpp


def plan_frames(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    *,
    rim_um: float,
    he_mpp: float,
    pixel_size: float,
    affine: AffinePlan,
) -> Frames:
    """Lay out the images of a piece of tissue; with a rim of 0 the tissue fills the H&E, else its outline is irregular.

    Raises
    ------
    ConfigError
        A size is not positive, or nothing of the tissue is left in the Xenium frame.
    """
    if min(size_um) <= 0 or he_mpp <= 0 or pixel_size <= 0 or rim_um < 0:
        raise ConfigError(
            f"synthetic Xenium: got size_um={size_um}, he_mpp={he_mpp}, pixel_size={pixel_size}, rim_um={rim_um}; "
            "expected sizes > 0 um and a rim >= 0 um"
        )
    width, height = size_um
    tissue = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
    if rim_um:
        tissue = _irregular(rng, size_um)
    linear, shift = affine.linear(), np.asarray(affine.shift_um, dtype=float)
    moved = tissue @ linear.T
    start = _FRAME - moved.min(axis=0) + shift
    extent = moved.max(axis=0) + start + _FRAME
    if np.any(extent <= 2 * _FRAME):
        raise ConfigError(f"synthetic Xenium: got shift_um={affine.shift_um}, which moves all tissue out of the frame")
    rim_px = int(np.ceil(rim_um / he_mpp))
    return Frames(
        tissue,
        rim_px,
        (int(np.ceil(width / he_mpp)) + 2 * rim_px, int(np.ceil(height / he_mpp)) + 2 * rim_px),
        (int(np.ceil(extent[0] / pixel_size)), int(np.ceil(extent[1] / pixel_size))),
        he_mpp,
        pixel_size,
        np.hstack([linear, start[:, None]]),
    )


def _irregular(rng: np.random.Generator, size_um: tuple[float, float]) -> Array:
    """(V, 2) outline of a piece of tissue that just fits into a rectangle."""
    t = np.linspace(0.0, 2 * np.pi, 160, endpoint=False)
    order = np.arange(1, 9)
    size = 0.10 * rng.standard_normal(order.size) / order**0.6
    phase = rng.uniform(0, 2 * np.pi, order.size)
    radius = 1 + (size[:, None] * np.cos(order[:, None] * t + phase[:, None])).sum(axis=0)
    radius = np.clip(radius, 0.72, 1.3) / (np.abs(np.cos(t)) ** 4 + np.abs(np.sin(t)) ** 4) ** 0.25
    points = radius[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    outline: Array = (points - low) / (high - low) * np.asarray(size_um, dtype=float)
    return outline


def on_tissue(scene: Scene, frames: Frames) -> Scene:
    """Leave out the nuclei that would lie outside of the tissue's outline."""
    if not frames.rim_px:
        return scene
    inner = shapely.buffer(shapely.Polygon(frames.tissue), -_EDGE)
    centres = _centres(scene)
    inside = shapely.contains_xy(inner, centres[:, 0], centres[:, 1])
    return replace(scene, nuclei=tuple(n for n, keep in zip(scene.nuclei, inside, strict=True) if keep))


@dataclass(frozen=True)
class Cells:
    """The cells that Xenium segments.

    Attributes
    ----------
    scene
        The tissue as it is drawn: `nucleus_cell` tells the cell of each of its nuclei.
    nucleus_cell
        (M,) index of each nucleus' cell, ascending; -1 (last) for nuclei outside of the Xenium frame.
    looks
        (N,) look of each cell.
    centres
        (N, 2) Xenium um.
    outlines
        N polygons, Xenium um.
    """

    scene: Scene
    nucleus_cell: NDArray[np.int64]
    looks: tuple[str, ...]
    centres: Array
    outlines: NDArray[np.object_]


def make_cells(
    rng: np.random.Generator, scene: Scene, frames: Frames, *, without_nucleus: float, two_nuclei: float
) -> Cells:
    """Make cells of the nuclei of a scene.

    Parameters
    ----------
    rng
        Source of the choices.
    scene
        Tissue whose nuclei all lie on the glass.
    frames
        Its place.
    without_nucleus
        Share of the cells whose nucleus lies outside of the section: neither image shows it.
    two_nuclei
        Share of the cells that own two neighbouring nuclei of one look.
    """
    owner = np.arange(len(scene.nuclei))
    for one, other in _pairs(rng, scene, two_nuclei):
        owner[other] = one
    moved = [frames.xenium_um(n.outline) for n in scene.nuclei]
    size = np.array(frames.xenium_size) * frames.pixel_size
    outside = np.array([bool(np.any(m < 0) or np.any(m > size)) for m in moved], dtype=bool)
    lost = np.zeros(len(owner), dtype=bool)
    lost[owner[outside]] = True
    single = np.bincount(owner, minlength=len(owner)) == 1
    ghost = single & ~lost & (rng.random(len(owner)) < without_nucleus)
    kept = np.flatnonzero((owner == np.arange(len(owner))) & ~lost)
    number = np.full(len(owner), -1)
    number[kept] = np.arange(len(kept))
    cell = number[owner]
    order = np.argsort(np.where(cell < 0, len(owner), cell), kind="stable")
    drawn = order[~ghost[order]]
    centres = np.array([moved[k].mean(axis=0) for k in kept]).reshape(-1, 2)
    bodies = [shapely.MultiPoint(np.vstack([moved[k] for k in np.flatnonzero(owner == one)])) for one in kept]
    return Cells(
        replace(scene, nuclei=tuple(scene.nuclei[k] for k in drawn)),
        cell[drawn].astype(np.int64),
        tuple(scene.nuclei[k].look for k in kept),
        centres,
        _outlines(np.array(bodies, dtype=object), centres, size),
    )


def _pairs(rng: np.random.Generator, scene: Scene, share: float) -> list[tuple[int, int]]:
    """Neighbouring nuclei of one look, each in one pair at most."""
    if share <= 0 or len(scene.nuclei) < 2:
        return []
    centres = _centres(scene)
    near = cKDTree(centres).query(centres, k=2, distance_upper_bound=_PAIR)[1][:, 1]
    taken: set[int] = set()
    pairs: list[tuple[int, int]] = []
    for one in rng.permutation(len(centres)).tolist():
        other = int(near[one])
        if len(pairs) >= share * len(centres):
            break
        free = other < len(centres) and not {one, other} & taken
        if free and scene.nuclei[one].look == scene.nuclei[other].look != "necrotic":
            pairs.append((min(one, other), max(one, other)))
            taken |= {one, other}
    return pairs


def _outlines(bodies: NDArray[np.object_], centres: Array, size: Array) -> NDArray[np.object_]:
    """Polygons of cells: their nuclei widened, and cut half way to the centres of their neighbours."""
    hulls = shapely.convex_hull(bodies)
    wide = shapely.intersection(shapely.buffer(hulls, _CYTOPLASM, quad_segs=4), shapely.box(0, 0, *size))
    if len(centres) > 1:
        places = shapely.voronoi_polygons(shapely.MultiPoint(centres), extend_to=shapely.box(0, 0, *size))
        fields = np.array(shapely.get_parts(places), dtype=object)
        point, field = shapely.STRtree(fields).query(shapely.points(centres), predicate="intersects")
        own = fields[field[np.unique(point, return_index=True)[1]]]
        wide = shapely.union(shapely.intersection(wide, own), hulls)
    outlines: NDArray[np.object_] = shapely.simplify(wide, 0.2)
    return outlines


def _centres(scene: Scene) -> Array:
    return np.array([n.centre for n in scene.nuclei], dtype=float).reshape(-1, 2)
