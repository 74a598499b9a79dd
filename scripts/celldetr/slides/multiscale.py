"""An image as a multiscale element of SpatialData, which is read block by block when it is written."""

from collections.abc import Mapping, Sequence

import dask.array as da
import numpy as np
from dask.array.core import normalize_chunks
from numpy.typing import NDArray
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation

from celldetr.slides.pyramid import Pyramid

_CHUNK = 1024  # px
_SMALLEST = 1024  # px; longer side of the coarsest level at most


def multiscale_image(
    image: Pyramid, channels: Sequence[str], transformations: Mapping[str, BaseTransformation]
) -> object:
    """Wrap level 0 of an image as a pyramid; `transformations` lead from its px to coordinate systems."""
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
        c_coords=list(channels),
        scale_factors=[2] * halvings or None,
        transformations=dict(transformations),
        chunks=(len(channels), _CHUNK, _CHUNK),
    )
