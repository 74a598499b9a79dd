"""The forms of deformable sampling agree with each other and with published reference numbers."""

import functools
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.model import sampling
from celldetr.model.sampling import choose, sample_portable, sample_reference
from celldetr.runtime.errors import ConfigError

LEAN = functools.partial(sample_portable, core=sampling._sample_lean)
FORMS = {"reference": sample_reference, "portable": sample_portable, "lean": LEAN}
SHAPES = ((6, 9), (3, 4), (1, 1))


def draw(batch=2, queries=5, heads=2, channels=3, points=2, shapes=SHAPES, dtype=torch.float64, seed=0, spread=0.4):
    """Return value, locations (some outside of the map) and weights."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=dtype)
    size = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*size, 2, generator=generator, dtype=dtype) * (1 + 2 * spread) - spread
    weights = torch.rand(*size, generator=generator, dtype=dtype)
    return value, locations, weights / weights.sum(dim=(-2, -1), keepdim=True)


def run(form, tensors, shapes=SHAPES):
    """Return the result and the gradients of a fixed sum of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = FORMS[form](leaves[0], shapes, *leaves[1:])
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("form", FORMS)
def test_reproduces_reference_numbers(form):
    """Figures computed with the implementation that the paper's authors published."""
    golden = np.load(Path(__file__).parents[2] / "fixtures" / "golden_sampling.npz")
    shapes = tuple(map(tuple, golden["shapes"].tolist()))
    leaves = [torch.from_numpy(golden[name]).requires_grad_() for name in ("value", "locations", "weights")]
    result = FORMS[form](leaves[0], shapes, *leaves[1:])
    np.testing.assert_allclose(result.detach(), golden["output"], atol=1e-12)
    result.backward(torch.from_numpy(golden["grad_output"]))
    for leaf, name in zip(leaves, ("value", "locations", "weights"), strict=True):
        np.testing.assert_allclose(leaf.grad, golden[f"grad_{name}"], atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    queries=st.integers(1, 6),
    heads=st.integers(1, 3),
    points=st.integers(1, 4),
    spread=st.sampled_from([0.0, 0.4, 30.0]),
    seed=st.integers(0, 99),
)
def test_forms_agree_in_value_and_gradient(shapes, batch, queries, heads, points, spread, seed):
    tensors = draw(batch, queries, heads, 3, points, tuple(shapes), seed=seed, spread=spread)
    for fast, plain in zip(run("portable", tensors, shapes), run("reference", tensors, shapes), strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-9)


def test_forms_agree_in_single_precision_at_the_size_of_the_encoder():
    shapes = ((64, 64), (32, 32), (16, 16), (8, 8))
    tensors = draw(1, 600, 8, 32, 4, shapes, torch.float32)
    result = [run(form, tensors, shapes) for form in FORMS]
    torch.testing.assert_close(result[0][0], result[1][0], atol=3e-6, rtol=1e-5)
    for fast, plain in zip(result[1][1:], result[0][1:], strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-3, rtol=1e-3)


def test_forms_agree_on_maps_smaller_than_the_points_of_a_query():
    shapes = ((1, 1),)
    tensors = draw(1, 3, 2, 3, 8, shapes)
    for fast, plain in zip(run("portable", tensors, shapes), run("reference", tensors, shapes), strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-9)


def test_gradients_are_those_of_finite_differences():
    value, locations, weights = draw(1, 2, 1, 2, 2, ((3, 4), (2, 2)))
    # away from pixel centres, where the derivative in the location jumps
    for level, (height, width) in enumerate(((3, 4), (2, 2))):
        place = locations[..., level, :, :] * torch.tensor([width, height]) - 0.5
        assert (place - place.round()).abs().min() > 1e-4
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, loc, w: sample_portable(v, ((3, 4), (2, 2)), loc, w), leaves)


def test_a_pixel_centre_gives_the_pixel_and_far_outside_is_zero():
    value = torch.arange(12.0).view(1, 12, 1, 1)
    centre = torch.tensor([[2.5 / 4, 1.5 / 3], [0.5 / 4, 2.5 / 3], [5.0, 0.5], [0.5, -3.0]]).view(1, 4, 1, 1, 1, 2)
    for form in FORMS.values():
        result = form(value, ((3, 4),), centre, torch.ones(1, 4, 1, 1, 1))
        assert torch.allclose(result.flatten(), torch.tensor([6.0, 8.0, 0.0, 0.0]), atol=1e-5)


def test_half_precision_values_are_sampled_in_single_precision():
    value, locations, weights = draw(dtype=torch.float32)
    result = sample_portable(value.bfloat16(), SHAPES, locations, weights)
    assert result.dtype == torch.bfloat16
    exact = sample_reference(value.bfloat16().float(), SHAPES, locations, weights)
    torch.testing.assert_close(result.float(), exact, atol=1e-2, rtol=1e-2)


def test_no_queries():
    value, locations, weights = draw()
    assert sample_portable(value, SHAPES, locations[:, :0], weights[:, :0]).shape == (2, 0, 6)


def test_images_and_queries_do_not_see_each_other():
    value, locations, weights = draw()
    whole = sample_portable(value, SHAPES, locations, weights)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(sample_portable(value, SHAPES, locations[:, order], weights[:, order]), whole[:, order])
    torch.testing.assert_close(sample_portable(value[1:], SHAPES, locations[1:], weights[1:]), whole[1:])


def test_a_query_does_not_depend_on_how_many_are_sampled_at_once(monkeypatch):
    value, locations, weights = draw(batch=3, queries=7, dtype=torch.float32)
    whole = sample_portable(value.requires_grad_(), SHAPES, locations, weights)
    for at_once in (1, 12, 48, 60):  # points; a query has 12
        monkeypatch.setattr(sampling, "_POINTS_AT_ONCE", at_once)
        assert torch.equal(sample_portable(value.detach(), SHAPES, locations, weights), whole)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_location_that_is_not_a_number_shows_in_the_result_of_its_query_only(heads):
    value, locations, weights = draw(heads=heads)
    locations[0, 1, :, 0, 0, 0] = float("nan")
    result = run("portable", (value, locations, weights))[0]
    assert result[0, 1].isnan().all()
    assert torch.equal(result.isnan().any(dim=-1).nonzero(), torch.tensor([[0, 1]]))


def test_geometry_made_without_gradients_serves_training():
    shapes = ((5, 7),)
    tensors = draw(shapes=shapes)
    with torch.inference_mode():
        sample_portable(tensors[0], shapes, *tensors[1:])
    run("portable", tensors, shapes)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_form_agrees_in_value_and_gradient(monkeypatch, fused):
    """`fused` is the form that a GPU compiles."""
    if fused:
        monkeypatch.setattr(sampling, "_row_sum", lambda device: sampling._gathered_rows)
    monkeypatch.setitem(FORMS, "compiled", choose("cpu", fast=True, compiled=True).function)
    tensors = draw()
    for compiled, plain in zip(run("compiled", tensors), run("reference", tensors), strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-10, rtol=1e-9)


def test_lean_form_keeps_what_it_was_given_and_nothing_else():
    value, locations, weights = (tensor.requires_grad_() for tensor in draw(queries=40))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = LEAN(value, SHAPES, locations, weights)
    large = {pointer for pointer, tensor in kept.items() if tensor.numel() > 100}
    assert large <= {tensor.untyped_storage().data_ptr() for tensor in (value, locations, weights)}
    assert result.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(LEAN(value, SHAPES, locations, weights), result.detach())


def form(monkeypatch, device, *, compiler=True, kernels=False, **options):
    """Name of the form that is chosen where there are such tools."""
    monkeypatch.setattr(sampling.shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda name: "found" if kernels else None)
    return choose(device, **options).name


def test_choice_of_the_form(monkeypatch):
    def chosen(*given, **options):
        return form(monkeypatch, *given, **options)

    assert chosen("cuda", fast=True, kernels=True) == "kernels of deformops"
    assert chosen("cuda", fast=True) == chosen("cpu", fast=True, compiled=True) == "portable form, compiled"
    assert chosen("cuda", fast=True, compiler=False) == chosen("cuda", fast=True, compiled=False) == "portable form"
    assert chosen("cpu", fast=True, kernels=True) == "portable form"
    assert chosen("cuda", fast=False, kernels=True, compiled=True) == "plain form (grid_sample)"
    with pytest.raises(ConfigError, match=r"training.compile: got true, but there is no C\+\+ compiler"):
        chosen("cpu", fast=True, compiled=True, compiler=False)


def test_kernels_get_what_they_ask_for(monkeypatch):
    """A stand-in for the package, on the CPU: levels by sizes and starts, all in float32."""

    def msda(value, sizes, starts, locations, weights):
        assert starts.tolist() == [0, 54, 66]
        assert {x.dtype for x in (value, locations, weights)} == {torch.float32}
        return sample_reference(value, [tuple(size) for size in sizes.tolist()], locations, weights)

    package = types.SimpleNamespace(registry=types.SimpleNamespace(msda=msda))
    monkeypatch.setitem(sys.modules, "deformops", package)
    monkeypatch.setitem(sys.modules, "deformops.registry", package.registry)
    value, locations, weights = draw()
    found = sampling.sample_kernels(value.bfloat16(), SHAPES, locations, weights)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.double(), sample_reference(value, SHAPES, locations, weights), atol=2e-2, rtol=2e-2
    )
