"""Write a registered sample as one SpatialData Zarr, for scverse viewers and analyses."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import spatialdata_io
from dask.array.core import normalize_chunks
from numpy.typing import NDArray
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, BaseTransformation, Identity, Scale

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.slides.pyramid import Pyramid, open_pyramid
from celldetr.xenium.output import dapi_path, read_nuclei, read_pixel_size

_CHUNK = 1024  # px
_SMALLEST = 1024  # px; longer side of the coarsest level at most


def write_spatialdata(
    path: str | os.PathLike[str],
    outs: str | os.PathLike[str],
    he: str | os.PathLike[str],
    matrix: NDArray[np.float64],
    cells: pd.DataFrame,
) -> None:
    """Write a sample with its H&E image and cell types as a SpatialData Zarr.

    Everything is aligned in the coordinate system ``global``, in Xenium pixels: images ``he`` and ``dapi``, labels and
    outlines of cells and nuclei, transcripts if the folder has them, and the table with the columns of `cells`, which
    is indexed by the cell id. `matrix` (3, 3) maps H&E level-0 px to Xenium px. Raises InputError if a file is missing
    or damaged.
    """
    pixel_size = read_pixel_size(outs)
    with warnings.catch_warnings(), open_pyramid(he) as stained, open_pyramid(dapi_path(outs), plane=0) as dapi:
        warnings.simplefilter("ignore")
        there = (Path(outs) / "transcripts.parquet").is_file()
        images = dict.fromkeys(("morphology_mip", "morphology_focus", "aligned_images"), False)
        try:
            sample = spatialdata_io.xenium(Path(outs), transcripts=there, **images)
        except Exception as error:  # zarr, pyarrow and spatialdata_io each raise their own
            raise InputError(
                f"{outs}: cannot be read by spatialdata_io ({error!r}), which needs the cells and nuclei of the run "
                "itself (cells.zarr.zip), not an imported segmentation: get the original output folder"
            ) from error
        to_global = Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
        sample.images["he"] = _image(stained, ["r", "g", "b"], to_global)
        sample.images["dapi"] = _image(dapi, ["DAPI"], Identity())
        if "nucleus_boundaries" not in sample.shapes:  # not read by spatialdata_io for early builds of version 2
            to_pixels = {"global": Scale([1 / pixel_size] * 2, axes=("x", "y"))}
            nuclei = read_nuclei(outs)
            sample.shapes["nucleus_boundaries"] = ShapesModel.parse(nuclei[~nuclei.is_empty], transformations=to_pixels)
        table = sample.tables["table"]
        for name, values in cells.reindex(table.obs["cell_id"].astype(str)).items():
            table.obs[str(name)] = values.to_numpy()
        with atomic(path) as temporary:
            sample.write(temporary)


def _image(image: Pyramid, channels: list[str], transformation: BaseTransformation) -> object:
    """Wrap an image as a pyramid whose pixels are read block by block when it is written."""
    width, height = image.size

    def block(block_info: Mapping[None, Mapping[str, list[tuple[int, int]]]]) -> NDArray[np.generic]:
        (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]
        pixels = image.read(0, x0, y0, x1 - x0, y1 - y0)
        return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]

    chunks = normalize_chunks((-1, _CHUNK, _CHUNK), (len(channels), height, width))
    pixels = da.map_blocks(block, chunks=chunks, dtype=image.dtype, meta=np.empty((0, 0, 0), image.dtype))
    halvings = max(0, int(np.ceil(np.log2(max(width, height) / _SMALLEST))))
    return Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=channels,
        scale_factors=[2] * halvings or None,
        transformations={"global": transformation},
        chunks=(len(channels), _CHUNK, _CHUNK),
    )
