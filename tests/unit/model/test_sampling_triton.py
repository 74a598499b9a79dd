"""Our own kernels of the sampling: on a GPU if there is one, else in Triton's interpreter on the CPU."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.model import sampling
from celldetr.model.sampling import largest_difference, sample_portable, sample_reference

pytest.importorskip("triton", reason="Triton is not installed")
from celldetr.model import sampling_triton  # noqa: E402
from celldetr.model.sampling_triton import sample_triton  # noqa: E402

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((5, 7), (1, 1))
COMPILER = Path(__file__).parents[2] / "helpers" / "compile_kernels.py"


def draw(batch=1, queries=9, heads=2, channels=3, points=2, shapes=SHAPES, dtype=torch.float32, seed=0, spread=0.4):
    """Return value, locations (some outside of the map) and weights."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator).to(dtype)
    size = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*size, 2, generator=generator) * (1 + 2 * spread) - spread
    return [x.to(DEVICE) for x in (value, locations, torch.rand(size, generator=generator))]


def run(sample, tensors, shapes=SHAPES):
    """Return the result and the gradients of a fixed sum of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = sample(leaves[0], shapes, *leaves[1:])
    factors = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device)
    (result * factors.view_as(result)).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def agree(tensors, shapes=SHAPES, share=1e-5, sample=sample_triton, exact=sample_reference):
    """Compare with an exact form in float64: differences as a share of the largest number."""
    expected = run(exact, [x.double() for x in tensors], shapes)
    for one, other in zip(run(sample, tensors, shapes), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=share * max(1.0, float(other.abs().max())))


@settings(max_examples=5, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=2),
    batch=st.integers(1, 2),
    queries=st.integers(1, 5),
    heads=st.integers(1, 2),
    channels=st.sampled_from([1, 4, 65]),
    points=st.integers(1, 4),
    spread=st.sampled_from([0.0, 0.4, 30.0]),
    dense=st.sampled_from([0, 9, 256]),
    seed=st.integers(0, 99),
)
def test_kernels_agree_in_value_and_gradient(shapes, batch, queries, heads, channels, points, spread, dense, seed):
    tensors = draw(batch, queries, heads, channels, points, tuple(shapes), seed=seed, spread=spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_triton, "DENSE_PIXELS", dense)
        agree(tensors, tuple(shapes))


@pytest.mark.parametrize("queries", [65, 130])
def test_levels_are_gathered_in_tiles_of_pixels_and_parts_of_the_queries(monkeypatch, queries):
    """Tiles, blocks and parts that end within one another."""
    monkeypatch.setattr(sampling_triton, "_QUERIES_PER_PROGRAM", 64)
    monkeypatch.setattr(sampling_triton, "_PIXELS", 16)
    agree(draw(1, queries, 1, 4, 1, ((5, 9),)), ((5, 9),))


def test_half_precision_values_and_their_gradient_keep_their_type():
    tensors = draw(dtype=torch.bfloat16)
    agree(tensors, share=1e-2)
    result, of_value, of_locations, of_weights = run(sample_triton, tensors)
    assert [x.dtype for x in (result, of_value)] == [torch.bfloat16] * 2
    assert [x.dtype for x in (of_locations, of_weights)] == [torch.float32] * 2


def test_points_on_borders_and_far_outside_agree_with_the_reference():
    """At pixels -1, -1/2, 0, ..., 4 of a map of 4, each across and along; and beyond what an integer holds.

    The gradient of the portable form at -1, where it has two, depends on the version of torch (clamp at its bound).
    """
    at = (torch.tensor([-1e12, -3, -1, -0.5, 0, 1, 3, 3.5, 4, 6, 1e12]) + 0.5) / 4
    locations = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1).view(1, -1, 1, 1, 1, 2)
    value, weights = torch.randn(1, 16, 1, 2), torch.ones(locations.shape[:-1])
    agree([x.to(DEVICE) for x in (value, locations, weights)], ((4, 4),))
    locations[:] = float("inf")
    assert not sample_triton(value.to(DEVICE), ((4, 4),), locations.to(DEVICE), weights.to(DEVICE)).any()


def test_a_nan_location_gives_nan_for_its_query_only():
    value, locations, weights = draw()
    locations[0, 1, :, 0, 0, 0] = float("nan")
    result = sample_triton(value, SHAPES, locations, weights)
    assert result[0, 1].isnan().all()
    assert result.isnan().any(dim=-1).nonzero().tolist() == [[0, 1]]


def test_layouts_in_memory_and_empty_inputs():
    value, locations, weights = draw()
    turned = [value.transpose(1, 2).contiguous().transpose(1, 2), locations.flip(1).flip(1), weights.mT.contiguous().mT]
    assert not turned[0].is_contiguous()
    agree(turned)
    for tensors in ((value, locations[:, :0], weights[:, :0]), (value[:0], locations[:0], weights[:0])):
        found, expected = run(sample_triton, tensors), run(sample_reference, tensors)
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert not found[1].any()


def test_operators_are_traced_as_they_run():
    """Schema, fake form, gradients and compilation, as PyTorch checks them; and one graph in a compiled function."""
    value, locations, weights = draw(queries=2)
    sizes = [size for shape in SHAPES for size in shape]
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(sampling_triton._sample, (leaves[0], sizes, *leaves[1:]), test_utils=tests)
    gradient = torch.ones(1, 2, 6, device=DEVICE)
    given_back = (gradient, value.detach(), sizes, locations.detach(), weights.detach(), 9)
    torch.library.opcheck(sampling_triton._sample_backward, given_back, test_utils=("test_schema", "test_faketensor"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(value, locations, weights):
        return sample_triton(value * 1, SHAPES, locations, weights)

    agree(draw(queries=2), sample=lambda value, shapes, *rest: compiled(value, *rest))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_captured_graphs_give_the_same_numbers():
    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def compiled(value, locations, weights):
        return sample_triton(value * 1, SHAPES, locations, weights)

    for seed in range(4):
        agree(draw(seed=seed), sample=lambda value, shapes, *rest: compiled(value, *rest))


def test_first_use_on_a_device_checks_the_kernels_against_the_portable_form():
    limits, few = sampling._TOLERANCE, {"queries": 5, "heads": 1}
    assert all(largest_difference(sample_triton, DEVICE, dtype, **few) < limits[dtype] for dtype in limits)

    def shifted(value, shapes, places, weights):
        return sample_portable(value, shapes, places + 1e-3, weights)

    assert largest_difference(shifted, DEVICE, torch.float32, **few) > limits[torch.float32]


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (1e-6, None),
        (0.5, r"cuda our kernels give other numbers in torch.float32 and torch.bfloat16"),
        (float("nan"), r"give other numbers"),
        (RuntimeError("ptxas: no kernel image"), r"fail: RuntimeError: ptxas: no kernel image"),
    ],
)
def test_choice_of_our_kernels(monkeypatch, outcome, says):
    def measured(form, device, dtype):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(sampling, "largest_difference", measured)
    monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda name: None if name == "deformops" else "found")
    sampling._own_kernels_work.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = {sampling.choose_sampler("cuda", compiled=False).name for _ in range(2)}
    sampling._own_kernels_work.cache_clear()
    assert names == {"portable form" if says else "kernels of our own"}
    assert len(caught) == bool(says)
    assert not says or re.search(says, str(caught[0].message))


@pytest.mark.slow
def test_kernels_compile_for_an_h100_that_adds_four_channels_at_once_and_spills_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, COMPILER, "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"_forward_kernel", "_backward_kernel", "_gather_kernel"}
    assert {line[1] for line in lines} == {"float32", "bfloat16"}
    for name, _, four, one, _, spilled in lines:
        assert (int(four) > 0, one, spilled) == (name != "_forward_kernel", "0", "0")
