"""A GPU without memory or values, for which PyTorch's compiler writes the kernels that it would run on a real one.

Import this before PyTorch, in a process of its own. Tensors on ``cuda`` live in a `FakeTensorMode` and have gradients.
What is compiled for them does not run: `WRITTEN` gets what was written of each graph. The properties are those of an
H100. Attention is one operator, as GPUs have it. Needs Triton and a C++ compiler.
"""

import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

_GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;
struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return {CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return {CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, {CUDA, 0});
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void init() const override {}
};
}
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""
"""What autograd asks of a device."""


def _register_guard() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).parent
    if (library / "lib" / "libtorch_cuda.so").exists():
        sys.exit("PyTorch for CUDA is installed, beside which no GPU can be pretended: use its build for CPUs")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        flags = ["-shared", "-fPIC", "-std=c++20", f"-I{library}/include", f"-L{library}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(["c++", str(source), "-o", str(built), *flags, f"-Wl,-rpath,{library}/lib"], check=True)
        ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


_register_guard()

import torch  # noqa: E402 - after the guard
import triton  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.async_compile import AsyncCompile  # noqa: E402
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.memory import estimate_peak_memory, get_freeable_input_buf  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._ordered_set import OrderedSet  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
)
_OPERATOR = re.compile(r"\b(?:extern_kernels|torch\.ops)\.[\w.]+(?=\()")


@dataclass
class Written:
    """What the code of a graph launches, and its memory."""

    backward: bool
    kernels: int
    """Kernels that the compiler wrote."""
    operators: Sequence[str]
    """Operators of libraries, such as matrix products, and ours; each may launch several kernels."""
    moved: int
    """Bytes of the tensors that they read and write; one of which a part is read counts as a whole."""
    held: int
    """Bytes of results at the most at one time, without the weights."""


WRITTEN: list[Written] = []


class _OnHost(TorchDispatchMode):
    """Computes constants on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") is not None else kwargs))


def _keep(graph, wrapper_code):
    """Keep what was written of a graph; what is called instead of it gives tensors without values."""
    called, nodes = wrapper_code.value.partition("def call(")[2], graph.scheduler.nodes
    moved = sum(node.get_read_write_buffers_sizes() for node in nodes)
    freed = get_freeable_input_buf(nodes, OrderedSet(graph.graph_inputs))
    held, _ = estimate_peak_memory(nodes, freed, OrderedSet(graph.get_output_names()))
    WRITTEN.append(Written(graph.is_backward, called.count(".run("), _OPERATOR.findall(called), moved, held))
    run = torch.fx.Interpreter(graph.module).run
    return SimpleNamespace(call=lambda inputs: run(*inputs), __file__="", key="", benchmark_compiled_module=None)


def _attend(query, key, value, attn_mask=None, dropout_p=0.0):
    """Attend in one operator, as a GPU does."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]
    bias = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype).expand(-1, query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p)[0]


def _pretend():
    """Give PyTorch's modules for GPUs and Triton's driver the answers that they need."""
    for name, answer in {
        "current_device": 0,
        "device_count": 1,
        "get_compute_capability": 90,
        "get_device_capability": (9, 0),
        "get_device_properties": _PROPERTIES,
        "is_bf16_supported": True,
        "raise_if_triton_unavailable": None,
    }.items():
        for part in (torch.cuda, CudaInterface, CudaInterface.Worker):
            setattr(part, name, staticmethod(lambda *_, _answer=answer, **__: _answer))
    CudaInterface.is_available = staticmethod(lambda: True)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    triton.runtime.driver.set_active(driver)
    config.force_disable_caches = True
    config.compile_threads = 1
    config.shape_padding = False  # it would be measured
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_host(folder, node):
        with _OnHost():
            return deduce(folder, node)

    UniformValueConstantFolder._deduce_value = deduce_on_host
    AsyncCompile.triton = lambda *_, **__: None
    GraphLowering._compile_to_module_lines = _keep
    functional.scaled_dot_product_attention = _attend


_pretend()
