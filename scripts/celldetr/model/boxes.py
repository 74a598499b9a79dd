"""Boxes as tensors: formats, overlap, and the noise of the paper's appendix A.2.

Two formats, both with the coordinates in the last dimension: cxcywh (centre x, centre y, width, height), in [0, 1] of
the image inside the model; xyxy (left, top, right, bottom). Half-precision boxes are converted to float32: the
difference of two coordinates of a nucleus has no digits left in bfloat16.
"""

import torch
from torch import Tensor

NOISE_DRAWS = 9
"""Uniform numbers that the noise of one box takes."""

_NO_AREA = 1e-12
_LEAST_SIDE = 1e-6


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from centre and size to corners."""
    centre, size = _at_least_float32(boxes).split(2, dim=-1)
    return torch.cat((torch.sub(centre, size, alpha=0.5), torch.add(centre, size, alpha=0.5)), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from corners to centre and size."""
    low, high = _at_least_float32(boxes).split(2, dim=-1)
    return torch.cat((0.5 * (low + high), high - low), dim=-1)


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (..., N, M) in [-1, 1] of xyxy boxes (..., N, 4) and (..., M, 4)."""
    return giou(first.unsqueeze(-2), second.unsqueeze(-3))


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (...) in [-1, 1] of xyxy boxes (..., 4), one with one.

    IoU minus the share of the enclosing box that the union leaves empty. Boxes without area are legal: a ratio whose
    denominator is 0 is 0 and has no gradient, so two equal points give 0 and two distant points -1. NaN coordinates
    give NaN.
    """
    first, second = _at_least_float32(first), _at_least_float32(second)
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    intersection = _area(high - low)
    union = _area(first[..., 2:] - first[..., :2]) + _area(second[..., 2:] - second[..., :2]) - intersection
    low, high = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    enclosing = _area(high - low)
    return _ratio(intersection, union) - _ratio(enclosing - union, enclosing)


def noise(boxes: Tensor, uniforms: Tensor, *, low: float, high: float, enlarge: float, share: float = 1.0) -> Tensor:
    """Scale and shift boxes at random (paper, A.2, eqs. 5-6).

    Width and height are scaled by 1 + s u, the centre is moved by s u / 2 of the original width and height, with
    independent signs s and magnitudes u ~ U[low, high]; then the box is clipped to the image. The result is never empty
    and its centre lies in the original box.

    Parameters
    ----------
    boxes
        Boxes (..., 4), cxcywh in [0, 1]. They are not changed in place.
    uniforms
        Numbers (..., 9) in [0, 1). Draw them for all boxes of a global batch in one order: then any number of devices
        gives the same noise.
    low, high
        Range of the magnitudes, 0 <= low <= high < 1.
    enlarge
        Probability that a side grows instead of shrinking.
    share
        Probability that a box is changed at all.
    """
    boxes = _at_least_float32(boxes)
    draws = uniforms.to(device=boxes.device, dtype=boxes.dtype)
    magnitude = low + (high - low) * draws[..., :4]
    grow = torch.where(draws[..., 4:6] < enlarge, 1, -1) * magnitude[..., :2]
    move = torch.where(draws[..., 6:8] < 0.5, 1, -1) * magnitude[..., 2:]
    centre, size = boxes.split(2, dim=-1)
    noised = cxcywh_to_xyxy(torch.cat((centre + 0.5 * move * size, size * (1 + grow)), dim=-1)).clamp(0, 1)
    centre, size = xyxy_to_cxcywh(noised).split(2, dim=-1)
    noised = torch.cat((centre, size.clamp(min=_LEAST_SIDE)), dim=-1)
    return torch.where(draws[..., 8:] < share, noised, boxes)


def _at_least_float32(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()


def _area(sides: Tensor) -> Tensor:
    """Areas (...) of rectangles with sides (..., 2); 0 where a side is negative."""
    width, height = sides.clamp(min=0).unbind(dim=-1)
    return width * height


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole, 0 if the whole is empty; written so that NaN passes and the unused branch has no gradient."""
    empty = whole <= _NO_AREA
    return torch.where(empty, 0, part / torch.where(empty, 1, whole))
