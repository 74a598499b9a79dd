"""Micro-Net (Raza et al. 2019, Medical Image Analysis 52, arXiv 1804.08145), which classifies pixels.

The image enters again at each resolution of the encoder, and three auxiliary outputs are trained beside the main one.
Several classes, targets and losses are as in HoVer-Net's comparison (Graham et al. 2019, its published code): one
softmax over the background and the classes; nuclei that have lost their outermost pixel as targets, so that touching
ones are apart; the weights of U-Net between them; auxiliary losses divided by the epoch.

The original takes 252 px, convolves without padding, and enlarges the central 8 px of its deepest maps. Here
convolutions are padded, so that any size comes back, and the deepest maps are pooled once more, to 8 px of 256.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from celldetr.config.segmentation import SystemSettings
from celldetr.runtime.errors import ConfigError
from celldetr.segmentation.nuclei import nuclei_of_map
from celldetr.segmentation.system import SegmentedNuclei, System, Truth

_LEVELS = 4  # of the encoder, each of half the resolution of the one before
_WIDTHS = {"paper": 64, "small": 4}  # channels of its first level; they double from level to level
_DROPOUT = 0.5
_BORDER_WEIGHT, _BORDER_SIGMA = 10.0, 5.0  # w0 and sigma of U-Net, sigma in px
_BORDER_REACH = 15  # px; nuclei farther away would add less than 0.12 to a weight of 1


class MicroNet(System):
    """Micro-Net with one output per class and one for the background."""

    encoder = ""

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        base, outputs = _WIDTHS[settings.segmentation.size], 1 + len(settings.classes)
        widths = [base * 2**level for level in range(_LEVELS)]
        inputs = [3, *(2 * width for width in widths)]
        self.down = nn.ModuleList(map(_Down, inputs, widths))
        self.bottom = nn.Sequential(
            nn.MaxPool2d(2), _convolution(inputs[-1], 32 * base), _convolution(32 * base, 32 * base)
        )
        decoded = [32 * base, *reversed(inputs[1:])]
        self.up = nn.ModuleList(map(_Up, decoded, decoded[1:]))
        self.features = nn.ModuleList(_full(2 * width, 2 ** (1 + level)) for level, width in enumerate(widths[:3]))
        self.auxiliary = nn.ModuleList(_output(width, outputs) for width in widths[:3])
        self.main = _output(sum(widths[:3]), outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)  # for tanh
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (B, 1 + K, S, S) of images in [0, 1]: of the main output, and in training of the auxiliary ones."""
        size = images.shape[-2:]
        bottom, right = (-side % 2 ** (1 + _LEVELS) for side in size)
        scaled = F.pad(_standardised(images), (0, right, 0, bottom), mode="replicate")
        maps, x = [], scaled
        for down in self.down:
            x = down(x, scaled)
            maps.append(x)
        x, decoded = self.bottom(x), []
        for up, skipped in zip(self.up, reversed(maps), strict=True):
            x = up(x, skipped)
            decoded.append(x)
        features = [full(level) for full, level in zip(self.features, reversed(decoded[1:]), strict=True)]
        logits = [self.main(torch.cat(features, dim=1))]
        if self.training:
            logits += [output(level) for output, level in zip(self.auxiliary, features, strict=True)]
        return [values[..., : size[0], : size[1]].float() for values in logits]

    def losses(self, images: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Cross-entropy of each output, weighted between nuclei; those of the auxiliary outputs over the epoch."""
        inner = without_rims(truth.instances)
        target = torch.where(inner > 0, truth.classes, 0)
        weights = border_weights(inner)
        main, *auxiliary = (
            (weights * F.cross_entropy(logits, target, reduction="none")).mean() for logits in self(images)
        )
        numbered = enumerate(auxiliary, start=1)
        return {"main": main} | {f"auxiliary_{number}": loss / self.epoch for number, loss in numbered}

    def segment(self, images: Tensor) -> list[SegmentedNuclei]:
        """Nuclei are the connected pixels that are likelier nucleus than background; see `pixels_to_nuclei`."""
        [logits] = self(images)
        found = (pixels_to_nuclei(each) for each in logits.softmax(dim=1).cpu().numpy())
        return [nuclei_of_map(*each, self.settings.segmentation.min_area) for each in found]

    def load_pretrained(self, path: Path) -> list[str]:
        """Refuse: there are no weights to start from."""
        raise ConfigError(f"got {path} for Micro-Net, which has no pretrained weights; set `initial: none`")


class _Down(nn.Module):
    """A level of the encoder: maps at half the resolution, and beside them the image at that resolution."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Sequential(_normed(inputs, width), _convolution(width, width), nn.MaxPool2d(2))
        self.image = nn.Sequential(_normed(3, width), _convolution(width, width))

    def forward(self, maps: Tensor, image: Tensor) -> Tensor:
        """Turn maps (B, inputs, h, w) and the image (B, 3, S, S) into (B, 2 width, h / 2, w / 2)."""
        maps = self.maps(maps)
        small = F.interpolate(image, maps.shape[-2:], mode="bicubic", antialias=True)
        return torch.cat((maps, self.image(small)), dim=1)


class _Up(nn.Module):
    """A level of the decoder: maps at twice the resolution, joined with those of the encoder."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.ConvTranspose2d(inputs, width, 2, stride=2),
            _convolution(width, width),
            _convolution(width, width),
            nn.ConvTranspose2d(width, width, 5, padding=2),
        )
        self.skipped = nn.ConvTranspose2d(width, width, 5, padding=2)
        self.join = _convolution(2 * width, width, kernel=1)

    def forward(self, maps: Tensor, skipped: Tensor) -> Tensor:
        """Turn maps (B, inputs, h, w) and those of the encoder (B, width, 2 h, 2 w) into (B, width, 2 h, 2 w)."""
        joined: Tensor = self.join(torch.cat((self.maps(maps), self.skipped(skipped)), dim=1))
        return joined


def _convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.Tanh())


def _normed(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.Tanh())


def _full(inputs: int, scale: int) -> nn.Sequential:
    """Bring maps to the resolution of the image, with half the channels."""
    width = inputs // 2
    return nn.Sequential(nn.ConvTranspose2d(inputs, width, scale, stride=scale), _convolution(width, width))


def _output(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(inputs, outputs, 3, padding=1))


def _standardised(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) of mean 0 and standard deviation 1, each over all its values; at least that of noise."""
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return (images - mean) / deviation.clamp(min=images[0].numel() ** -0.5)


def without_rims(instances: Tensor) -> Tensor:
    """Instance maps (B, S, S) whose nuclei have lost the pixels with another id above, below, left or right of them.

    The border of the image takes no pixels. Nuclei that are at most 2 px wide are lost.
    """
    inner = torch.ones_like(instances, dtype=torch.bool)
    for axis in (1, 2):
        size = instances.shape[axis]
        same = instances.narrow(axis, 1, size - 1) == instances.narrow(axis, 0, size - 1)
        inner.narrow(axis, 1, size - 1).logical_and_(same)
        inner.narrow(axis, 0, size - 1).logical_and_(same)
    return torch.where(inner, instances, 0)


def border_weights(instances: Tensor) -> Tensor:
    """Weights (B, S, S) float32 of pixels, which force gaps between nuclei (Ronneberger et al. 2015, equation 2).

    1, and in the background 1 + 10 exp(-(d1 + d2)^2 / (2 5^2)), with the distances (px) of the nearest and the
    second nearest nucleus; nuclei beyond 15 px do not count. On the host.
    """
    weights = np.stack([_border_weights(image) for image in instances.cpu().numpy()])
    return torch.from_numpy(weights).to(instances.device)


def _border_weights(instances: NDArray[np.integer]) -> NDArray[np.float32]:
    first, second = np.full((2, *instances.shape), np.inf, dtype=np.float32)
    for index, place in enumerate(ndimage.find_objects(instances)):
        if place is None:
            continue
        window = tuple(slice(max(0, s.start - _BORDER_REACH), s.stop + _BORDER_REACH) for s in place)
        distance = ndimage.distance_transform_edt(instances[window] != index + 1)
        distance[distance > _BORDER_REACH] = np.inf
        second[window] = np.minimum(second[window], np.maximum(first[window], distance))
        first[window] = np.minimum(first[window], distance)
    extra = _BORDER_WEIGHT * np.exp(-((first + second) ** 2) / (2 * _BORDER_SIGMA**2))
    return np.asarray(1 + np.where(instances == 0, extra, 0), dtype=np.float32)


def pixels_to_nuclei(
    probability: NDArray[np.floating],
) -> tuple[NDArray[np.integer], NDArray[np.floating], NDArray[np.floating]]:
    """Nuclei of the probabilities (1 + K, S, S) of the background and the classes of one image.

    Pixels that are likelier nucleus, of whatever class, than background make nuclei where they touch at a side. Their
    holes are filled, and they get back the rim of 1 px that the targets lack, whose pixels take over the probabilities
    of the nearest pixel inside.

    Returns
    -------
    instances : (S, S)
        0 background, other pixels the id of their nucleus.
    nucleus_probability : (S, S)
        Sum over the classes.
    class_probability : (K, S, S)
    """
    classes = probability[1:]
    nucleus = classes.sum(axis=0)
    instances, _ = ndimage.label(nucleus > probability[0])
    for index, place in enumerate(ndimage.find_objects(instances)):
        holes = ndimage.binary_fill_holes(instances[place] == index + 1) & (instances[place] == 0)
        instances[place][holes] = index + 1
    if not instances.any():
        return instances, nucleus, classes
    distance, (y, x) = ndimage.distance_transform_edt(instances == 0, return_indices=True)
    return np.where(distance <= 1, instances[y, x], 0), nucleus[y, x], classes[:, y, x]
