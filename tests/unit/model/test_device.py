"""Precision on CPUs and GPUs, casts, and constants that are cached on a device."""

import pytest
import torch
from counted_operators import Operators
from torch import nn

from celldetr.model import device
from celldetr.model.device import ExactLinear, cached_tensor, call_cast, computing_in, resolve_precision


@pytest.mark.parametrize(
    ("setting", "new_gpu", "old_gpu", "cpu"),
    [("auto", "bf16", "tf32", "fp32"), ("bf16",) * 4, ("tf32", "tf32", "tf32", "fp32"), ("fp32",) * 4],
)
def test_precision_of_each_device(monkeypatch, setting, new_gpu, old_gpu, cpu):
    for has_bf16, expected in ((True, new_gpu), (False, old_gpu)):
        monkeypatch.setattr(device, "has_bf16", lambda found=has_bf16: found)
        assert resolve_precision(setting, "cuda:1") == expected
        assert resolve_precision(setting, torch.device("cpu")) == cpu


def flags():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("setting", "inside"),
    [("fp32", ("highest", False, False)), ("tf32", ("high", True, False)), ("bf16", ("high", True, True))],
)
def test_precision_holds_inside_the_block_only(monkeypatch, setting, inside):
    monkeypatch.setattr(device, "resolve_precision", lambda precision, _: precision)  # as on a GPU
    before = flags()
    with computing_in(setting, "cpu"):
        assert flags() == inside
    assert flags() == before


def test_cached_tensor_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        made = cached_tensor((0.25, 0.5), torch.device("cpu"))
    assert made is cached_tensor((0.25, 0.5), torch.device("cpu"))
    weight = torch.ones(2, requires_grad=True)
    (weight * made).sum().backward()
    assert weight.grad.tolist() == [0.25, 0.5]


def network():
    """Two layers that autocast computes in bfloat16, a norm, and a layer that stays exact."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(32, 6), nn.LayerNorm(6), ExactLinear(6, 2))


@pytest.mark.parametrize("half", [True, False])
def test_weights_that_are_cast_together_give_the_same_result_and_gradients(half):
    model, x = network(), torch.randn(4, 3, 3, 3)
    names = list(model.state_dict())

    def run(call):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), Operators() as counted:
            result = call(x)
            result.square().sum().backward()
        return counted.names, [result.detach(), *(weight.grad for weight in model.parameters())]

    (one_by_one, expected), (together, found) = run(model), run(lambda x: call_cast(model, x))
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert all(map(torch.equal, found, expected))
    assert together["_foreach_copy_"] == 2 * half  # of the weights, and of their gradients
    assert one_by_one["_to_copy"] - together["_to_copy"] == 8 * half
    assert list(model.state_dict()) == names
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model[2].weight.mul_(2)  # no cast is kept for the next step
        assert torch.equal(call_cast(model, x), model(x))
        assert not torch.equal(model(x), expected[0])


def test_an_exact_layer_ignores_autocast():
    layer, x = ExactLinear(3, 2), torch.randn(5, 3).bfloat16()
    expected = nn.functional.linear(x.float(), layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
    assert layer.double()(x).dtype == torch.float64
