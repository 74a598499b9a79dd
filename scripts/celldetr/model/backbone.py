"""Residual networks; parameters are named as in torchvision, so that its ResNet weights load unchanged."""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn, ones, zeros

from celldetr.config.experiment import BackboneSettings
from celldetr.model.device import CheckpointedLayers, cast_together

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, weight and bias: four buffers, applied by `fold`."""

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


def group_norm(channels: int) -> nn.Module:
    """Group norm with eight channels per group, or the nearest number of groups that divides the channels."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class ConvNorm(NamedTuple):
    """A convolution, the norm behind it, and what they compute with."""

    convolution: nn.Conv2d
    norm: nn.Module
    weight: Tensor
    shift: Tensor | None
    """(outputs,) of a frozen norm, whose scale is in the weight; None: another norm."""


def fold(part: nn.Module) -> list[ConvNorm]:
    """Take the convolutions of a part, each with the norm behind it, and fold frozen norms into the weights.

    This saves a pass over the result, which then need not be kept for the backward pass either. All are folded at once,
    in few operators. Other norms stay apart.
    """
    layers = list(part.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers if isinstance(layer, FrozenBatchNorm | nn.GroupNorm)]
    weights = [layer.weight for layer in convolutions]
    shifts: Sequence[Tensor | None] = [None] * len(norms)
    if frozen := [norm for norm in norms if isinstance(norm, FrozenBatchNorm)]:
        variances = torch._foreach_add([norm.running_var for norm in frozen], 1e-5)
        scales = torch._foreach_mul([norm.weight for norm in frozen], torch._foreach_rsqrt(variances))
        moved = torch._foreach_mul([norm.running_mean for norm in frozen], scales)
        shifts = cast_together(torch._foreach_sub([norm.bias for norm in frozen], moved))
        weights = [weight * scale.view(-1, 1, 1, 1) for weight, scale in zip(weights, scales, strict=True)]
    return [ConvNorm(*layer) for layer in zip(convolutions, norms, cast_together(weights), shifts, strict=True)]


def conv_norm(layer: ConvNorm, x: Tensor) -> Tensor:
    """Convolve and normalise maps (B, inputs, h, w)."""
    out = F.conv2d(x, layer.weight, layer.shift, layer.convolution.stride, layer.convolution.padding)
    return layer.norm(out) if layer.shift is None else out


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
        for index, (source, target, kernel, step) in enumerate(sizes, start=1):
            self.add_module(f"conv{index}", _convolution(source, target, kernel, step))
            self.add_module(f"bn{index}", norm(target))
        changed = stride != 1 or inputs != self.outputs
        self.convolutions = len(sizes) + changed
        self.downsample = nn.Sequential(
            *(_convolution(inputs, self.outputs, 1, stride), norm(self.outputs)) if changed else ()
        )

    def forward(self, x: Tensor, layers: Sequence[ConvNorm]) -> Tensor:
        """Turn maps (B, inputs, h, w) into (B, outputs, h / stride, w / stride).

        The layers are its own, see `fold`; that of the shortcut, if it has one, is the last.
        """
        y = conv_norm(layers[0], x)
        for layer in layers[1 : -1 if len(self.downsample) else None]:
            y = conv_norm(layer, F.relu(y, inplace=True))
        if len(self.downsample):
            x = conv_norm(layers[-1], x)
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
        layers = iter(fold(self))
        x = F.relu(conv_norm(next(layers), images), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in range(1, max(self.stages) + 1):
            for block in self.get_submodule(f"layer{stage}").children():
                assert isinstance(block, Block)
                x = self.run(block, x, list(islice(layers, block.convolutions)))
            if stage in self.stages:
                maps.append(x)
        return maps
