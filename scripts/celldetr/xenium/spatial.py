"""Write a registered sample as one SpatialData Zarr, for scverse viewers and analyses."""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
import spatialdata_io
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, Identity, Scale

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.slides.multiscale import multiscale_image
from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.output import dapi_path, read_nuclei, read_pixel_size
from celldetr.xenium.registration.affine import Floats, apply, inverse, scaling
from celldetr.xenium.registration.field import DisplacementField


def write_spatialdata(
    path: str | os.PathLike[str],
    outs: str | os.PathLike[str],
    he: str | os.PathLike[str],
    matrix: NDArray[np.float64],
    cells: pd.DataFrame,
    field: DisplacementField | None = None,
) -> None:
    """Write a sample with its H&E image and cell types as a SpatialData Zarr.

    Everything is aligned in the coordinate system ``global``, in Xenium pixels: images ``he`` and ``dapi``, labels and
    outlines of cells and nuclei, transcripts if the folder has them, and the table with the columns of `cells`, which
    is indexed by the cell id. `matrix` (3, 3) maps H&E level-0 px to Xenium px. With a `field` of displacements, which
    no transformation of SpatialData holds, there are also the outlines ``nucleus_boundaries_he`` and
    ``cell_boundaries_he`` as they lie on the H&E, in its px, and the transcripts have these places as ``x_he`` and
    ``y_he``. Raises InputError if a file is missing or damaged.
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
        sample.images["he"] = multiscale_image(stained, ["r", "g", "b"], {"global": to_global})
        sample.images["dapi"] = multiscale_image(dapi, ["DAPI"], {"global": Identity()})
        if "nucleus_boundaries" not in sample.shapes:  # not read by spatialdata_io for early builds of version 2
            to_pixels = {"global": Scale([1 / pixel_size] * 2, axes=("x", "y"))}
            nuclei = read_nuclei(outs)
            sample.shapes["nucleus_boundaries"] = ShapesModel.parse(nuclei[~nuclei.is_empty], transformations=to_pixels)
        if field is not None:
            _add_he_places(sample, inverse(scaling(pixel_size) @ matrix), field, to_global)
        table = sample.tables["table"]
        for name, values in cells.reindex(table.obs["cell_id"].astype(str)).items():
            table.obs[str(name)] = values.to_numpy()
        with atomic(path) as temporary:
            sample.write(temporary)


def _add_he_places(sample: SpatialData, um_to_he: Floats, field: DisplacementField, to_global: Affine) -> None:
    """Add outlines and transcripts, um, as they lie on the H&E: moved by the field, then in its px."""

    def place(points: NDArray[np.floating]) -> Floats:
        return apply(um_to_he, field.move(points))

    def with_places(part: pd.DataFrame) -> pd.DataFrame:
        places = place(part[["x", "y"]].to_numpy(dtype=np.float64)).astype(np.float32)
        return part.assign(x_he=places[:, 0], y_he=places[:, 1])

    for name in ("nucleus_boundaries", "cell_boundaries"):
        if name in sample.shapes:
            shapes = sample.shapes[name]
            moved = shapes.set_geometry(shapely.transform(shapes.geometry.to_numpy(), place))
            moved.attrs = {}
            sample.shapes[f"{name}_he"] = ShapesModel.parse(moved, transformations={"global": to_global})
    for name, points in list(sample.points.items()):
        sample.points[name] = points.map_partitions(with_places)
