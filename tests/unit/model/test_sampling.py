"""The forms of deformable sampling agree with each other and with published reference numbers."""

import contextlib
import functools
import importlib
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from golden_weights import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.model import sampling
from celldetr.model.sampling import choose_sampler, sample_portable, sample_reference
from celldetr.runtime.errors import ConfigError

SHAPES = ((6, 9), (3, 4), (1, 1))
LEAN = functools.partial(sample_portable, core=sampling._sample_rows_again)


@pytest.fixture(params=["reference", "portable", "portable on CUDA"])
def sample(request, monkeypatch):
    """Give each form; the last is the one that CUDA takes without `deformops` and without a compiler, on the CPU."""
    if request.param == "portable on CUDA":
        on_cuda = sampling._row_sum(torch.device("cuda"))
        monkeypatch.setattr(sampling, "_row_sum", lambda device: on_cuda)
        return LEAN
    return {"reference": sample_reference, "portable": sample_portable}[request.param]


def draw(batch=2, queries=5, heads=2, channels=3, points=2, shapes=SHAPES, dtype=torch.float64, seed=0, spread=0.4):
    """Return value, locations (some outside of the map) and weights."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=dtype)
    size = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*size, 2, generator=generator, dtype=dtype) * (1 + 2 * spread) - spread
    weights = torch.rand(*size, generator=generator, dtype=dtype)
    return value, locations, weights / weights.sum(dim=(-2, -1), keepdim=True)


def run(sample, tensors, shapes=SHAPES):
    """Return the result and the gradients of a fixed sum of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = sample(leaves[0], shapes, *leaves[1:])
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def agree(sample, tensors, shapes=SHAPES, atol=1e-10, rtol=1e-9):
    for found, expected in zip(run(sample, tensors, shapes), run(sample_reference, tensors, shapes), strict=True):
        torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def test_reproduces_reference_numbers(sample):
    """Figures computed with the implementation that the paper's authors published."""
    golden = np.load(FIXTURES / "golden_sampling.npz")
    shapes = tuple(map(tuple, golden["shapes"].tolist()))
    leaves = [torch.from_numpy(golden[name]).requires_grad_() for name in ("value", "locations", "weights")]
    result = sample(leaves[0], shapes, *leaves[1:])
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
    points=st.sampled_from([1, 2, 4, 8]),
    spread=st.sampled_from([0.0, 0.4, 30.0]),
    seed=st.integers(0, 99),
)
def test_forms_agree_in_value_and_gradient(shapes, batch, queries, heads, points, spread, seed):
    tensors = draw(batch, queries, heads, 3, points, tuple(shapes), seed=seed, spread=spread)
    agree(sample_portable, tensors, tuple(shapes))


def test_forms_agree_in_single_precision_at_the_size_of_the_encoder(sample):
    shapes = ((64, 64), (32, 32), (16, 16), (8, 8))
    agree(sample, draw(1, 300, 8, 32, 4, shapes, torch.float32), shapes, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("columns", [2, 40])  # fewer and more than the rows of the table
def test_backward_of_the_operator_runs_where_autograd_cannot(columns):
    """The dispatcher calls it below autograd: gradients that it took from there would be an error, or missing."""
    generator = torch.Generator().manual_seed(1)
    table, gradient = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (20, 7))
    rows = torch.randint(20, (7, columns), generator=generator, dtype=torch.int32)
    leaves = [table, torch.rand(7, columns, generator=generator, dtype=torch.float64)]
    table, weights = (leaf.requires_grad_() for leaf in leaves)
    expected = torch.autograd.grad((table[rows] * weights[..., None]).sum(dim=1), leaves, gradient)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        below = sampling._sum_rows_backward._init_fn(gradient, table.detach(), rows, weights.detach())
    assert torch.autograd.gradcheck(lambda t, w: sampling._sum_rows(t, rows, w), leaves)
    on_cuda = sampling._row_sum(torch.device("cuda"))(
        table, rows, weights
    )  # PyTorch's own backward, no operator of ours
    assert on_cuda.grad_fn.name() == "EmbeddingBagBackward0"
    for found in (below, torch.autograd.grad(on_cuda, leaves, gradient)):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, "auto"])
def test_forms_agree_on_a_gpu(monkeypatch, compiled):
    monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda name: None)  # without deformops
    form = choose_sampler("cuda", compiled=compiled).function
    agree(form, [tensor.cuda() for tensor in draw()])


def test_a_pixel_centre_gives_the_pixel_and_far_outside_is_zero(sample):
    value = torch.arange(12.0).view(1, 12, 1, 1)
    centre = torch.tensor([[2.5 / 4, 1.5 / 3], [0.5 / 4, 2.5 / 3], [5.0, 0.5], [0.5, -3.0]]).view(1, 4, 1, 1, 1, 2)
    result = sample(value, ((3, 4),), centre, torch.ones(1, 4, 1, 1, 1))
    assert torch.allclose(result.flatten(), torch.tensor([6.0, 8.0, 0.0, 0.0]), atol=1e-5)


def test_images_and_queries_are_independent(sample):
    value, locations, weights = draw()
    whole = sample(value, SHAPES, locations, weights)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(sample(value, SHAPES, locations[:, order], weights[:, order]), whole[:, order])
    torch.testing.assert_close(sample(value[1:], SHAPES, locations[1:], weights[1:]), whole[1:])
    assert sample(value, SHAPES, locations[:, :0], weights[:, :0]).shape == (2, 0, 6)


def test_a_query_does_not_depend_on_how_many_are_sampled_at_once(monkeypatch):
    value, locations, weights = draw(batch=3, queries=7, dtype=torch.float32)
    whole = sample_portable(value.requires_grad_(), SHAPES, locations, weights)
    for at_once in (1, 12, 48, 60):  # points; a query has 12
        monkeypatch.setattr(sampling, "_POINTS_AT_ONCE", at_once)
        assert torch.equal(sample_portable(value.detach(), SHAPES, locations, weights), whole)


def test_a_nan_location_gives_nan_for_its_query_only():
    value, locations, weights = draw()
    locations[0, 1, :, 0, 0, 0] = float("nan")
    result = run(sample_portable, (value, locations, weights))[0]
    assert result[0, 1].isnan().all()
    assert torch.equal(result.isnan().any(dim=-1).nonzero(), torch.tensor([[0, 1]]))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_form_agrees_in_value_and_gradient(monkeypatch, fused):
    """`fused` is the form that is compiled for a GPU."""
    if fused:
        monkeypatch.setattr(sampling, "_row_sum", lambda device: sampling._sum_gathered_rows)
    agree(choose_sampler("cpu", compiled=True).function, draw())


def test_portable_forms_are_one_graph_that_makes_no_tables(monkeypatch):
    """What a step that is compiled as a whole needs of them; tables made without gradients serve training."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    forms = {
        sample_portable: "cpu",
        functools.partial(sample_portable, core=torch.compile(LEAN.keywords["core"])): "cuda",
    }
    for form, kind in forms.items():
        chosen = sampling._row_sum
        monkeypatch.setattr(sampling, "_row_sum", lambda device, kind=kind, chosen=chosen: chosen(torch.device(kind)))
        step = torch.compile(lambda *args, form=form: form(args[0], SHAPES, *args[1:]), fullgraph=True, backend=backend)
        with torch.inference_mode():
            form(*draw(queries=3)[:1], SHAPES, *draw(queries=3)[1:])
        agree(lambda value, shapes, *rest, step=step: step(value, *rest), draw(queries=3))
        graph = graphs[-1]
        made = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        assert torch.tensor not in made, "a table is copied to the device in every step"


def test_lean_form_keeps_its_inputs_and_nothing_else_for_the_backward_pass():
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


def test_choice_of_the_form(monkeypatch):
    def chosen(device, *, compiler=True, deformops=False, **options):
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
        monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda name: "found" if deformops else None)
        return choose_sampler(device, **options).name

    assert chosen("cuda", deformops=True) == "kernels of deformops"
    assert chosen("cuda") == chosen("cpu", compiled=True) == "portable form, compiled"
    assert chosen("cuda", compiler=False) == chosen("cuda", compiled=False) == "portable form"
    assert chosen("cpu", deformops=True) == "portable form"
    assert chosen("cuda", kernel="reference", deformops=True, compiled=True) == "reference form (grid_sample)"
    with pytest.raises(ConfigError, match=r"training.compile: got true, but there is no C\+\+ compiler"):
        chosen("cpu", compiled=True, compiler=False)


def test_half_precision_values_are_sampled_in_single_precision(monkeypatch):
    """The kernels are a stand-in for the package, on the CPU: levels by sizes and first tokens, all in float32."""

    def msda(value, sizes, starts, locations, weights):
        assert starts.tolist() == [0, 54, 66]
        assert {x.dtype for x in (value, locations, weights)} == {torch.float32}
        return sample_reference(value, tuple(map(tuple, sizes.tolist())), locations, weights)

    package = types.SimpleNamespace(registry=types.SimpleNamespace(msda=msda))
    monkeypatch.setitem(sys.modules, "deformops", package)
    monkeypatch.setitem(sys.modules, "deformops.registry", package.registry)
    value, locations, weights = draw()
    expected = sample_reference(value, SHAPES, locations, weights)
    for sample in (sampling.sample_kernels, sample_portable):
        found = sample(value.bfloat16(), SHAPES, locations, weights)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("module", ["msda_query_tiled", "msda_query_tiled_fp32acc"])
def test_kernels_agree_in_value_and_gradient(monkeypatch, module):
    """The real Triton kernels, run by Triton's interpreter on the CPU: `pip install deformops triton`, Python 3.12."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are imported
    for package in ("triton", "deformops"):
        pytest.importorskip(package)
    kernels = importlib.import_module(f"deformops.backends.triton.{module}").Backend()

    def on_the_cpu(*tensors):
        return kernels.forward(*tensors, 128, method="linear")

    monkeypatch.setattr(importlib.import_module("deformops.registry"), "msda", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    paper = ((16, 16), (8, 8), (4, 4), (2, 2))  # with its heads, channels and points
    for shapes, sizes in ((SHAPES, (2, 5, 2, 8, 2)), (paper, (2, 40, 8, 32, 4))):
        agree(sampling.sample_kernels, draw(*sizes, shapes, torch.float32), shapes, atol=1e-4, rtol=1e-3)
