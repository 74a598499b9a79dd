"""Output folders in the layouts of Xenium Onboard Analysis 1.0 to 4.

Formats: https://www.10xgenomics.com/support/software/xenium-onboard-analysis/latest/analysis/xoa-output-at-a-glance
"""

import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import shapely
import zarr
from numpy.typing import NDArray
from scipy import sparse

from celldetr.example.images import label_image, write_pyramid
from celldetr.example.styles import Array
from celldetr.example.xenium.expression import PANEL, gene_id
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic

PIXEL_SIZE = 0.2125  # um
_DATE = (1980, 1, 1, 0, 0, 0)  # of members of archives, so that the same arguments give the same bytes
_GENE = "Gene Expression"
_CONTROLS = {  # kind of feature -> number of them, column of cells.parquet
    "Negative Control Probe": (6, "control_probe_counts"),
    "Negative Control Codeword": (5, "control_codeword_counts"),
    "Unassigned Codeword": (4, "unassigned_codeword_counts"),
}


@dataclass(frozen=True)
class Layout:
    """What differs between versions."""

    version: str  # as in experiment.xenium, without "xenium-"
    text_ids: bool  # cells are named (aaaabkja-1) instead of numbered from 1
    polygon_sets: bool  # from version 2: a cell may have 0 to n nuclei, and label images number polygons, not cells
    label_ids: bool  # boundaries number their polygons; the first builds of version 2 do not
    images: tuple[str, ...]  # where the DAPI image lies


CONTROLS = tuple(kind for kind, (count, _) in _CONTROLS.items() for _ in range(count))
"""Kind of each feature that is no gene."""


def layout_of(version: str, *, label_ids: bool = True) -> Layout:
    """Look up the layout of a version; without `label_ids` as the first builds of 2.0.

    Raises
    ------
    ConfigError
        Unknown version.
    """
    match = re.match(r"(\d+)\.(\d+)\.\d+(\.\d+)*$", version)
    number = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1, 0) <= number < (5, 0):
        raise ConfigError(f"example: got Xenium version {version!r}, expected one from 1.0.0 to 4.x, such as 3.0.0")
    images: tuple[str, ...] = ("morphology_focus/morphology_focus_0000.ome.tif",)
    if number[0] == 1:
        images = ("morphology_mip.ome.tif", "morphology_focus.ome.tif")
    elif number[0] == 4:
        images = ("morphology_focus/ch0000_dapi.ome.tif",)
    late = number >= (2, 0)
    return Layout(version, number >= (1, 3), late, late and label_ids, images)


@dataclass(frozen=True)
class XeniumCells:
    """What an output folder says; positions are Xenium um."""

    prefixes: NDArray[np.uint32]  # (N,) see `name_cells`
    names: NDArray[np.str_]  # (N,)
    centres: Array  # (N, 2)
    outlines: NDArray[np.object_]  # (N,) polygons
    nuclei: Array  # (M, V, 2) outlines of the segmented nuclei, by cell
    nucleus_cell: NDArray[np.intp]  # (M,) index of their cells
    counts: sparse.csr_matrix  # (N, features) int32: the genes of the panel, then the controls

    def ids(self, layout: Layout) -> NDArray[Any]:
        """Cell ids as tables hold them."""
        return self.names.astype(object) if layout.text_ids else self.prefixes.astype(np.int32)


def name_cells(rng: np.random.Generator, count: int, layout: Layout) -> tuple[NDArray[np.uint32], NDArray[np.str_]]:
    """Name cells: (N,) ascending prefixes and the names made of them; numbers from 1 in the first versions."""
    if not layout.text_ids:
        numbers = np.arange(1, count + 1, dtype=np.uint32)
        return numbers, numbers.astype(str)
    prefixes = np.cumsum(rng.integers(1, 40_000, count)).astype(np.uint32)
    digits = (prefixes[:, None] >> np.arange(28, -4, -4, dtype=np.uint32)) & 0xF
    letters = np.array(list("abcdefghijklmnop"))[digits]
    return prefixes, np.array(["".join(row) + "-1" for row in letters], dtype=str)


def write_outs(folder: Path, layout: Layout, cells: XeniumCells, dapi: NDArray[np.uint16]) -> None:
    """Write the files of an output folder, except the transcripts, which nothing reads."""
    folder.mkdir(parents=True)
    features = np.array([*PANEL, *(f"{kind.replace(' ', '')}_{number:04d}" for number, kind in enumerate(CONTROLS))])
    kinds = np.array([_GENE] * len(PANEL) + [*CONTROLS])
    specs = {
        "analysis_sw_version": f"xenium-{layout.version}",
        "num_cells": len(cells.names),
        "panel_name": "Drawn panel",
        "pixel_size": PIXEL_SIZE,
        "region_name": "region 1",
        "run_name": "drawn",
        "z_step_size": 3.0,
    }
    (folder / "experiment.xenium").write_text(json.dumps(specs, indent=2) + "\n", encoding="utf-8")
    _write_matrix(folder / "cell_feature_matrix.h5", cells, features, kinds)
    table = _cell_table(layout, cells, kinds)
    table.to_parquet(folder / "cells.parquet", index=False)
    outlines = [shapely.get_coordinates(polygon)[:-1] for polygon in cells.outlines]
    owners = cells.nucleus_cell, np.arange(len(outlines))
    for name, polygons, owner in zip(("nucleus", "cell"), (list(cells.nuclei), outlines), owners, strict=True):
        _boundaries(layout, cells, polygons, owner).to_parquet(folder / f"{name}_boundaries.parquet", index=False)
    _write_cells_zarr(folder / "cells.zarr.zip", layout, cells, table, outlines, dapi.shape)
    first, *copies = [folder / name for name in layout.images]
    first.parent.mkdir(exist_ok=True)
    write_pyramid(first, dapi, mpp=PIXEL_SIZE, step=2, tile=512, ome={"Channel": {"Name": ["DAPI"]}})
    for copy in copies:
        shutil.copyfile(first, copy)


def write_archive(path: Path, folder: Path) -> None:
    """Pack the files of an output folder, as they lie in it, into a zip."""
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), _DATE)
            with file.open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
                shutil.copyfileobj(source, member, 1 << 20)


def _write_matrix(path: Path, cells: XeniumCells, features: NDArray[np.str_], kinds: NDArray[np.str_]) -> None:
    columns = cells.counts.T.tocsc()
    columns.sort_indices()
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = cells.names.astype("S")
        matrix.create_dataset("data", data=columns.data.astype(np.int32), compression="gzip", compression_opts=1)
        matrix.create_dataset("indices", data=columns.indices.astype(np.int64), compression="gzip", compression_opts=1)
        matrix["indptr"] = columns.indptr.astype(np.int64)
        matrix["shape"] = np.array(columns.shape, dtype=np.int32)
        group = matrix.create_group("features")
        group["id"] = np.array([*map(gene_id, PANEL), *features[len(PANEL) :]], dtype="S")
        group["name"] = features.astype("S")
        group["feature_type"] = kinds.astype("S")
        group["genome"] = np.full(len(features), "Unknown", dtype="S")
        group["_all_tag_keys"] = np.array(["genome"], dtype="S")


def _cell_table(layout: Layout, cells: XeniumCells, kinds: NDArray[np.str_]) -> pd.DataFrame:
    number = np.bincount(cells.nucleus_cell, minlength=len(cells.names))
    area = np.bincount(cells.nucleus_cell, shapely.area(shapely.polygons(cells.nuclei)), minlength=len(cells.names))
    table = pd.DataFrame({"cell_id": cells.ids(layout)})
    table["x_centroid"], table["y_centroid"] = cells.centres.T
    for kind, name in {_GENE: "transcript_counts", **{kind: name for kind, (_, name) in _CONTROLS.items()}}.items():
        table[name] = np.asarray(cells.counts[:, kinds == kind].sum(axis=1)).ravel()
    table["total_counts"] = np.asarray(cells.counts.sum(axis=1)).ravel()
    table["cell_area"] = shapely.area(cells.outlines)
    table["nucleus_area"] = np.where(number > 0, area, np.nan)
    if layout.polygon_sets:
        table["nucleus_count"] = number
    return table


def _boundaries(layout: Layout, cells: XeniumCells, polygons: list[Array], owner: NDArray[np.integer]) -> pd.DataFrame:
    """One row per corner; the last corner of a polygon is its first again."""
    closed = [np.vstack([polygon, polygon[:1]]) for polygon in polygons]
    number = [len(polygon) for polygon in closed]
    table = pd.DataFrame({"cell_id": cells.ids(layout)[np.repeat(owner, number)]})
    table["vertex_x"], table["vertex_y"] = np.vstack(closed).astype(np.float32).T
    if layout.label_ids:
        table["label_id"] = np.repeat(np.arange(1, len(polygons) + 1, dtype=np.uint32), number)
    return table


def _write_cells_zarr(
    path: Path, layout: Layout, cells: XeniumCells, table: pd.DataFrame, outlines: list[Array], shape: tuple[int, ...]
) -> None:
    columns = {
        **{f"{part}_centroid_{axis}": table[f"{axis}_centroid"] for part in ("cell", "nucleus") for axis in "xy"},
        "cell_area": table["cell_area"],
        "nucleus_area": table["nucleus_area"].fillna(0),
        "z_level": np.zeros(len(table)),
    }
    if layout.polygon_sets:
        columns["nucleus_count"] = table["nucleus_count"]
    loose = path.with_name("loose.zarr.zip")
    store = zarr.storage.ZipStore(loose, mode="w")
    group = zarr.open_group(store, mode="w", zarr_format=2)
    named = np.stack([cells.prefixes, np.ones_like(cells.prefixes)], axis=1)
    group.create_array("cell_id", data=named if layout.text_ids else cells.prefixes)
    summary = np.stack([np.asarray(values, dtype=float) for values in columns.values()], axis=1)
    group.create_array("cell_summary", data=summary, attributes={"column_names": list(columns)})
    owners = cells.nucleus_cell, np.arange(len(outlines))
    for number, (polygons, owner) in enumerate(zip((list(cells.nuclei), outlines), owners, strict=True)):
        labels = label_image([polygon / PIXEL_SIZE for polygon in polygons], (shape[0], shape[1]))
        if layout.polygon_sets:
            group.create_array(f"polygon_sets/{number}/cell_index", data=owner.astype(np.uint32))
        else:
            labels = np.append(0, owner + 1)[labels]
        group.create_array(f"masks/{number}", data=labels.astype(np.uint32), chunks=(1024, 1024))
    if layout.text_ids and not layout.polygon_sets:
        group.create_array("seg_mask_value", data=np.arange(1, len(table) + 1, dtype=np.uint32))
    store.close()
    with zipfile.ZipFile(loose) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member in source.namelist():
            archive.writestr(zipfile.ZipInfo(member, _DATE), source.read(member))
    loose.unlink()
