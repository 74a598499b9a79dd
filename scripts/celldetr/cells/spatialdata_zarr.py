"""The cells of a slide as a SpatialData Zarr, for napari-spatialdata and spatialdata-plot.

    shapes/cells    outlines or boxes, named by the cells' ids
    tables/table    annotates them: obs, obsm, uns and X as in the .h5ad, with the columns ``region`` and ``cell_id``
    images/he       the slide as a pyramid, if asked for

All are in px of level 0; coordinate system ``global`` is that, ``um`` is um from the corner of level 0.
"""

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import spatialdata
import zarr
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity, Scale

from celldetr.cells.h5ad import fill_embeddings, table_of
from celldetr.cells.table import ROWS, CellFile, Floats
from celldetr.config.classes import column_name
from celldetr.runtime.files import atomic
from celldetr.slides.multiscale import multiscale_image
from celldetr.slides.pyramid import open_pyramid

_CELLS, _TABLE = "cells", "table"


def write_spatialdata(
    cells: CellFile,
    path: str | os.PathLike[str],
    dtype: Floats = "float32",
    image: str | os.PathLike[str] | None = None,
) -> None:
    """Write the cells, and the pixels of the slide file `image` if one is given.

    Outlines and embeddings are copied batch by batch: SpatialData writes one outline and no embeddings.

    Raises
    ------
    InputError
        The image cannot be read.
    OSError
        It cannot be written; if the disk is full, the error names `path`.
    """
    frames = {"global": Identity(), "um": Scale([cells.info.mpp] * 2, axes=("x", "y"))}
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        elements: dict[str, Any] = {_TABLE: _table(cells)}
        if len(cells):
            first = geopandas.GeoDataFrame(geometry=next(cells.outlines(1)), index=elements[_TABLE].obs_names[:1])
            elements[_CELLS] = ShapesModel.parse(first, transformations=dict(frames))
        if image is not None:
            pyramid = stack.enter_context(open_pyramid(image, cells.info.mpp))
            elements["he"] = multiscale_image(pyramid, ["r", "g", "b"], frames)
        data = spatialdata.SpatialData.init_from_elements(elements)
        with atomic(path) as temporary:
            data.write(temporary)
            if len(cells):
                _copy_outlines(cells, temporary / "shapes" / _CELLS / "shapes.parquet")
            if cells.info.width:
                group = zarr.open_group(temporary / "tables" / _TABLE, mode="r+")
                shape = (len(cells), cells.info.width)
                array = group.create_array(
                    "X", shape=shape, chunks=(ROWS // 4, shape[1]), dtype=dtype, compressors=None, fill_value=0
                )
                fill_embeddings(cells, array)
                zarr.consolidate_metadata(temporary)


def _table(cells: CellFile) -> Any:
    """Return the table of the cells, which annotates their outlines."""
    table = table_of(cells)
    table.obs.index.name = None
    table.obs.columns = [column_name(name) for name in table.obs.columns]
    if "type" in table.obs:  # spatialdata-plot takes colours of other types if there is one without cells
        colours = dict(zip(table.obs["type"].cat.categories, table.uns["type_colors"], strict=True))
        table.obs["type"] = table.obs["type"].cat.remove_unused_categories()
        table.uns["type_colors"] = np.array([colours[kind] for kind in table.obs["type"].cat.categories], dtype=object)
    if len(cells):
        table.obs["region"] = pd.Categorical([_CELLS]).repeat(len(cells))
        table.obs["cell_id"] = table.obs_names
        keys = {"region": _CELLS, "region_key": "region", "instance_key": "cell_id"}
        table.uns["spatialdata_attrs"] = keys
    return table


def _copy_outlines(cells: CellFile, path: Path) -> None:
    """Write the outlines of all cells as GeoParquet, with the columns that the file at `path` has."""
    schema = pq.read_schema(path)
    name = next(name for name in schema.names if name != "geometry")
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for batch in cells.batches(["cell_id", "geometry"]):
            columns = {name: batch["cell_id"], "geometry": batch["geometry"]}
            file.write_table(pa.table(columns).select(schema.names).cast(schema))
