"""Numbers that a computation needs on its device, copied there once: a copy in every step would make the host wait."""

import functools

import torch
from torch import Tensor

Numbers = tuple[float, ...] | tuple[tuple[float, ...], ...]


@functools.lru_cache(maxsize=256)
def constant(values: Numbers, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tensor of fixed numbers on a device. It is cached: never change it in place."""
    with torch.inference_mode(False):  # what is cached may be needed with gradients later
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
