"""The cells of a slide as an AnnData file, for scanpy and squidpy.

    X                   embeddings, float32 or float16; NaN where a cell has none
    obs                 ``type`` (categorical), scores, size, ``tile``, ``edge_um``, ``border``, ``status``; named by
                        the cells' ids
    obsm["spatial"]     x, y, um from the corner of level 0
    uns                 ``type_colors``; ``slide``, ``file``, ``mpp`` (um per px of level 0), ``model``, ``settings``,
                        ``counts``, ``areas``, ``seconds``, ``provenance``

There is no ``uns["spatial"]``: it is for images, and squidpy takes cells for spots of a grid if it is there.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem

from celldetr.cells.table import ROWS, CellFile, Floats
from celldetr.config.colours import colours_on_white
from celldetr.runtime.files import atomic

log = logging.getLogger(__name__)


def write_h5ad(cells: CellFile, path: str | os.PathLike[str], dtype: Floats = "float32") -> None:
    """Write the cells; `dtype` is that of X. At no time are all embeddings in memory.

    Raises
    ------
    OSError
        It cannot be written; if the disk is full, the error names `path`.
    """
    # HDF5 writes through a Python file: its own files hide the error of a full disk.
    with atomic(path) as temporary, temporary.open("w+b") as raw, h5py.File(raw, "w") as file:
        write_elem(file, "/", table_of(cells))
        if cells.info.width:
            # Neither chunks nor compression: embeddings do not get smaller, and backed reading is fastest.
            fill_embeddings(cells, file.create_dataset("X", (len(cells), cells.info.width), dtype))


def table_of(cells: CellFile) -> anndata.AnnData:
    """Return the cells without their embeddings: X is None, but there is a variable for each dimension."""
    obs = cells.frame()
    spatial = obs[["x_um", "y_um"]].to_numpy()
    obs = obs.drop(columns=["x_um", "y_um"]).rename(columns=_key)
    if cells.info.width and (missing := int((obs["status"] != "read").sum())):
        log.warning(
            "%s: %d of %d given cells were not read (outside, or in a damaged tile) and have no embedding (NaN); leave "
            "them out with cells[cells.obs.status == 'read']",
            cells.path,
            missing,
            len(obs),
        )
    info = cells.info
    uns: dict[str, Any] = {"slide": info.slide, "file": info.file, "mpp": info.mpp}
    for name in ("model", "settings", "counts", "areas", "seconds", "provenance"):
        uns[name] = _plain(getattr(info, name))
    if "type" in obs:
        uns["type_colors"] = np.array(colours_on_white(info.classes), dtype=object)
    var = pd.DataFrame(index=pd.Index([f"embedding_{index}" for index in range(info.width)], dtype=object))
    return anndata.AnnData(obs=obs, var=var, obsm={"spatial": spatial}, uns=uns)


def fill_embeddings(cells: CellFile, array: h5py.Dataset | zarr.Array) -> None:
    """Write all embeddings to an array (N, C) and mark it as anndata's; in blocks of `ROWS`, which are its chunks."""
    start = 0
    for block in cells.embeddings(ROWS):
        array[start : start + len(block)] = block
        start += len(block)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _key(name: str) -> str:
    """Return a name without the slash, which separates folders in HDF5 and Zarr."""
    return name.replace("/", "_")


def _plain(value: Any) -> Any:
    """Return a value of JSON as anndata stores it: no None, no mixed lists."""
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in value.items() if item is not None}
    if not isinstance(value, list | tuple):
        return value
    kinds = set(map(type, value))
    return np.array(value) if len(kinds) == 1 and kinds <= {str, bool, int, float} else json.dumps(value)
