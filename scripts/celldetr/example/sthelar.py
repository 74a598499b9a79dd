"""Drawn sections in the layout of STHELAR: files of patches, a table of their places, and the cells of each section.

A patch has 256 px; neighbours overlap by 64 px, as those of STHELAR do, and patches without a nucleus are left out.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.drawing import draw_he
from celldetr.example.tissue import grow_scene
from celldetr.example.xenium.expression import draw_types
from celldetr.runtime.files import atomic

MPP = 0.274
"""um per px of the drawn patches, about that of the H&E images of 10x Genomics."""
SIDE, STEP = 256, 192  # px
_GROUPS: Mapping[str, str] = {
    **dict.fromkeys(("T", "NK"), "T_NK"),
    **dict.fromkeys(("B", "Plasma"), "B_Plasma"),
    **dict.fromkeys(("Myeloid", "Mast"), "Myeloid"),
    **dict.fromkeys(("Epithelial", "Malignant"), "Epithelial"),
    "Endothelial": "Blood_vessel",
    "Fibroblast": "Fibroblast_Myofibroblast",
}
"""STHELAR's category of each of our types; that of all other cells is Other."""
_BAD_PATCH = 7  # each so many-th patch has poor scores of quality
_ROW_GROUP = 16


@dataclass(frozen=True)
class DrawnSection:
    """A section: its patches (N) and its cells (C)."""

    name: str
    images: NDArray[np.uint8]  # (N, SIDE, SIDE, 3)
    maps: NDArray[np.int64]  # (N, SIDE, SIDE) ids of cells
    corners: NDArray[np.int64]  # (N, 2) px
    quality: NDArray[np.float16]  # (N, 3) Dice, Jaccard, bPQ
    ids: NDArray[np.int64]  # (C,)
    types: Sequence[str]  # (C,) of `ST_TYPES`, or another text
    areas: NDArray[np.float64]  # (C,) of the nuclei, um^2

    @property
    def names(self) -> list[str]:
        """File name of each patch."""
        return [f"{self.name}_{number}.png" for number in range(len(self.images))]


def draw_section(name: str, size: tuple[int, int], seed: Sequence[int], mpp: float = MPP) -> DrawnSection:
    """Draw a section of as many patches across and down."""
    rng = np.random.default_rng(seed)
    pixels = [SIDE + (count - 1) * STEP for count in size]
    scene = grow_scene(rng, (pixels[0] * mpp, pixels[1] * mpp), "example")
    image, number = draw_he(rng, scene, mpp)
    types, _ = draw_types(rng, [PANNUKE_CLASSES[index] for index in scene.nuclei.classes])
    ids = np.sort(rng.choice(2**32 - 1, len(types), replace=False)) + 1
    maps = np.append(0, ids)[number]
    corners = np.array([(x * STEP, y * STEP) for y in range(size[1]) for x in range(size[0])])
    full = np.array([bool(maps[y : y + SIDE, x : x + SIDE].any()) for x, y in corners])
    corners = corners[full]
    quality = rng.uniform(0.6, 0.9, (len(corners), 3))
    quality[_BAD_PATCH - 1 :: _BAD_PATCH] = 0.1
    return DrawnSection(
        name,
        np.stack([image[y : y + SIDE, x : x + SIDE] for x, y in corners]),
        np.stack([maps[y : y + SIDE, x : x + SIDE] for x, y in corners]),
        corners,
        quality.astype(np.float16),
        ids,
        list(types),
        np.asarray(np.bincount(number.ravel(), minlength=len(ids) + 1)[1:] * mpp**2, np.float64),
    )


def write_sthelar(folder: Path, sections: Sequence[DrawnSection], shards: int = 2) -> None:
    """Write sections as a copy of the data set; the patches of all lie in as many files, one section after another."""
    with atomic(folder) as temporary:
        for part in ("data", "cell_metadata"):
            (temporary / part).mkdir(parents=True)
        patches = pa.concat_tables([patch_table(section) for section in sections])
        ends = np.linspace(0, len(patches), shards + 1).astype(int)
        for number, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            path = temporary / "data" / f"train-{number:05}-of-{shards:05}.parquet"
            pq.write_table(patches.slice(start, stop - start), path, row_group_size=_ROW_GROUP)
        places = pa.concat_tables([place_table(section) for section in sections])
        pq.write_table(places, temporary / "patches_overview_sthelar40x.parquet")
        for section in sections:
            path = temporary / "cell_metadata" / f"{section.name}_cell_metadata.parquet"
            pq.write_table(cell_table(section), path)


def patch_table(section: DrawnSection) -> pa.Table:
    """Rows of the patches."""
    names = section.names
    images = [{"bytes": _png(image), "path": name} for name, image in zip(names, section.images, strict=True)]
    columns: dict[str, Any] = {
        "file_name": pa.array(names),
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "slide_id": pa.array([section.name] * len(names)),
        "tissue": pa.array([0] * len(names)),
        "cell_id_map": pa.array([_npz(ids) for ids in section.maps], pa.binary()),
    }
    columns |= {key: pa.array(section.quality[:, index]) for index, key in enumerate(("Dice", "Jaccard", "bPQ"))}
    return pa.table(columns)


def place_table(section: DrawnSection) -> pa.Table:
    """Places of the patches."""
    low, high = section.corners, section.corners + SIDE
    columns = {"file_name": section.names, "slide_id": [section.name] * len(low)}
    values = {"xmin": low[:, 0], "ymin": low[:, 1], "xmax": high[:, 0], "ymax": high[:, 1]}
    return pa.table({**columns, **values})


def cell_table(section: DrawnSection) -> pa.Table:
    """Cells, with ids as the maps have them: 32-bit integers."""
    cancer = {"Malignant": "cancer_cell"}
    groups = [_GROUPS.get(kind, "Other") for kind in section.types]
    return pa.table(
        {
            "cell_id_int": section.ids.astype(np.uint32).astype(np.int32),
            "cells_final_label_group": groups,
            "cells_label3": [cancer.get(kind, "normal_cell") for kind in section.types],
            "nucleus_area": section.areas,
        }
    )


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _npz(ids: NDArray[np.int64]) -> bytes:
    buffer = io.BytesIO()
    sparse.save_npz(buffer, sparse.csr_matrix(ids.astype(np.uint32).astype(np.int32)))
    return buffer.getvalue()
