"""Output folder of Xenium Onboard Analysis, versions 1.0 to 4: counts, nucleus polygons, path of the DAPI image.

Positions are um of the Xenium frame; a Xenium pixel is `pixel_size` um (0.2125).
"""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scanpy
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from scipy import sparse

from celldetr.runtime.errors import InputError

log = logging.getLogger(__name__)

SPECS = "experiment.xenium"
NUCLEI = "nucleus_boundaries.parquet"
COUNTS = "cell_feature_matrix.h5"
CELLS = "cells.parquet"
_LEAST_COMMON, _LEAST_ALIKE = 0.9, 0.8  # share of the cells, rank correlation of their totals
_VERTEX = ("vertex_x", "vertex_y")
_NO_NUCLEI = (
    "a segmentation imported into Xenium without nuclei is not supported: import its nuclei, too, or take the original "
    "output folder"
)
READ_MEMBERS = (SPECS, "cells.zarr.zip", CELLS, COUNTS, NUCLEI, "cell_boundaries.parquet")
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

    Raises InputError if the file is missing or holds no plausible pixel size.
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

    Returns cells by genes: X (csr_matrix, float32) counts, obs index cell ids, var index gene symbols, var["gene_ids"].
    Raises InputError if the file is missing or damaged, or its cells are not those of cells.parquet.
    """
    path = _member(outs, COUNTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = scanpy.read_10x_h5(path)
    except Exception as error:  # h5py and scanpy raise many kinds of error
        raise InputError(f"{path}: cannot be read as the counts of a Xenium run ({error!r}); get it again") from error
    if not table.n_obs or not table.n_vars:
        raise InputError(f"{path}: got {table.n_obs} cells and {table.n_vars} genes, expected some of each")
    counts = sparse.csr_matrix(table.X, dtype=np.float32)
    _check_cells(path, pd.Series(counts.sum(axis=1).A1, index=table.obs_names))
    return AnnData(counts, obs=pd.DataFrame(index=table.obs_names), var=table.var[["gene_ids"]])


def _check_cells(path: Path, totals: pd.Series) -> None:
    """Compare totals, by cell id, with those of cells.parquet: numbers that are ids are alike in all runs."""
    cells = path.with_name(CELLS)
    try:
        table = pq.read_table(cells, columns=["cell_id", "transcript_counts"]).to_pandas()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{cells}: cannot be read ({error}); expected cell_id, transcript_counts") from error
    ids = [name.decode() if isinstance(name, bytes) else str(name) for name in table["cell_id"]]
    own = pd.Series(table["transcript_counts"].to_numpy(), index=ids, name="cells")
    both = totals.rename("counts").to_frame().join(own, how="inner")
    alike = both["counts"].corr(both["cells"], method="spearman") if both.nunique().min() > 1 else 1.0
    if len(both) < _LEAST_COMMON * len(totals) or alike < _LEAST_ALIKE:
        raise InputError(
            f"{path}: got counts of other cells than those of {cells}: {len(both):,} of {len(totals):,} ids are in "
            f"both, and the rank correlation of their totals is {alike:.2f}, expected {_LEAST_ALIKE} or more; get both "
            "from one run"
        )


def read_nuclei(outs: str | os.PathLike[str]) -> GeoDataFrame:
    """Read the outlines of all nuclei.

    Returns a row per nucleus: ``cell_id`` (str; empty if unknown) and ``geometry`` (polygon, um; empty if it has fewer
    than 3 corners or one that is not finite); a cell may have several nuclei or none. Raises InputError if the file is
    missing or damaged, has no nuclei, or does not say which corners are of one nucleus.
    """
    path = _member(outs, NUCLEI)
    corners = _read_corners(path)
    if not len(corners):
        raise InputError(f"{path}: got no nuclei; {_NO_NUCLEI}")
    nucleus = corners.groupby(["cell_id", "label_id"], sort=False, observed=True).ngroup().to_numpy()
    scattered = len(_changes(nucleus)) > nucleus.max() + 1
    order = np.argsort(nucleus, kind="stable")
    points, starts = corners[list(_VERTEX)].to_numpy()[order], _changes(nucleus[order])
    if (corners["label_id"] == 0).all():
        starts = _ring_starts(starts, points)
    polygons = _polygons(points, starts)
    if scattered and not shapely.is_valid(polygons).all():
        raise InputError(f"{path}: the corners of a nucleus are not in their order; get the file again")
    small = int(shapely.is_empty(polygons).sum())
    if small:
        log.warning("%s: %d of %d nuclei have fewer than 3 finite corners", path, small, len(polygons))
    cells = corners["cell_id"].iloc[order[starts]].astype(object).to_numpy()
    return GeoDataFrame({"cell_id": cells}, geometry=polygons)


def _read_corners(path: Path) -> pd.DataFrame:
    """Corners of all nuclei: cell_id, vertex_x, vertex_y, and label_id (0 if the file does not number polygons)."""
    try:
        table = pq.read_table(path)
        cell = table.column("cell_id").combine_chunks()
        ids = cell if pa.types.is_dictionary(cell.type) else cell.dictionary_encode()
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in ids.dictionary.to_pylist()]
        columns = {name: table.column(name).cast(pa.float64()).to_numpy() for name in _VERTEX}
        code = pd.Series(ids.indices.fill_null(len(names)).to_numpy(), dtype=np.int64)
        numbered = "label_id" in table.column_names
        label = table.column("label_id").cast(pa.int64()).to_pandas() if numbered else code * 0
        cells = pd.Categorical.from_codes(code, pd.Index([*names, ""]))
        corners = pd.DataFrame({**columns, "cell_id": cells, "label_id": label})
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected cell_id, vertex_x, vertex_y: get it again"
        ) from error
    unknown = int(label.isna().sum()) if numbered else ids.null_count
    if unknown:
        key = "label_id" if numbered else "cell_id"
        raise InputError(f"{path}: got {unknown} corners without {key}, expected one for each: remove these rows")
    return corners


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
        while begin == first or stop - begin > 2:
            starts.append(begin)
            closing = np.flatnonzero((corners[begin + 1 : stop] == corners[begin]).all(axis=1))
            begin = begin + 2 + int(closing[0]) if closing.size else stop
    return np.array(starts, dtype=np.int64)


def _polygons(corners: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.object_]:
    """Polygons (n,) of corners (V, 2), one from each start to the next; empty where there are too few."""
    sizes = np.diff(np.append(starts, len(corners)))
    usable = (sizes >= 3) & np.logical_and.reduceat(np.isfinite(corners).all(axis=1), starts)
    ring = np.repeat(np.where(usable, np.cumsum(usable) - 1, -1), sizes)
    polygons = np.full(len(starts), shapely.Polygon(), dtype=object)
    polygons[usable] = shapely.polygons(shapely.linearrings(corners[ring >= 0], indices=ring[ring >= 0]))
    return polygons


def choose_members(names: Sequence[str]) -> list[str]:
    """Choose the files of an output folder that are read.

    Raises InputError if one is missing.
    """
    there = set(names)
    missing = [name for name in READ_MEMBERS if name not in there]
    images = [name for name in DAPI_IMAGES if name in there]
    if missing or not images:
        missing += [] if images else [" or ".join(DAPI_IMAGES)]
        hint = f"; {_NO_NUCLEI}" if NUCLEI in missing else ""
        raise InputError(f"got no {', '.join(missing)}, expected all files of a Xenium output folder{hint}")
    return [*READ_MEMBERS, images[0]]


def dapi_path(outs: str | os.PathLike[str]) -> Path:
    """Find the DAPI image.

    Raises InputError if there is none.
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
