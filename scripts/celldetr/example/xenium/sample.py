"""Drawing a Xenium sample: H&E and DAPI show the same nuclei, their frames differ by a planted affine."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.drawing import draw_dapi, draw_he
from celldetr.example.images import label_image, write_pyramid
from celldetr.example.styles import Array
from celldetr.example.tissue import Scene, SceneNuclei, grow_scene
from celldetr.example.xenium.expression import PANEL, draw_counts, draw_types
from celldetr.example.xenium.files import (
    CONTROLS,
    PIXEL_SIZE,
    Layout,
    XeniumCells,
    layout_of,
    name_cells,
    write_archive,
    write_outs,
)
from celldetr.runtime.files import atomic

_FRAME = 20.0  # um of empty glass around the tissue in the Xenium images
_CYTOPLASM = 4.0  # um by which cells are larger than their nuclei
_WITHOUT_NUCLEUS, _TWO_NUCLEI = 0.02, 0.015  # shares of the cells, where a version can say so
_PAIR = 12.0  # um; largest distance of the nuclei of one cell
_TO_PX = np.diag([1 / PIXEL_SIZE, 1 / PIXEL_SIZE, 1.0])  # Xenium um -> Xenium px
_KEYPOINTS, _KEYPOINT_NOISE = 12, 0.5  # points of an alignment table; their noise in um


@dataclass(frozen=True)
class AffinePlan:
    """A motion in um."""

    rotation_deg: float = 0.0  # turn from x towards y (clockwise on the screen)
    shift_um: tuple[float, float] = (0.0, 0.0)  # along x and y, after the turn
    shear: float = 0.0  # shift along x per um of y, before the turn

    def matrix(self, centre: Array) -> Array:
        """(3, 3) matrix of the motion about a centre (2,)."""
        c, s = np.cos(np.deg2rad(self.rotation_deg)), np.sin(np.deg2rad(self.rotation_deg))
        matrix = np.eye(3)
        matrix[:2, :2] = np.array([[c, -s], [s, c]]) @ np.array([[1.0, self.shear], [0.0, 1.0]])
        matrix[:2, 2] = centre + self.shift_um - matrix[:2, :2] @ centre
        return matrix


@dataclass(frozen=True)
class XeniumTruth:
    """What was planted: N cells, M nuclei that Xenium segments, K nuclei that the H&E shows."""

    outs: Path  # output folder
    he_image: Path
    alignment: Path | None  # None if not written
    archive: Path | None  # zip of the output folder; None if not written
    matrix: Array  # (3, 3) H&E px -> Xenium px
    written_matrix: Array  # (3, 3) the same with the error of the alignment file
    he_mpp: float
    he_size: tuple[int, int]  # width and height in px
    xenium_size: tuple[int, int]
    tissue: Array  # (T, 2) outline of the tissue, H&E px
    cell_ids: NDArray[np.str_]  # (N,)
    classes: NDArray[np.str_]  # (N,) PanNuke class
    types: NDArray[np.str_]  # (N,) one of the ten types, "-" for necrotic cells
    counts: sparse.csr_matrix  # (N, genes) int32
    nuclei_he: Array  # (M, V, 2) outlines, H&E px
    nuclei_um: Array  # (M, V, 2) outlines, Xenium um
    nucleus_cell: NDArray[np.intp]  # (M,) index of the nucleus' cell
    drawn_he: Array  # (K, V, 2) outlines, H&E px: also of nuclei outside of the Xenium frame
    pixel_size: float = PIXEL_SIZE  # um per px of the Xenium images
    genes: tuple[str, ...] = PANEL


def write_xenium(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    size_um: tuple[float, float] = (1000.0, 800.0),
    name: str = "drawn",
    version: str = "3.0.0.15",
    label_ids: bool = True,
    he_mpp: float = 0.4,
    rim_um: float = 100.0,
    affine: AffinePlan = AffinePlan(),  # noqa: B008 - frozen
    alignment: str | None = "matrix",
    file_error: AffinePlan = AffinePlan(),  # noqa: B008 - frozen
    archive: bool = False,
) -> XeniumTruth:
    """Write ``outs/``, ``{name}_he_image.ome.tif``, and if asked the alignment and ``{name}_outs.zip``, into a folder.

    The same arguments give the same bytes. `size_um` is width and height of the tissue, `rim_um` the empty glass around
    it, whose border is then irregular; without a rim the tissue fills the H&E. `affine` says how the Xenium frame lies
    to the H&E; a shift below 0 cuts off a part of the tissue. `alignment` is "matrix" (3 x 3), "keypoints" (a table of
    points), or None for no file; `file_error` moves the H&E in the Xenium frame, about the middle of the tissue. For
    `version` and `label_ids` see `layout_of`. Raises ConfigError if the version is unknown or no nucleus fits.
    """
    layout = layout_of(version, label_ids=label_ids)
    rng = np.random.default_rng([seed, 3])
    scene = grow_scene(rng, size_um, irregular=rim_um > 0)
    to_um, xenium_size = _place_frame(scene.border, affine)
    scene, segmented, classes, types, cells = _draw_cells(rng, scene, to_um, xenium_size, layout)
    target, rim = Path(folder), int(np.ceil(rim_um / he_mpp))
    outs, he_image = target / "outs", target / f"{name}_he_image.ome.tif"
    packed = target / f"{name}_outs.zip" if archive else None
    to_px = _TO_PX @ to_um
    labels = label_image(_apply(to_px, scene.nuclei.outlines), xenium_size[::-1])
    dapi = draw_dapi(rng, scene.nuclei, labels, _apply(to_px, scene.border), PIXEL_SIZE)
    with atomic(outs) as temporary:
        write_outs(temporary, layout, cells, dapi)
    image, _ = draw_he(rng, scene, he_mpp, rim=rim)
    with atomic(he_image) as temporary:
        write_pyramid(temporary, image, mpp=he_mpp, step=2, tile=256, ome={"axes": "YXS"})
    he_size = image.shape[1], image.shape[0]
    matrix = to_px @ np.array([[he_mpp, 0, -rim * he_mpp], [0, he_mpp, -rim * he_mpp], [0, 0, 1]])
    error = file_error.matrix(_apply(to_um, scene.border).mean(axis=0))
    written = _TO_PX @ error @ np.linalg.inv(_TO_PX) @ matrix
    table = _write_alignment(rng, target / f"{name}_he_imagealignment.csv", written, he_size, alignment)
    if packed:
        write_archive(packed, outs)
    drawn = scene.nuclei.outlines / he_mpp + rim
    return XeniumTruth(
        outs=outs,
        he_image=he_image,
        alignment=table,
        archive=packed,
        matrix=matrix,
        written_matrix=written,
        he_mpp=he_mpp,
        he_size=he_size,
        xenium_size=xenium_size,
        tissue=scene.border / he_mpp + rim,
        cell_ids=cells.names,
        classes=classes,
        types=types,
        counts=cells.counts[:, : len(PANEL)],
        nuclei_he=drawn[segmented],
        nuclei_um=cells.nuclei,
        nucleus_cell=cells.nucleus_cell,
        drawn_he=drawn,
    )


def _draw_cells(
    rng: np.random.Generator, scene: Scene, to_um: Array, xenium_size: tuple[int, int], layout: Layout
) -> tuple[Scene, NDArray[np.bool_], NDArray[np.str_], NDArray[np.str_], XeniumCells]:
    """Make N cells of the nuclei of a scene, and draw their types, transcripts and names.

    Returns
    -------
    tuple
        The tissue as both images show it, its K nuclei by cell; mask (K,) of the nuclei that Xenium segments; PanNuke
        class (N,) and type (N,) of the cells; the cells.
    """
    scene, nucleus_cell, classes, centres, outlines = _segment(rng, scene, to_um, xenium_size, layout)
    types, subtypes = draw_types(rng, classes)
    genes = draw_counts(rng, subtypes, centres)
    controls = sparse.csr_matrix(rng.poisson(0.01, (len(classes), len(CONTROLS))).astype(np.int32))
    prefixes, names = name_cells(rng, len(classes), layout)
    segmented = nucleus_cell >= 0
    cells = XeniumCells(
        prefixes=prefixes,
        names=names,
        centres=centres,
        outlines=outlines,
        nuclei=_apply(to_um, scene.nuclei.outlines[segmented]),
        nucleus_cell=nucleus_cell[segmented],
        counts=sparse.csr_matrix(sparse.hstack([genes, controls])),
    )
    return scene, segmented, classes, types, cells


def _apply(matrix: Array, points: Array) -> Array:
    """Move points (..., 2) by a (3, 3) matrix."""
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2])


def _place_frame(border: Array, affine: AffinePlan) -> tuple[Array, tuple[int, int]]:
    """(3, 3) matrix scene um -> Xenium um, and width and height of the Xenium images in px."""
    matrix = affine.matrix(np.zeros(2))
    moved = _apply(matrix, border)
    start = moved.min(axis=0) - affine.shift_um - _FRAME
    matrix[:2, 2] -= start
    width, height = np.ceil((moved.max(axis=0) - start + _FRAME) / PIXEL_SIZE).astype(int).tolist()
    return matrix, (width, height)


def _segment(
    rng: np.random.Generator, scene: Scene, to_um: Array, xenium_size: tuple[int, int], layout: Layout
) -> tuple[Scene, NDArray[np.intp], NDArray[np.str_], Array, NDArray[np.object_]]:
    """Make cells of the nuclei of a scene; some cells own two of them, some have none in the section.

    Returns
    -------
    scene
        The tissue as both images show it, its K nuclei by cell.
    nucleus_cell : (K,)
        Index of their cells; -1 for those outside of the Xenium frame.
    classes, centres, outlines
        (N,) PanNuke class, (N, 2) Xenium um, (N,) polygons of the cells.
    """
    nuclei, size = scene.nuclei, np.array(xenium_size) * PIXEL_SIZE
    moved = _apply(to_um, nuclei.outlines)
    inside = np.asarray(((moved >= 0) & (moved <= size)).all(axis=(1, 2)))
    owner = np.arange(len(nuclei))
    ghost = np.zeros(len(nuclei), dtype=bool)
    if layout.polygon_sets:
        first, second = _pairs(rng, nuclei, inside).T
        owner[second] = first
        alone = np.bincount(owner, minlength=len(owner)) == 1
        ghost = alone & inside & (rng.random(len(owner)) < _WITHOUT_NUCLEUS)
    kept = np.unique(owner[inside])
    number = np.full(len(owner), -1)
    number[kept] = np.arange(len(kept))
    cell = np.where(inside, number[owner], -1)
    drawn = np.argsort(cell, kind="stable")
    drawn = drawn[~ghost[drawn]]
    hulls = shapely.convex_hull(shapely.multipoints(moved[kept]))
    for k in np.flatnonzero(inside & (owner != np.arange(len(owner)))):
        hulls[number[owner[k]]] = shapely.convex_hull(shapely.multipoints(np.vstack([moved[k], moved[owner[k]]])))
    centres = moved[kept].mean(axis=1)
    classes = np.array(PANNUKE_CLASSES)[nuclei.classes[kept]]
    scene = replace(scene, nuclei=nuclei.take(drawn))
    return scene, cell[drawn], classes, centres, _outline_cells(hulls, centres, size)


def _pairs(rng: np.random.Generator, nuclei: SceneNuclei, inside: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(P, 2) nuclei of one class that are each other's nearest neighbour."""
    near = cKDTree(nuclei.centres).query(nuclei.centres, k=2, distance_upper_bound=_PAIR)[1][:, -1]
    one = np.flatnonzero(near < len(nuclei))
    other = near[one]
    mutual = (near[other] == one) & (one < other) & inside[one] & inside[other]
    mutual &= nuclei.classes[one] == nuclei.classes[other]
    found = np.stack([one, other], axis=1)[mutual]
    return rng.permutation(found)[: int(np.ceil(_TWO_NUCLEI * len(nuclei)))]


def _outline_cells(hulls: NDArray[np.object_], centres: Array, size: Array) -> NDArray[np.object_]:
    """Polygons of cells: their nuclei widened, and cut half way to the centres of their neighbours."""
    frame = shapely.box(0, 0, *size)
    wide = shapely.intersection(shapely.buffer(hulls, _CYTOPLASM, quad_segs=4), frame)
    if len(centres) > 1:
        fields = np.array(shapely.get_parts(shapely.voronoi_polygons(shapely.MultiPoint(centres), extend_to=frame)))
        point, field = shapely.STRtree(fields).query(shapely.points(centres), predicate="intersects")
        own = fields[field[np.unique(point, return_index=True)[1]]]
        wide = shapely.union(shapely.intersection(wide, own), hulls)
    return np.asarray(shapely.simplify(wide, 0.2))


def _write_alignment(
    rng: np.random.Generator, path: Path, matrix: Array, he_size: tuple[int, int], kind: str | None
) -> Path | None:
    """Write a matrix H&E px -> Xenium px as 3 x 3 numbers, or as a table of noisy points; returns the path, if any."""
    if kind is None:
        return None
    with atomic(path) as temporary:
        if kind == "matrix":
            np.savetxt(temporary, matrix, delimiter=",", fmt="%.12g")
            return path
        points = rng.uniform(0.1, 0.9, (_KEYPOINTS, 2)) * he_size
        fixed = _apply(matrix, points) + _KEYPOINT_NOISE / PIXEL_SIZE * rng.standard_normal(points.shape)
        header = "fixedX,fixedY,alignmentX,alignmentY"
        np.savetxt(temporary, np.hstack([fixed, points]), delimiter=",", fmt="%.6f", header=header, comments="")
    return path
