"""Residual networks; parameters are named as in torchvision, so that its ResNet weights load unchanged."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn, ones, zeros

from celldetr.config.experiment import BackboneSettings
from celldetr.model.recompute import Recomputing

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, weight and bias: four buffers, used by `normalised`."""

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
        """Factor and shift of each channel."""
        factor = self.weight * (self.running_var + 1e-5).rsqrt()
        return factor, self.bias - self.running_mean * factor


def group_norm(channels: int) -> nn.Module:
    """Group norm with eight channels in a group, where that divides."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def normalised(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalise maps (B, inputs, h, w).

    A norm with fixed statistics goes into the weights of the convolution: no pass over its result, which need not be
    kept for the backward pass either.
    """
    if not isinstance(norm, FrozenBatchNorm):
        out: Tensor = norm(convolution(x))
        return out
    factor, shift = norm.affine()
    weight = convolution.weight * factor.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, shift, convolution.stride, convolution.padding)


def _passed_by(shortcut: nn.Module, x: Tensor) -> Tensor:
    """Give maps the shape of a block's result."""
    if isinstance(shortcut, nn.Sequential):
        convolution, norm = shortcut
        assert isinstance(convolution, nn.Conv2d)
        return normalised(convolution, norm, x)
    return x


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), norm(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, width, 3, stride), norm(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), norm(width)
        self.downsample = _shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Turn maps (B, inputs, h, w) into (B, width, h / stride, w / stride)."""
        y = F.relu(normalised(self.conv1, self.bn1, x), inplace=True)
        y = normalised(self.conv2, self.bn2, y)
        return F.relu(y + _passed_by(self.downsample, x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions beside a shortcut; four times as many channels leave it."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = _convolution(inputs, width, 1), norm(width)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), norm(width)
        self.conv3, self.bn3 = _convolution(width, outputs, 1), norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Turn maps (B, inputs, h, w) into (B, 4 * width, h / stride, w / stride)."""
        y = F.relu(normalised(self.conv1, self.bn1, x), inplace=True)
        y = F.relu(normalised(self.conv2, self.bn2, y), inplace=True)
        y = normalised(self.conv3, self.bn3, y)
        return F.relu(y + _passed_by(self.downsample, x), inplace=True)


class Backbone(Recomputing):
    """Residual network that returns the maps of the stages asked for; later stages do not exist.

    Parameters
    ----------
    settings
        Kind and number of blocks, width, stages and norm.
    """

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        norm: Norm = FrozenBatchNorm if settings.norm == "frozen_batch" else group_norm
        block = Bottleneck if settings.block == "bottleneck" else BasicBlock
        self.stages = settings.stages
        self.conv1, self.bn1 = _convolution(3, settings.width, 7, stride=2), norm(settings.width)
        inputs, self.channels = settings.width, []
        for stage in range(1, max(settings.stages) + 1):
            width = settings.width * 2 ** (stage - 1)
            blocks = []
            for index in range(settings.layers[stage - 1]):
                blocks.append(block(inputs, width, 2 if stage > 1 and index == 0 else 1, norm))
                inputs = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            if stage in settings.stages:
                self.channels.append(inputs)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps of the chosen stages.

        Parameters
        ----------
        images
            Normalised images (B, 3, h, w).

        Returns
        -------
        list of Tensor
            For each stage s in order, maps (B, channels, h / 2^(s+1), w / 2^(s+1)), rounded up.
        """
        x = F.relu(normalised(self.conv1, self.bn1, images), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in range(1, max(self.stages) + 1):
            for block in self.get_submodule(f"layer{stage}").children():
                x = self.run(block, x)
            if stage in self.stages:
                maps.append(x)
        return maps
