"""Compile our own kernels of the sampling for a GPU without one, at the sizes of the paper, as a launch would do it.

Usage: python tests/helpers/compile_kernels.py CAPABILITY, such as 90 for an H100. Writes for each kernel and type of
the values: atomic additions of four channels; of one; registers; bytes of local memory that registers are spilled to.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from celldetr.model import sampling_triton

SHAPES = ((64, 64), (32, 32), (16, 16), (8, 8))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    nothing = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(nothing)
    JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: report(kernel, args[0].dtype, kernel.run(*args, grid=grid, warmup=True, **options))
    )
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.zeros(1, sum(h * w for h, w in SHAPES), 8, 32, dtype=dtype, requires_grad=True)
        locations, weights = torch.zeros(1, 900, 8, 4, 4, 2), torch.zeros(1, 900, 8, 4, 4)
        sampling_triton.sample_triton(value, SHAPES, locations, weights).sum().backward()


def report(kernel: JITFunction, dtype: torch.dtype, compiled: triton.compiler.CompiledKernel) -> None:
    counts = [
        len(re.findall(rf"\b(?:red|atom)\.global\S*{kind}", compiled.asm["ptx"]))
        for kind in (r"\.v4\.f32", r"add\.f32")
    ]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = [re.search(rf"{name}:(\d+)", usage)[1] for name in ("REG", "LOCAL")]
    words = kernel.__name__, str(dtype).removeprefix("torch."), *map(str, counts), *used
    sys.stdout.write(" ".join(words) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
