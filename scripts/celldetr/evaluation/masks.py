"""Masks of nuclei: each a boolean array (h, w) of the pixels in its box of whole px.

In a file a mask is its bits, row by row, the first in the highest place of its byte, as `numpy.packbits` makes them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Masks = Sequence[NDArray[np.bool_]]
"""D masks, each (h, w)."""


def pack(masks: Masks, boxes: NDArray[np.floating]) -> list[bytes]:
    """Pack the masks of boxes (D, 4) xyxy px for a file."""
    assert [mask.shape for mask in masks] == [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes.tolist()]
    return [np.packbits(mask).tobytes() for mask in masks]


def unpack(packed: Sequence[bytes], boxes: NDArray[np.floating], size: int) -> list[NDArray[np.bool_]]:
    """Unpack the masks of boxes (D, 4) in patches of side `size`.

    Raises
    ------
    ValueError
        A box is not of whole px inside the patch, or a mask does not fit it; names the row.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    good = (boxes == np.round(boxes)).all(axis=1) & ((low >= 0) & (low < high) & (high <= size)).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            f"row {row}: got a mask in box {boxes[row].tolist()}, expected whole px in a patch of {size} x {size} px"
        )
    sides = (high - low).astype(np.int64)
    return [_unpacked(bits, w, h, row) for row, (bits, (w, h)) in enumerate(zip(packed, sides.tolist(), strict=True))]


def _unpacked(packed: bytes, width: int, height: int, row: int) -> NDArray[np.bool_]:
    area = width * height
    if len(packed) != -(-area // 8):
        raise ValueError(
            f"row {row}: got a mask of {len(packed)} bytes, expected {-(-area // 8)} in a box of {width} x {height} px"
        )
    bits = np.unpackbits(np.frombuffer(packed, np.uint8)).view(np.bool_)
    mask = bits[:area].reshape(height, width)
    sides = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    if bits[area:].any() or not all(side.any() for side in sides):
        raise ValueError(f"row {row}: got a mask whose pixels do not reach the sides of its box, and no farther")
    return mask


def centroids(masks: Masks, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean x, y (D, 2) of the pixel centres of the masks of boxes (D, 4), px, as a store keeps those of the truth."""
    inside = [[pixels.mean() for pixels in np.nonzero(mask)[::-1]] for mask in masks]
    return np.reshape(inside, (-1, 2)).astype(np.float64) + boxes[:, :2] + 0.5


def paint(masks: Masks, boxes: NDArray[np.floating], scores: NDArray[np.floating], size: int) -> NDArray[np.int32]:
    """Paint the masks of an image of side S = `size` to an instance map (S, S): 0 background, k the k-th nucleus.

    A pixel that several masks claim goes to the nucleus with the highest of the `scores` (D,), the first of equals.
    A nucleus that loses all its pixels is not in the map.
    """
    instances = np.zeros((size, size), np.int32)
    corners = boxes.astype(np.int64).tolist()
    for index in np.argsort(-scores, kind="stable")[::-1].tolist():
        x0, y0, x1, y1 = corners[index]
        instances[y0:y1, x0:x1][masks[index]] = index + 1
    return instances
