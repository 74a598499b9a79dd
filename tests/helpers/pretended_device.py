"""A device without numbers: it stands in for a GPU where there is none.

Tensors on it are fake: they have shapes and a device, and whoever asks for a value, or for something whose size depends
on values, gets an error. So does a mixture of devices. What runs through there makes no host wait for a GPU, except by
copies, which `Copies` records.
"""

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "pretended"


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_built(self):
        return True

    def is_available(self):
        return True

    def has_primary_context(self, index):
        return True


class _Module:
    """What PyTorch asks a device's module for."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


@functools.cache
def pretended_device():
    """Register the device with PyTorch, once in a process; also the one mode in which its tensors live."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module)
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())
    torch._C._acc.register_python_privateuseone_hook(_Hooks())
    return torch.device(NAME, 0), FakeTensorMode(allow_non_fake_inputs=True)


class Copies(TorchDispatchMode):
    """Makes copies between the host and the device; keeps the shapes of those to the host, and of those waited for."""

    def __init__(self):
        super().__init__()
        self.to_host, self.waited = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            given, device = args[0], torch.device(kwargs["device"])
            if device.type != given.device.type:
                if not kwargs.get("non_blocking"):
                    self.waited.append(tuple(given.shape))
                if device.type == "cpu":
                    self.to_host.append(tuple(given.shape))
                return torch.empty(given.shape, dtype=kwargs.get("dtype") or given.dtype, device=device)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if tensors and not any(isinstance(value, FakeTensor) for value in tensors):
            with unset_fake_temporarily():  # tensors of the host have values
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def like(tensor, device):
    """Make a fake tensor of the same form on a device; inside of a `FakeTensorMode`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def moved(module, device):
    """Give a module fake parameters and buffers on a device; inside of a `FakeTensorMode`."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = torch.nn.Parameter(like(tensor, device), tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = like(tensor, device)
    return module
