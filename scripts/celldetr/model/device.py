"""How the model runs on a device: precision, casts, constants kept there, evaluation mode, activation checkpointing."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from celldetr.config.base import Precision

Numbers = tuple[float, ...] | tuple[tuple[float, ...], ...]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def best_device() -> str:
    """Name of the GPU if there is one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 natively."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(precision: Precision, device: torch.device | str) -> Precision:
    """Turn the setting `precision` into what a device computes in: ``bf16``, ``tf32`` or ``fp32``.

    ``bf16``: matrix products and convolutions in bfloat16. ``tf32``: float32 rounded to 10 bits in the matrix products
    and convolutions of a GPU; a CPU has no TF32 and computes in ``fp32``. ``auto``: bf16 on GPUs that have it, TF32 on
    other GPUs, fp32 on a CPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if precision == "auto":
        precision = "bf16" if on_gpu and has_bf16() else "tf32"
    return "fp32" if precision == "tf32" and not on_gpu else precision


def allow_tf32(allowed: bool) -> None:
    """Let GPUs round float32 matrix products and convolutions to TF32, or not; for the whole process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def computing_in(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Compute in a precision inside the block; see `resolve_precision`. With bf16, what stays float32 may use TF32."""
    chosen = resolve_precision(precision, device)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(chosen != "fp32")
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=chosen == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which nothing is computed in half precision, even under autocast."""
    return torch.autocast(x.device.type, enabled=False)


class ExactLinear(nn.Linear):
    """Linear layer that is never computed in half precision, even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., inputs) of any type into (..., outputs) of the type of the weights."""
        with full_precision(x):
            return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


class _Cast(torch.autograd.Function):
    """Casts tensors, and their gradients back, in one operator each, which is few kernels on a GPU."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _copies(dtype, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(ctx.dtype, gradients)


def _copies(dtype: torch.dtype, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def cast_together(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cast tensors of one type to that of autocast, all at once; without autocast they stay as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    cast: tuple[Tensor, ...] = _Cast.apply(torch.get_autocast_dtype(kind), *tensors)
    return cast


def call_cast(module: nn.Module, *args: Any) -> Any:
    """Call a module; under autocast, the weights of all its layers are cast at once, not each where it is used.

    They are its linear layers and convolutions, but for those that are `ExactLinear`. Layers that are computed again in
    the backward pass cast their own: the weights would be those of the module again.
    """
    again = isinstance(module, CheckpointedLayers) and module.activation_checkpointing and torch.is_grad_enabled()
    if again or not torch.is_autocast_enabled(next(module.parameters()).device.type):
        return module(*args)
    weights = {
        f"{path}.{name}": weight
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, ExactLinear)
        for name, weight in layer.named_parameters(recurse=False)
    }
    cast = cast_together(list(weights.values()))
    return functional_call(module, dict(zip(weights, cast, strict=True)), args, tie_weights=False)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradients inside the block; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor; from the host to a GPU through pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def padded_size(count: int) -> int:
    """Smallest of 16, 32, 48, 64, 96, 128, 192, 256, ... that is at least `count`.

    Nuclei are padded to few sizes, so that code compiled for a size serves many batches.
    """
    size = 16
    while size < count:
        size = size * 3 // 2 if size >= 32 and size & (size - 1) == 0 else 1 << size.bit_length()
    return size


def constant_table(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function that makes tensors of constants: it runs once for the same arguments.

    The arguments are hashable and hold no tensor. The tensors are shared: never change them in place. A compiled graph
    gets them as inputs, if they were made before it is traced: run what is compiled once as it is.
    """
    made: dict[Any, Result] = {}

    @functools.wraps(make)
    def table(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        assert not kwargs
        if args not in made:  # a plain dictionary: the compiler sees through it, not through a cache of functools
            with torch.inference_mode(False):  # they may be needed with gradients later
                made[args] = make(*args, **kwargs)
        return made[args]

    return table


@constant_table
def cached_tensor(values: Numbers, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tensor of constants on a device. It is copied there once: a copy in every step would make the host wait."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


class CheckpointedLayers(nn.Module):
    """Base of parts that can keep only the inputs of their layers and compute the rest again in the backward pass.

    Attributes
    ----------
    activation_checkpointing
        Whether they do: the same gradients with less memory and more time.
    """

    activation_checkpointing = False

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a layer."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)


def use_activation_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Turn activation checkpointing on or off in the backbone, the encoder and the decoders of a model."""
    for part in model.modules():
        if isinstance(part, CheckpointedLayers):
            part.activation_checkpointing = enabled
