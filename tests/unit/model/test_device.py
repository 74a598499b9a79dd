"""Precision on CPUs and GPUs, and constants that are cached on a device."""

import pytest
import torch

from celldetr.model import device
from celldetr.model.device import cached_tensor, computing_in, resolve_precision


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
