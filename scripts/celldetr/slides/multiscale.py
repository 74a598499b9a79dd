"""An image as a multiscale element of SpatialData, which is read block by block when it is written or shown."""

from collections.abc import Mapping, Sequence

import dask.array as da
import numpy as np
from dask.array.core import normalize_chunks
from numpy.typing import NDArray
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, set_transformation
from xarray import DataArray, Dataset, DataTree

from celldetr.slides.pyramid import Pyramid

_CHUNK = 1024  # px
_SMALLEST = 1024  # px; longer side of the coarsest level at most
_DIMS = ("c", "y", "x")


def multiscale_image(
    image: Pyramid, channels: Sequence[str], transformations: Mapping[str, BaseTransformation]
) -> object:
    """Wrap level 0 of an image as a pyramid; `transformations` lead from its px to coordinate systems."""
    halvings = max(0, int(np.ceil(np.log2(max(image.size) / _SMALLEST))))
    return Image2DModel.parse(
        _pixels(image, 0, len(channels)),
        dims=_DIMS,
        c_coords=list(channels),
        scale_factors=[2] * halvings or None,
        transformations=dict(transformations),
        chunks=(len(channels), _CHUNK, _CHUNK),
    )


def levels_as_image(
    image: Pyramid, channels: Sequence[str], transformations: Mapping[str, BaseTransformation]
) -> object:
    """Wrap all levels of an image as they are: to show a part, no more than that is decoded.

    An image without further levels gets those of `multiscale_image`. `image` must stay open.
    """
    if len(image.levels) == 1:
        return multiscale_image(image, channels, transformations)
    scales = {}
    for number, level in enumerate(image.levels):
        coords = {
            "c": list(channels),
            **{
                axis: (np.arange(side) + 0.5) * whole / side
                for axis, side, whole in zip("yx", (level.height, level.width), image.size[::-1], strict=True)
            },
        }
        pixels = DataArray(_pixels(image, number, len(channels)), dims=_DIMS, coords=coords)
        scales[f"scale{number}"] = Dataset({"image": pixels})
    tree = DataTree.from_dict(scales)
    set_transformation(tree, dict(transformations), set_all=True)
    Image2DModel().validate(tree)
    return tree


def _pixels(image: Pyramid, level: int, channels: int) -> da.Array:
    """Return a level (C, H, W) that is decoded where it is used."""

    def block(block_info: Mapping[None, Mapping[str, list[tuple[int, int]]]]) -> NDArray[np.generic]:
        (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]
        pixels = image.read(level, x0, y0, x1 - x0, y1 - y0)
        return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]

    shape = (channels, image.levels[level].height, image.levels[level].width)
    chunks = normalize_chunks((-1, _CHUNK, _CHUNK), shape)
    return da.map_blocks(block, chunks=chunks, dtype=image.dtype, meta=np.empty((0, 0, 0), image.dtype))
