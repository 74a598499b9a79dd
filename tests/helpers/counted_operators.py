"""Count the operators of PyTorch that run, such as a GPU would launch; the sampling as one operator, as kernels are.

It stands in for a GPU: dropout and attention are taken in the form of one operator each, as a GPU has them. Casts are
those of autocast on a CPU. An operator on lists of tensors counts once where a GPU takes the tensors together (in a few
kernels, if they are many), and else as often as the lists are long.
"""

import collections
import contextlib

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "scalar_tensor",
    "_local_scalar_dense",
)
"""Operators beside views that launch nothing; a GPU takes the numbers of `scalar_tensor` as arguments."""


@torch.library.custom_op("tests::sample", mutates_args=())
def _sample(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return value.new_zeros(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("tests::sample_backward", mutates_args=())
def _sample_backward(
    gradient: torch.Tensor, value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)


_sample.register_autograd(
    lambda ctx, gradient: _sample_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def sample(value, shapes, locations, weights):
    """Sample in one operator, which computes nothing."""
    return _sample(value, locations.float(), weights.float())


def dropout(x, p=0.5, training=True, inplace=False):
    """Drop out in one operator, as a GPU does if it is not done in place."""
    assert not (inplace and training)
    return torch.native_dropout(x, p, training)[0] if training and p else x


def launches(name, arguments):
    """Count an operator; tensors of lists are taken together if types and, from list to list, layouts are the same."""
    if not name.startswith("_foreach"):
        return 1
    lists = [given for given in arguments if isinstance(given, list | tuple)]
    same_types = all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists)
    layouts = (tuple((tensor.shape, tensor.stride()) for tensor in tensors) for tensors in lists)
    return 1 if same_types and len(set(layouts)) == 1 else len(lists[0])


class Operators(TorchDispatchMode):
    """Count operators by name; views and what launches nothing are left out."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in NO_KERNEL and func.namespace != "profiler":
            self.names[name] += launches(name, args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_a_gpu():
    """Take dropout and attention as one operator each."""
    attend, drop = functional.scaled_dot_product_attention, functional.dropout
    functional.dropout = dropout
    functional.scaled_dot_product_attention = lambda *given, dropout_p, **named: attend(*given, **named)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = attend, drop
