"""Half precision where a device gains from it."""

import torch

from celldetr.runtime.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16")


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on GPUs may round to 10 bits, for the whole process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(device: str, precision: str) -> torch.autocast:
    """Context of a precision on a device.

    Parameters
    ----------
    device
        Device, e.g. ``cpu`` or ``cuda``.
    precision
        ``fp32``, ``bf16`` (matrix products in bfloat16), or ``auto`` (bf16 on GPUs that have it).

    Raises
    ------
    ConfigError
        Unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    kind = torch.device(device).type
    half = precision == "bf16" or (precision == "auto" and kind == "cuda" and has_bf16())
    return torch.autocast(kind, torch.bfloat16, enabled=half)
