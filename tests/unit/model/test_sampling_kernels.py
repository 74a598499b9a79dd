"""The real Triton kernels of `deformops`, run by Triton's interpreter on the CPU, against the plain form.

Skipped unless deformops (Python 3.12 or newer) and triton are installed: `pip install deformops triton`.
"""

import contextlib
import importlib
import os
import sys

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
pytest.importorskip("triton")
pytest.importorskip("deformops")

from celldetr.model.sampling import sample_kernels, sample_reference  # noqa: E402 - after the interpreter is asked for

CASES = [(((6, 9), (3, 4), (1, 1)), 5, 2, 8, 2), (((16, 16), (8, 8), (4, 4), (2, 2)), 40, 8, 32, 4)]


def results(sample, shapes, queries, heads, channels, points):
    """Return the sampled values and the gradients of a fixed sum of them."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, sum(height * width for height, width in shapes), heads, channels, generator=generator)
    size = (2, queries, heads, len(shapes), points)
    locations, weights = torch.rand(*size, 2, generator=generator) * 1.4 - 0.2, torch.rand(size, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    sampled = sample(leaves[0], shapes, *leaves[1:])
    (sampled * torch.linspace(-1, 1, sampled.numel()).view_as(sampled)).sum().backward()
    return sampled.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("module", ["msda_query_tiled", "msda_query_tiled_fp32acc"])
@pytest.mark.parametrize("case", CASES, ids=["small", "heads and points of the paper"])
def test_kernels_agree_in_value_and_gradient(monkeypatch, module, case):
    kernels = importlib.import_module(f"deformops.backends.triton.{module}").Backend()

    def on_the_cpu(value, sizes, starts, locations, weights):
        return kernels.forward(value, sizes, starts, locations, weights, 128, method="linear")

    monkeypatch.setattr(sys.modules["deformops.registry"], "msda", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for found, expected in zip(results(sample_kernels, *case), results(sample_reference, *case), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
