"""Synthetic Xenium samples in the layout of the public ones: output folder, post-Xenium H&E and its alignment.

`write_xenium(folder, seed=..., size_um=(width, height), ...)` grows a scene as the PanNuke example does, gives its
nuclei types and transcripts, places the Xenium frame by a planted affine, and returns what was planted.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from celldetr.example.expression import Expression, draw_counts, draw_types
from celldetr.example.looks import mixture_named
from celldetr.example.render import Renderer, draw_stain
from celldetr.example.shapes import Array
from celldetr.example.tissue import grow_scene
from celldetr.example.xenium_files import write_archive, write_outs
from celldetr.example.xenium_images import HE_AXES, draw_he, write_pyramid
from celldetr.example.xenium_layout import Contents, Layout, cell_names, features_of, layout_of
from celldetr.example.xenium_panel import PANEL
from celldetr.example.xenium_tissue import AffinePlan, Cells, Frames, make_cells, on_tissue, plan_frames
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic, remove

__all__ = ["AffinePlan", "Expression", "FileError", "XeniumTruth", "write_xenium"]

_WITHOUT_NUCLEUS, _TWO_NUCLEI = 0.02, 0.015  # shares of the cells, where a version knows them
_KEYPOINTS, _KEYPOINT_NOISE = 12, 0.5  # points of a table; their noise in um


@dataclass(frozen=True)
class FileError:
    """How wrong the alignment file is: a motion of the H&E in the Xenium frame, about the middle of the tissue.

    Attributes
    ----------
    shift_um
        Along x and y.
    rotation_deg
        From x towards y.
    scale
        Factor.
    """

    shift_um: tuple[float, float] = (0.0, 0.0)
    rotation_deg: float = 0.0
    scale: float = 1.0

    def motion(self, centre: Array) -> Array:
        """(3, 3) matrix on Xenium um, about a centre (2,)."""
        turn = np.eye(3)
        turn[:2, :2] = self.scale * AffinePlan(self.rotation_deg).linear()
        turn[:2, 2] = centre + np.asarray(self.shift_um) - turn[:2, :2] @ centre
        return turn


@dataclass(frozen=True)
class XeniumTruth:
    """What was planted.

    Attributes
    ----------
    name
        Name of the sample.
    outs, he_image
        Output folder and H&E.
    alignment, archive
        Alignment file and archive of the output folder; None when not written.
    matrix
        (3, 3) H&E px -> Xenium px.
    written_matrix
        The same with the error of the alignment file.
    pixel_size, he_mpp
        Um per px of the Xenium images and, as the H&E says, of the H&E.
    he_size, xenium_size
        Width and height in px.
    tissue
        (V, 2) outline of the tissue, H&E px.
    cell_ids
        (N,) str.
    looks
        (N,) str: look of the nucleus, a PanNuke class.
    types
        (N,) str: one of the ten types; "-" for necrotic cells.
    subtypes
        (N,) str: a label of the reference; "-" for necrotic cells.
    counts
        (N, G) csr int32, of the genes alone.
    genes
        G symbols.
    nuclei_he, nuclei_um
        M polygons (V, 2) of the nuclei that Xenium segments, H&E px and Xenium um.
    nucleus_cell
        (M,) index of the cell of each.
    drawn_he
        Polygons (V, 2), H&E px, of all nuclei that the H&E shows: also those outside of the Xenium frame.
    """

    name: str
    outs: Path
    he_image: Path
    alignment: Path | None
    archive: Path | None
    matrix: Array
    written_matrix: Array
    pixel_size: float
    he_mpp: float
    he_size: tuple[int, int]
    xenium_size: tuple[int, int]
    tissue: Array
    cell_ids: NDArray[np.str_]
    looks: NDArray[np.str_]
    types: NDArray[np.str_]
    subtypes: NDArray[np.str_]
    counts: sparse.csr_matrix
    genes: tuple[str, ...]
    nuclei_he: list[Array]
    nuclei_um: list[Array]
    nucleus_cell: NDArray[np.int64]
    drawn_he: list[Array]


def write_xenium(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    size_um: tuple[float, float] = (1000.0, 800.0),
    name: str = "synthetic",
    version: str = "3.0.0.15",
    label_ids: bool = True,
    pixel_size: float = 0.2125,
    he_mpp: float = 0.4,
    rim_um: float = 100.0,
    affine: AffinePlan = AffinePlan(),  # noqa: B008 - frozen
    alignment: str | None = "matrix",
    file_error: FileError = FileError(),  # noqa: B008 - frozen
    mixture: str | Mapping[str, float] = "example",
    density: float = 1.0,
    variation: float = 1.0,
    contrast: float = 1.0,
    expression: Expression = Expression(),  # noqa: B008 - frozen
    he_axes: str = "yxs",
    physical_size: bool = True,
    archive: bool = False,
) -> XeniumTruth:
    """Write a sample: ``outs/``, ``{name}_he_image.ome.tif``, and when asked the alignment and ``{name}_outs.zip``.

    The same arguments give the same tables and images.

    Parameters
    ----------
    folder
        Folder to write into.
    seed
        Seed of everything random.
    size_um
        Width and height of the tissue; the H&E is wider by the rim on each side.
    name
        Begins the names of the files.
    version
        Of Xenium Onboard Analysis: see `xenium_layout.VERSIONS`.
    label_ids
        False: boundaries do not number their polygons, as the first builds of version 2.
    pixel_size
        Um per Xenium px.
    he_mpp
        Um per H&E px.
    rim_um
        Empty glass around the tissue, whose outline is then irregular; 0: the tissue fills the H&E.
    affine
        Where the Xenium frame lies.
    alignment
        "matrix" (3 x 3), "keypoints" (a table of points), or None for no file.
    file_error
        How wrong the alignment file is.
    mixture
        Architecture -> share of the area, or the name of one of `looks.MIXTURES`.
    density
        Factor on the number of nuclei.
    variation, contrast
        Stain, see `render.draw_stain`.
    expression
        See `expression.Expression`.
    he_axes
        Order of the H&E's axes: one of `xenium_images.HE_AXES`.
    physical_size
        Whether the H&E says how large its pixels are.
    archive
        Whether to pack the output folder, too.

    Raises
    ------
    ConfigError
        A setting is unknown or out of range.
    """
    if alignment not in ("matrix", "keypoints", None):
        raise ConfigError(f"synthetic Xenium: got alignment={alignment!r}, expected 'matrix', 'keypoints' or None")
    if he_axes not in HE_AXES:
        raise ConfigError(f"synthetic Xenium: got he_axes={he_axes!r}, expected one of {', '.join(HE_AXES)}")
    layout, files = layout_of(version, label_ids=label_ids), _Files(Path(folder), name)
    rng = np.random.default_rng([seed, 3])
    frames = plan_frames(rng, size_um, rim_um=rim_um, he_mpp=he_mpp, pixel_size=pixel_size, affine=affine)
    scene = on_tissue(grow_scene(rng, *size_um, density=density, mixture=mixture_named(mixture)), frames)
    shares = (_WITHOUT_NUCLEUS, _TWO_NUCLEI) if layout.polygon_sets else (0.0, 0.0)
    cells = make_cells(rng, scene, frames, without_nucleus=shares[0], two_nuclei=shares[1])
    if not cells.looks:
        raise ConfigError(
            f"synthetic Xenium: got no cell in size_um={size_um}, density={density}; expected larger ones"
        )
    contents, types, subtypes = _contents(rng, cells, frames, layout, expression)
    renderer = Renderer(cells.scene, draw_stain(rng, variation=variation, contrast=contrast), int(rng.integers(2**31)))
    files.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files.folder, prefix=".scratch") as scratch:
        with atomic(files.outs) as temporary:
            write_outs(temporary, contents, rng, Path(scratch))
        with atomic(files.he_image) as temporary:
            image = draw_he(Path(scratch) / "he.raw", renderer, frames, axes=he_axes, seed=seed)
            mpp = he_mpp if physical_size else None
            write_pyramid(temporary, image, mpp=mpp, axes=he_axes.upper(), tile=256, scratch=Path(scratch))
            del image
    written = _write_alignment(files.alignment, alignment, frames, file_error, rng)
    remove(files.archive)
    if archive:
        with atomic(files.archive) as temporary:
            write_archive(temporary, files.outs)
    return _truth(files, contents, types, subtypes, written)


@dataclass(frozen=True)
class _Files:
    """Names of the files of a sample."""

    folder: Path
    name: str

    @property
    def outs(self) -> Path:
        return self.folder / "outs"

    @property
    def he_image(self) -> Path:
        return self.folder / f"{self.name}_he_image.ome.tif"

    @property
    def alignment(self) -> Path:
        return self.folder / f"{self.name}_he_imagealignment.csv"

    @property
    def archive(self) -> Path:
        return self.folder / f"{self.name}_outs.zip"


def _truth(
    files: _Files, contents: Contents, types: NDArray[np.str_], subtypes: NDArray[np.str_], written: Array
) -> XeniumTruth:
    frames, cells = contents.frames, contents.cells
    drawn = [frames.he_px(nucleus.outline) for nucleus in cells.scene.nuclei]
    return XeniumTruth(
        name=files.name,
        outs=files.outs,
        he_image=files.he_image,
        alignment=files.alignment if files.alignment.is_file() else None,
        archive=files.archive if files.archive.is_file() else None,
        matrix=frames.matrix,
        written_matrix=written,
        pixel_size=frames.pixel_size,
        he_mpp=frames.he_mpp,
        he_size=frames.he_size,
        xenium_size=frames.xenium_size,
        tissue=frames.he_px(frames.tissue),
        cell_ids=contents.names,
        looks=np.array(cells.looks),
        types=types,
        subtypes=subtypes,
        counts=contents.counts[:, : len(PANEL)],
        genes=PANEL,
        nuclei_he=[polygon for polygon, cell in zip(drawn, cells.nucleus_cell, strict=True) if cell >= 0],
        nuclei_um=contents.nuclei,
        nucleus_cell=contents.nucleus_cell,
        drawn_he=drawn,
    )


def _contents(
    rng: np.random.Generator, cells: Cells, frames: Frames, layout: Layout, expression: Expression
) -> tuple[Contents, NDArray[np.str_], NDArray[np.str_]]:
    """Draw names, types and counts of cells; returns what the folder tells, types (N,) and subtypes (N,)."""
    features = features_of(layout)
    prefix, names = cell_names(rng, len(cells.looks), layout)
    types, subtypes = draw_types(rng, cells.looks)
    genes = draw_counts(rng, subtypes, cells.centres, expression)
    controls = rng.poisson(0.01, (len(names), len(features.names) - len(PANEL))).astype(np.int32)
    counts = sparse.csr_matrix(sparse.hstack([genes, sparse.csr_matrix(controls)]))
    segmented = cells.nucleus_cell >= 0
    nuclei = [frames.xenium_um(n.outline) for n, keep in zip(cells.scene.nuclei, segmented, strict=True) if keep]
    owner = cells.nucleus_cell[segmented]
    return Contents(layout, frames, cells, prefix, names, counts, features, nuclei, owner), types, subtypes


def _write_alignment(path: Path, kind: str | None, frames: Frames, error: FileError, rng: np.random.Generator) -> Array:
    """Write the alignment file and return the (3, 3) matrix H&E px -> Xenium px that it means."""
    size = frames.pixel_size
    to_um, to_px = np.diag([size, size, 1.0]), np.diag([1 / size, 1 / size, 1.0])
    centre = frames.xenium_um(frames.tissue).mean(axis=0)
    written: Array = to_px @ error.motion(centre) @ to_um @ frames.matrix
    remove(path)
    if kind is None:
        return written
    with atomic(path) as temporary:
        if kind == "matrix":
            np.savetxt(temporary, written, delimiter=",", fmt="%.12g")
        else:
            points = rng.uniform([0.1, 0.1], [0.9, 0.9], (_KEYPOINTS, 2)) * np.array(frames.he_size)
            fixed = points @ written[:2, :2].T + written[:2, 2]
            fixed += _KEYPOINT_NOISE / size * rng.standard_normal(fixed.shape)
            table = np.hstack([fixed, points])
            header = "fixedX,fixedY,alignmentX,alignmentY"
            np.savetxt(temporary, table, delimiter=",", fmt="%.6f", header=header, comments="")
    return written
