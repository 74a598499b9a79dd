"""What versions 1.0 to 4 of Xenium Onboard Analysis do differently, and what a folder of one of them tells.

Formats: https://www.10xgenomics.com/support/software/xenium-onboard-analysis/latest/analysis/xoa-output-at-a-glance
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from celldetr.example.shapes import Array
from celldetr.example.xenium_panel import PANEL, gene_id
from celldetr.example.xenium_tissue import Cells, Frames
from celldetr.runtime.errors import ConfigError

VERSIONS = ("1.0.1", "1.5.0", "2.0.0", "3.0.0", "4.0.0")
"""Versions of the analysis software whose layouts are known; further digits are legal."""


@dataclass(frozen=True)
class Layout:
    """What differs between versions.

    Attributes
    ----------
    version
        As experiment.xenium tells it, without "xenium-".
    text_ids
        Cells are named (``aaaabkja-1``) rather than numbered from 1.
    seg_mask_value, polygon_sets
        How cells.zarr.zip tells the cells of its label images.
    label_ids
        Boundaries number their polygons.
    images
        Where the DAPI image lies.
    """

    version: str
    text_ids: bool
    seg_mask_value: bool
    polygon_sets: bool
    label_ids: bool
    images: tuple[str, ...]

    @property
    def major(self) -> int:
        """First number of the version."""
        return int(self.version.split(".")[0])


def layout_of(version: str, *, label_ids: bool = True) -> Layout:
    """Look up the layout of a version; without `label_ids` as the first builds of 2.0.

    Raises
    ------
    ConfigError
        Unknown version.
    """
    match = re.match(r"(\d+)\.(\d+)\.\d+(\.\d+)*$", version)
    numbers = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1, 0) <= numbers < (5, 0):
        raise ConfigError(f"synthetic Xenium: got version={version!r}, expected one like {', '.join(VERSIONS)}")
    images: tuple[str, ...] = ("morphology_focus/morphology_focus_0000.ome.tif",)
    if numbers[0] == 1:
        images = ("morphology_mip.ome.tif", "morphology_focus.ome.tif")
    elif numbers[0] >= 4:
        images = ("morphology_focus/ch0000_dapi.ome.tif",)
    late = numbers >= (2, 0)
    return Layout(version, numbers >= (1, 3), (1, 3) <= numbers < (2, 0), late, late and label_ids, images)


@dataclass(frozen=True)
class Features:
    """Rows of the count matrix: names, identifiers, kinds."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    kinds: tuple[str, ...]


def features_of(layout: Layout) -> Features:
    """List the genes and the controls that a version counts."""
    blank = "Blank Codeword" if layout.version.startswith("1.0") else "Unassigned Codeword"
    controls = [(f"NegControlProbe_{k:05d}", "Negative Control Probe") for k in range(6)]
    controls += [(f"NegControlCodeword_{500 + k:04d}", "Negative Control Codeword") for k in range(5)]
    controls += [(f"{blank.replace(' ', '')}_{k:04d}", blank) for k in range(4)]
    if layout.major >= 2:
        controls += [(f"DeprecatedCodeword_{300 + k:04d}", "Deprecated Codeword") for k in range(2)]
    names = tuple(name for name, _ in controls)
    kinds = tuple(kind for _, kind in controls)
    return Features(
        (*PANEL, *names), (*(gene_id(gene) for gene in PANEL), *names), (*["Gene Expression"] * len(PANEL), *kinds)
    )


def cell_names(rng: np.random.Generator, count: int, layout: Layout) -> tuple[NDArray[np.uint32], NDArray[np.str_]]:
    """Name the cells: prefixes (N,) uint32, ascending, and names (N,); numbers from 1 in the first versions."""
    if not layout.text_ids:
        numbers = np.arange(1, count + 1, dtype=np.uint32)
        return numbers, numbers.astype(str)
    prefix = np.cumsum(rng.integers(1, 40_000, count)).astype(np.uint32)
    digits = (prefix[:, None] >> np.arange(28, -4, -4, dtype=np.uint32)) & 0xF
    letters = np.array(list("abcdefghijklmnop"))[digits]
    return prefix, np.array(["".join(row) + "-1" for row in letters], dtype="<U10")


@dataclass(frozen=True)
class Contents:
    """What a folder tells.

    Attributes
    ----------
    layout, frames, cells
        Version, places, segmentation.
    prefix, names
        See `cell_names`.
    counts
        (N, features) int32, genes first.
    features
        Rows of the count matrix.
    nuclei
        Polygons (V, 2) in Xenium um of the nuclei that Xenium segments, by cell.
    nucleus_cell
        (M,) their cells.
    """

    layout: Layout
    frames: Frames
    cells: Cells
    prefix: NDArray[np.uint32]
    names: NDArray[np.str_]
    counts: sparse.csr_matrix
    features: Features
    nuclei: list[Array]
    nucleus_cell: NDArray[np.int64]

    @property
    def ids(self) -> NDArray[Any]:
        """Cell ids as tables hold them."""
        return self.names.astype(object) if self.layout.text_ids else self.prefix.astype(np.int32)
