"""Deformable sampling at the size of the paper's encoder: the fast form against the plain `grid_sample` form.

Usage: python tests/benchmarks/bench_sampling.py [--repeats N]. One thread; both forms in turn in one process; medians.
"""

import argparse
import os
import shutil
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from celldetr.model.sampling import choose, sample_portable, sample_reference

SHAPES = ((64, 64), (32, 32), (16, 16), (8, 8))
HEADS, CHANNELS, POINTS = 8, 32, 4


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, locations around each token's own place as in the encoder, and weights, of one image."""
    torch.manual_seed(0)
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in SHAPES
    ]
    reference = torch.cat(centres)
    tokens = len(reference)
    size = torch.tensor([[w, h] for h, w in SHAPES]).view(-1, 1, 2)
    offsets = torch.randn(1, tokens, HEADS, len(SHAPES), POINTS, 2) * 2 / size
    weights = torch.rand(1, tokens, HEADS, len(SHAPES) * POINTS).softmax(-1).view(1, tokens, HEADS, len(SHAPES), POINTS)
    return torch.randn(1, tokens, HEADS, CHANNELS), reference.view(1, tokens, 1, 1, 1, 2) + offsets, weights


def seconds(form, tensors, backward: bool) -> float:
    """Wall seconds of one call."""
    leaves = [tensor.clone().requires_grad_(backward) for tensor in tensors]
    start = time.perf_counter()
    result = form(leaves[0], SHAPES, *leaves[1:])
    if backward:
        result.backward(torch.ones_like(result))
    return time.perf_counter() - start


def compare(name: str, form, tensors, *, backward: bool, repeats: int) -> None:
    """Print the median of the ratios of calls in turn."""
    ratios, fast = [], []
    for repeat in range(repeats + 1):
        plain, quick = (seconds(f, tensors, backward) for f in (sample_reference, form))
        if repeat:  # the first pair warms up (and compiles)
            ratios.append(plain / quick)
            fast.append(quick)
    print(f"{name:32} {statistics.median(ratios):6.2f}x   ({1e3 * statistics.median(fast):.1f} ms)")


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tensors = inputs()
    print(f"torch {torch.__version__}, one thread; faster than the grid_sample form by:")
    compare("forward", sample_portable, tensors, backward=False, repeats=repeats)
    compare("forward + backward", sample_portable, tensors, backward=True, repeats=repeats)
    if shutil.which("gcc") or shutil.which("clang"):
        compiled = choose("cpu", fast=True, compiled=True).function
        compare("forward, compiled", compiled, tensors, backward=False, repeats=repeats)
        compare("forward + backward, compiled", compiled, tensors, backward=True, repeats=repeats)
    else:
        print("no C++ compiler: torch.compile was not measured")


if __name__ == "__main__":
    main()
