"""Files of images: label images of polygons, and pyramids."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from celldetr.example.styles import Array


def label_image(polygons: Sequence[Array] | Array, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Draw polygons (V, 2) x, y px into a label image: 1 + index of the last one over a pixel's centre, 0 for none."""
    labels = np.zeros(shape, dtype=np.int32)
    if not len(polygons):
        return labels
    start = np.concatenate([*polygons]) - 0.5
    end = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons]) - 0.5
    owner = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    low, high = (np.ceil(bound(start[:, 1], end[:, 1])).clip(0, shape[0]) for bound in (np.minimum, np.maximum))
    count = (high - low).astype(int)  # rows that an edge crosses
    edge = np.repeat(np.arange(len(start)), count)
    row = low[edge] + np.arange(len(edge)) - (np.cumsum(count) - count)[edge]
    slope = (end[edge, 0] - start[edge, 0]) / (end[edge, 1] - start[edge, 1])
    crossing = start[edge, 0] + (row - start[edge, 1]) * slope
    order = np.lexsort((crossing, row, owner[edge]))
    left, right = np.ceil(crossing[order]).clip(0, shape[1]).astype(int).reshape(-1, 2).T.tolist()
    rows, numbers = row[order][::2].astype(int).tolist(), (owner[edge][order][::2] + 1).tolist()
    for index, first, last, number in zip(rows, left, right, numbers, strict=True):
        labels[index, first:last] = number
    return labels


def write_pyramid(
    path: Path, image: NDArray[Any], *, mpp: float, step: int, tile: int, ome: dict[str, Any] | None = None
) -> None:
    """Write an image, (H, W, 3) uint8 or (H, W) uint16, as a tiled pyramid.

    Colour is compressed as JPEG, grey values without loss. `step` is the factor between the levels, `tile` the rows and
    columns of a tile; the last level fits into a tile. `ome` is further metadata of an OME-TIFF, whose levels are
    sub-images; if None, levels are pages, as OpenSlide expects.
    """
    if ome is not None:
        sizes = {f"PhysicalSize{axis}{part}": value for axis in "XY" for part, value in (("", mpp), ("Unit", "µm"))}
        ome = {"UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, path.name)), **sizes, **ome}  # the same in each run
    colour = image.ndim == 3
    levels = [image]
    while max(levels[-1].shape[:2]) > tile:
        levels.append(_coarser(levels[-1], step))
    with tifffile.TiffWriter(path, ome=ome is not None) as writer:
        for index, level in enumerate(levels):
            per_cm = 1e4 / (mpp * step**index)
            writer.write(
                level,
                photometric="rgb" if colour else "minisblack",
                tile=(tile, tile),
                compression="jpeg" if colour else "zlib",
                subsampling=(1, 1) if colour else None,  # halved, colour would spread over the glass in coarse levels
                compressionargs={"level": 90 if colour else 6},
                predictor=None if colour else True,
                maxworkers=1,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subifds=len(levels) - 1 if ome is not None and index == 0 else None,
                subfiletype=1 if index else 0,
                metadata=ome if index == 0 else None,
            )


def _coarser(image: NDArray[Any], step: int) -> NDArray[Any]:
    """Average step x step px; what is left over at the right and the bottom is left out."""
    height, width = image.shape[0] // step, image.shape[1] // step
    blocks = image[: height * step, : width * step].reshape(height, step, width, step, *image.shape[2:])
    return (blocks.mean(axis=(1, 3), dtype=np.float32) + np.float32(0.5)).astype(image.dtype)
