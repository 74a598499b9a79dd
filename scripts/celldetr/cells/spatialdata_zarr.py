"""The cells of a slide as a SpatialData Zarr, for napari-spatialdata and spatialdata-plot.

    shapes/cells    outlines or boxes, named by the cells' ids
    tables/table    annotates them: obs, obsm, uns and X as in the .h5ad, with the columns ``region`` and ``cell_id``
    images/he       the slide as a pyramid, if it is to be written

If the slide is to be linked, the attributes of the whole say where it lies, and `read_spatialdata` adds it as image
``he``: Zarr has no way to name pixels of another file.

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
from spatialdata.transformations import BaseTransformation, Identity, Scale

from celldetr.cells.h5ad import fill_embeddings, table_of
from celldetr.cells.table import ROWS, CellFile, CellsInfo, Floats
from celldetr.config.classes import column_name
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.slides.multiscale import levels_as_image, multiscale_image
from celldetr.slides.pyramid import Pyramid, open_pyramid

_CELLS, _TABLE, _IMAGE = "cells", "table", "he"
_CHANNELS = ("r", "g", "b")
_SLIDE = "slide"  # attribute


def write_spatialdata(
    cells: CellFile,
    path: str | os.PathLike[str],
    dtype: Floats = "float32",
    image: str | os.PathLike[str] | None = None,
    *,
    link: bool = False,
) -> None:
    """Write the cells, and the pixels of the slide file `image` if one is given, or with `link` where it lies.

    Outlines and embeddings are copied batch by batch: SpatialData writes one outline and no embeddings.

    Raises
    ------
    InputError
        The image cannot be read, or is of another size than the slide of the cells.
    OSError
        It cannot be written; if the disk is full, the error names `path`.
    """
    frames, attrs = _frames(cells.info.mpp), dict[str, Any]()
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        elements: dict[str, Any] = {_TABLE: _table(cells)}
        if len(cells):
            first = geopandas.GeoDataFrame(geometry=next(cells.outlines(1)), index=elements[_TABLE].obs_names[:1])
            elements[_CELLS] = ShapesModel.parse(first, transformations=dict(frames))
        if image is not None:
            pyramid = stack.enter_context(_open(image, cells.info.mpp, cells.info.size, cells.path))
            if link:
                attrs[_SLIDE] = _link(Path(image), Path(path), cells.info)
            else:
                elements[_IMAGE] = multiscale_image(pyramid, _CHANNELS, frames)
        data = spatialdata.SpatialData.init_from_elements(elements, attrs=attrs)
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


def read_spatialdata(
    path: str | os.PathLike[str], slide: str | os.PathLike[str] | None = None
) -> spatialdata.SpatialData:
    """Read cells of which `write_spatialdata` has linked the slide, with the slide as image ``he``.

    Its pixels are decoded where, and at the level at which, they are used. `slide` is its file if that has moved.

    Raises
    ------
    InputError
        No slide is linked; its file is not where it was, cannot be read or is of another size.
    """
    data = spatialdata.read_zarr(path)
    about = data.attrs.get(_SLIDE)
    if about is None:
        raise InputError(f"{path}: got no link to a slide, expected SpatialData that was written with image: link")
    file = Path(path, about["file"]) if slide is None else Path(slide)
    if not file.exists():
        raise InputError(f"{path}: its slide is not at {file}; give its place: read_spatialdata({str(path)!r}, SLIDE)")
    pyramid = _open(file, about["mpp"], tuple(about["size"]), path)
    data.images[_IMAGE] = levels_as_image(pyramid, _CHANNELS, _frames(about["mpp"]))
    return data


def _open(image: str | os.PathLike[str], mpp: float, size: tuple[int, ...], cells: str | os.PathLike[str]) -> Pyramid:
    """Open the slide of cells, which must have this `size`."""
    pyramid = open_pyramid(image, mpp)
    if pyramid.size != size:
        pyramid.close()
        got, expected = (" x ".join(map(str, one)) for one in (pyramid.size, size))
        raise InputError(f"{image}: got a slide of {got} px, expected {expected}, as of {cells}; is it another slide?")
    return pyramid


def _link(image: Path, path: Path, info: CellsInfo) -> dict[str, Any]:
    """Return what leads a reader to the slide: its place as seen from the Zarr, and how it is opened."""
    place = os.path.relpath(image.parent.resolve() / image.name, path.parent.resolve() / path.name)
    return {
        "file": Path(place).as_posix(),
        "size": list(info.size),
        "mpp": info.mpp,
        "open": f"from {__name__} import read_spatialdata; sdata = read_spatialdata({path.name!r})",
    }


def _frames(mpp: float) -> dict[str, BaseTransformation]:
    return {"global": Identity(), "um": Scale([mpp] * 2, axes=("x", "y"))}


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
