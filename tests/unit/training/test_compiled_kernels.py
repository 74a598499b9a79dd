"""What the compiler writes for a GPU of the paper's model, on any machine: bounds, so that nothing comes unnoticed.

Measured in bf16 (256 px, 16 patches a step, 64 in prediction): see `tests/benchmarks/README.md`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "compiled_kernels.py"
BOUNDS = {
    "sequential": {"kernels": 690, "operators": 416, "moved": 66.5, "held": 7.0},
    "predict": {"kernels": 145, "operators": 165, "moved": 75.5, "held": 1.7},
}
"""Kernels, operators of libraries and of our own, GB that they move, GB of results held at once."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.version.cuda is not None, reason="a GPU is pretended beside PyTorch for CPUs alone")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_the_compiler_writes_no_more_for_a_gpu_than_before():
    """A count far below its bound is wrong, or the bound is to be lowered."""
    pytest.importorskip("triton")
    command = [sys.executable, PROGRAM, "--mode", *BOUNDS, "--json"]
    counted = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for mode, most in BOUNDS.items():
        found = {name: counted[mode][name] for name in most}
        assert all(0.9 * limit < found[name] <= limit for name, limit in most.items()), (mode, found)
