"""Residual networks; parameters are named as in torchvision, so that its ResNet weights load unchanged."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn, ones, zeros

from celldetr.config.experiment import BackboneSettings
from celldetr.model.device import CheckpointedLayers

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, weight and bias: four buffers, applied by `conv_norm`."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", ones(channels))
        self.register_buffer("bias", zeros(channels))
        self.register_buffer("running_mean", zeros(channels))
        self.register_buffer("running_var", ones(channels))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, (C,) each."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


def group_norm(channels: int) -> nn.Module:
    """Group norm with eight channels per group, or the nearest number of groups that divides the channels."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def conv_norm(convolution: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve (an `nn.Conv2d`) and normalise maps (B, inputs, h, w).

    A frozen norm is folded into the weights of the convolution. This saves a pass over the result, which then need not
    be kept for the backward pass either.
    """
    assert isinstance(convolution, nn.Conv2d)
    if not isinstance(norm, FrozenBatchNorm):
        out: Tensor = norm(convolution(x))
        return out
    scale, shift = norm.affine()
    weight = convolution.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, shift, convolution.stride, convolution.padding)


class Block(nn.Module):
    """Convolutions beside a shortcut: 1x1, 3x3, 1x1 to 4 * width channels (bottleneck), or 3x3 twice (basic).

    The first 3x3 convolution has the stride.
    """

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, *, bottleneck: bool) -> None:
        super().__init__()
        self.outputs = 4 * width if bottleneck else width
        sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, self.outputs, 1, 1)]
        self.layers = range(1, len(sizes) + 1)
        for index, (source, target, kernel, step) in zip(self.layers, sizes, strict=True):
            self.add_module(f"conv{index}", _convolution(source, target, kernel, step))
            self.add_module(f"bn{index}", norm(target))
        changed = stride != 1 or inputs != self.outputs
        self.downsample = nn.Sequential(
            *(_convolution(inputs, self.outputs, 1, stride), norm(self.outputs)) if changed else ()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Turn maps (B, inputs, h, w) into (B, outputs, h / stride, w / stride)."""
        y = x
        for index in self.layers:
            y = conv_norm(self.get_submodule(f"conv{index}"), self.get_submodule(f"bn{index}"), y)
            if index < len(self.layers):
                y = F.relu(y, inplace=True)
        if len(self.downsample):
            convolution, norm = self.downsample
            x = conv_norm(convolution, norm, x)
        return F.relu(y + x, inplace=True)


class Backbone(CheckpointedLayers):
    """Residual network that returns the maps of the chosen stages; later stages are not built."""

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        norm: Norm = FrozenBatchNorm if settings.norm == "frozen_batch" else group_norm
        self.stages = settings.stages
        self.conv1, self.bn1 = _convolution(3, settings.width, 7, stride=2), norm(settings.width)
        inputs, self.channels = settings.width, []
        for stage in range(1, max(settings.stages) + 1):
            width = settings.width * 2 ** (stage - 1)
            blocks = nn.Sequential()
            for index in range(settings.layers[stage - 1]):
                stride = 2 if stage > 1 and index == 0 else 1
                block = Block(inputs, width, stride, norm, bottleneck=settings.block == "bottleneck")
                blocks.append(block)
                inputs = block.outputs
            self.add_module(f"layer{stage}", blocks)
            if stage in settings.stages:
                self.channels.append(inputs)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn normalised images (B, 3, h, w) into maps (B, channels, h / 2^(s+1), w / 2^(s+1)), one per stage s.

        Sizes are rounded up.
        """
        x = F.relu(conv_norm(self.conv1, self.bn1, images), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in range(1, max(self.stages) + 1):
            for block in self.get_submodule(f"layer{stage}").children():
                x = self.run(block, x)
            if stage in self.stages:
                maps.append(x)
        return maps
