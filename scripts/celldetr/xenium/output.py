"""Output folder of Xenium Onboard Analysis, versions 1.0 to 4: counts, nucleus polygons, path of the DAPI image.

Positions are um of the Xenium frame; a Xenium pixel is `pixel_size` um (0.2125).
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from scipy import sparse

from celldetr.runtime.errors import InputError

SPECS = "experiment.xenium"
NUCLEI = "nucleus_boundaries.parquet"
COUNTS = "cell_feature_matrix.h5"
_COUNT_MEMBERS = (SPECS, "cells.zarr.zip", "cells.parquet", COUNTS)
READ_MEMBERS = (*_COUNT_MEMBERS, NUCLEI, "cell_boundaries.parquet")
"""Files of the folder that are read, besides the DAPI image."""
DAPI_IMAGES = (
    "morphology_focus/ch0000_dapi.ome.tif",  # 4
    "morphology_focus/morphology_focus_0000.ome.tif",  # 2 and 3
    "morphology_mip.ome.tif",  # 1
    "morphology_focus.ome.tif",
)
"""Paths of the DAPI image, from the newest version to the oldest; DAPI is its first plane."""


def read_pixel_size(outs: str | os.PathLike[str]) -> float:
    """Read the size of a Xenium pixel, um, from experiment.xenium.

    Raises
    ------
    InputError
        The file is missing or holds no plausible pixel size.
    """
    path = _member(outs, SPECS)
    try:
        size = float(json.loads(path.read_text(encoding="utf-8"))["pixel_size"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: got no readable key 'pixel_size' ({error}); expected the file of a Xenium run"
        ) from error
    if not 0.01 < size < 10:
        raise InputError(f"{path}: pixel_size: got {size}, expected um per pixel, e.g. 0.2125")
    return size


def read_counts(outs: str | os.PathLike[str]) -> AnnData:
    """Read the transcript counts of all cells, without control probes and other features that are no genes.

    Returns
    -------
    AnnData
        Cells by genes: X (csr_matrix, float32) counts, obs index cell ids, var index gene symbols, var["gene_ids"],
        obsm["spatial"] centres of the cells, um.

    Raises
    ------
    InputError
        A file is missing or damaged.
    """
    import spatialdata_io

    for name in _COUNT_MEMBERS:
        _member(outs, name)
    unread = [
        *("cells_boundaries", "nucleus_boundaries", "cells_labels", "nucleus_labels", "transcripts"),
        *("morphology_mip", "morphology_focus", "aligned_images"),
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = spatialdata_io.xenium(Path(outs), **dict.fromkeys(unread, False)).tables["table"]
    except Exception as error:  # h5py, zarr, pyarrow and spatialdata_io each raise their own
        raise InputError(f"{outs}: cannot be read as a Xenium output folder ({error!r}); get it again") from error
    counts = AnnData(
        sparse.csr_matrix(table.X, dtype=np.float32),
        obs=table.obs[["transcript_counts"]].set_axis(table.obs_names.astype(str)),
        var=table.var[["gene_ids"]],
        obsm={"spatial": np.asarray(table.obsm["spatial"], dtype=np.float64)},
    )
    if not counts.n_obs or not counts.n_vars:
        raise InputError(f"{outs}: got {counts.n_obs} cells and {counts.n_vars} genes, expected some of each")
    return counts


def read_nuclei(outs: str | os.PathLike[str]) -> GeoDataFrame:
    """Read the outlines of all nuclei.

    Returns
    -------
    GeoDataFrame
        ``cell_id`` (str) and ``geometry`` (polygon, um), one row per nucleus; a cell may have several nuclei or none.

    Raises
    ------
    InputError
        The file is missing or damaged, or a polygon has fewer than three corners.
    """
    path = _member(outs, NUCLEI)
    try:
        table = pq.read_table(path)
        cell = table.column("cell_id").combine_chunks()
        ids = cell if pa.types.is_dictionary(cell.type) else cell.dictionary_encode()
        key = ids.indices.to_numpy().astype(np.int64)
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in ids.dictionary.to_pylist()]
        x, y = (table.column(name).cast(pa.float64()).to_numpy() for name in ("vertex_x", "vertex_y"))
        corners = np.column_stack([x, y])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected cell_id, vertex_x, vertex_y: get it again"
        ) from error
    if not len(corners):
        return GeoDataFrame({"cell_id": np.empty(0, object)}, geometry=[])
    if "label_id" in table.column_names:
        starts = _changes(table.column("label_id").to_numpy())
    else:
        starts = _ring_starts(_changes(key), corners)
    sizes = np.diff(np.append(starts, len(corners)))
    if sizes.min() < 3 or not np.isfinite(corners).all():
        raise InputError(
            f"{path}: nucleus {int(sizes.argmin())} has {sizes.min()} corners, expected finite polygons of 3 or more"
        )
    ring = np.repeat(np.arange(len(starts)), sizes)
    polygons = shapely.polygons(shapely.linearrings(corners, indices=ring))
    return GeoDataFrame({"cell_id": np.array(names, dtype=object)[key[starts]]}, geometry=polygons)


def _changes(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """Find the indices at which a new value begins, 0 included."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])).astype(np.int64)


def _ring_starts(first_of_cell: NDArray[np.int64], corners: NDArray[np.floating]) -> NDArray[np.int64]:
    """First corner of each polygon, where the table lists the corners (V, 2) by cell only (early builds of version 2).

    The next nucleus of a cell begins after the corner that closes the ring before it.
    """
    starts = []
    stops = np.append(first_of_cell[1:], len(corners))
    for first, stop in zip(first_of_cell.tolist(), stops.tolist(), strict=True):
        begin = first
        while stop - begin > 2:
            starts.append(begin)
            closing = np.flatnonzero((corners[begin + 1 : stop] == corners[begin]).all(axis=1))
            begin = begin + 2 + int(closing[0]) if closing.size else stop
        if begin == first:
            starts.append(first)
    return np.array(starts, dtype=np.int64)


def choose_members(names: Sequence[str]) -> list[str]:
    """Choose the files of an output folder that are read.

    Raises
    ------
    InputError
        A file is missing.
    """
    there = set(names)
    missing = [name for name in READ_MEMBERS if name not in there]
    images = [name for name in DAPI_IMAGES if name in there]
    if missing or not images:
        missing += [] if images else [" or ".join(DAPI_IMAGES)]
        raise InputError(f"got no {', '.join(missing)}, expected all files of a Xenium output folder")
    return [*READ_MEMBERS, images[0]]


def dapi_path(outs: str | os.PathLike[str]) -> Path:
    """Find the DAPI image.

    Raises
    ------
    InputError
        No DAPI image.
    """
    found = [Path(outs) / name for name in DAPI_IMAGES if (Path(outs) / name).is_file()]
    if not found:
        raise InputError(f"{outs}: got no DAPI image, expected one of {', '.join(DAPI_IMAGES)}; get the folder again")
    return found[0]


def _member(outs: str | os.PathLike[str], name: str) -> Path:
    path = Path(outs) / name
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected it in the output folder of a Xenium run: get it again")
    return path
