"""Where tokens are: the sine code of their position and their centres as reference points."""

import functools
import math

import torch
from torch import Tensor

Shape = tuple[int, int]
"""Height and width of a feature map."""

TEMPERATURE = 10_000.0
_EPS = 1e-6


@functools.lru_cache(maxsize=256)
def sine_code(shape: Shape, channels: int, offset: float, device: torch.device) -> Tensor:
    """Two-dimensional sine code of the positions of a feature map.

    Row i of n has the coordinate 2 pi (i + 1 - offset) / (n + 1e-6), columns alike. The first half of the channels
    codes the row, the second the column; sine and cosine alternate, with wavelengths from 2 pi to 10,000 * 2 pi.

    Parameters
    ----------
    shape
        Height and width of the map.
    channels
        Features of the code, a multiple of 4.
    offset
        0 for CellDETR, 0.5 for COCO Deformable DETR.
    device
        Where the code is needed.

    Returns
    -------
    Tensor
        Code (h * w, channels) float32, rows first. It is cached: never change it in place.
    """
    with torch.inference_mode(False):
        half = channels // 2
        index = torch.arange(half, dtype=torch.float32, device=device)
        wavelength = TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / half)
        rows, columns = (_axis_code(size, offset, wavelength) for size in shape)
        height, width = shape
        grid = (rows[:, None].expand(height, width, half), columns[None].expand(height, width, half))
        return torch.cat(grid, dim=-1).flatten(0, 1)


def _axis_code(size: int, offset: float, wavelength: Tensor) -> Tensor:
    """Code (size, half) of the positions along one axis."""
    position = torch.arange(1, size + 1, dtype=torch.float32, device=wavelength.device)
    angle = (position - offset) / (position[-1:] + _EPS) * (2 * math.pi)
    angles = angle[:, None] / wavelength
    return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=-1).flatten(1)


@functools.lru_cache(maxsize=256)
def reference_grid(shapes: tuple[Shape, ...], device: torch.device) -> Tensor:
    """Centres (T, 2) float32 of the pixels of all levels, x and y in [0, 1], rows first. Cached: never change it."""
    with torch.inference_mode(False):
        levels = []
        for height, width in shapes:
            y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
            x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
            levels.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
        return torch.cat(levels)
