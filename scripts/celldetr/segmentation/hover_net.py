"""HoVer-Net (Graham et al. 2019): one encoder; branches for nuclear pixels, for HoVer maps and for classes.

Size paper is made of the blocks of MONAI's HoVerNet (fast mode, padded convolutions): a pre-activated ResNet-50 without
its first two reductions, and decoders of dense units. Its own `forward` is not used: it takes images of 256 px alone,
and with padded convolutions it leaves out the shortcuts from the two finest levels of the encoder.

Size small has the same encoder, branches, shortcuts, losses and post-processing, of a few narrow convolutions at half
the resolution.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from monai.losses import DiceLoss
from monai.networks.nets import HoVerNet as MonaiHoverNet
from torch import Tensor, nn
from torch.nn import functional

from celldetr.config.segmentation import SystemSettings
from celldetr.model.weights import load_exactly, read_checkpoint
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.segmentation.hover import gradient_loss, hover_maps, instances_of_maps
from celldetr.segmentation.nuclei import nuclei_of_map
from celldetr.segmentation.system import SegmentedNuclei, System, Truth

_DIVISIBLE = 8  # px; images are padded to a multiple
_RESNET_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^0\.0\.conv\.", "conv1."),
    (r"^0\.0\.bn\.", "bn1."),
    (r"^0\.1\.", "layer1."),
    (r"^([1-3])\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"^(layer\d)\.shortcut\.", r"\1.0.downsample.0."),
    (r"^(layer\d)\.bna_block\.bn\.", r"\1.0.downsample.1."),
    (r"\.layers\.denselayer_(\d)\.layers\.preact/bn\.", lambda found: f".{int(found[1]) - 1}.bn3."),
    (r"\.layers\.denselayer_(\d)\.layers\.conv(\d)/bn\.", r".\1.bn\2."),
    (r"\.layers\.denselayer_(\d)\.layers\.conv(\d)\.", r".\1.conv\2."),
]
"""Names in our encoder, and those of torchvision's ResNet-50 (the pairs that MONAI chose)."""


class Network(nn.Module):
    """Encoder and branches: a branch adds the maps of each level of the encoder to its own, enlarged ones.

    Parameters
    ----------
    encoder
        Levels, each half as large as the one before.
    bottleneck
        From the channels of the last level to those of the one before.
    branches
        Of each branch the blocks after the shortcuts: from the channels of one level to those of the one before, the
        last one to the output.
    """

    def __init__(self, encoder: nn.Sequential, bottleneck: nn.Module, branches: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.encoder, self.bottleneck = encoder, bottleneck
        self.branches = nn.ModuleList(nn.ModuleList(blocks) for blocks in branches)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Output of each branch, (B, channels, S, S) float32, for images (B, 3, S, S)."""
        size = images.shape[-1]
        x = functional.pad(images, (0, -size % _DIVISIBLE) * 2, mode="replicate")
        levels = []
        for level in self.encoder:
            x = level(x)
            levels.append(x)
        deepest = self.bottleneck(levels.pop())
        outputs = []
        for blocks in self.branches:
            assert isinstance(blocks, nn.ModuleList)
            x = deepest
            for block, shortcut in zip(blocks, reversed(levels), strict=True):
                x = block(functional.interpolate(x, scale_factor=2) + shortcut)
            outputs.append(x[..., :size, :size].float())
        return outputs


class HoverNet(System):
    """HoVer-Net with the losses and weights of losses of the authors' code: all 1.

    Images go in as they are, in [0, 1], as in the authors' code, also with weights of ImageNet.
    """

    encoder = "network.encoder"

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        small = settings.segmentation.size == "small"
        self.network = (_small if small else _paper)(1 + len(settings.classes))
        self.dice = DiceLoss(
            softmax=True, to_onehot_y=True, batch=True, reduction="sum", smooth_nr=1e-3, smooth_dr=1e-3
        )

    def losses(self, images: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Cross-entropy and dice of nuclear pixels and of classes; squared errors of the maps and their gradients."""
        # Also a frozen encoder normalises each batch by itself: statistics of a ResNet do not fit this order of layers.
        self.network.encoder.train()
        nuclear, maps, classes = self.network(images)
        inside, target = truth.instances > 0, hover_maps(truth.instances)
        with torch.autocast(images.device.type, enabled=False):
            return {
                "nucleus": self._overlap(nuclear, inside.long()),
                "maps": functional.mse_loss(maps, target),
                "gradient": gradient_loss(maps, target, inside),
                "class": self._overlap(classes, truth.classes),
            }

    def _overlap(self, logits: Tensor, target: Tensor) -> Tensor:
        dice: Tensor = self.dice(logits, target[:, None])
        return dice + functional.cross_entropy(logits, target)

    def segment(self, images: Tensor) -> list[SegmentedNuclei]:
        """Nuclei of the HoVer maps within pixels whose nuclear probability is above one half."""
        nuclear, maps, classes = self.network(images)
        found = []
        for probability, of_image, of_classes in zip(
            nuclear.softmax(dim=1)[:, 1].cpu().numpy(),
            maps.cpu().numpy(),
            classes[:, 1:].cpu().numpy(),
            strict=True,
        ):
            instances = instances_of_maps(probability > 0.5, of_image, self.settings.mpp)
            found.append(nuclei_of_map(instances, probability, of_classes, self.settings.segmentation.min_area))
        return found

    def load_pretrained(self, path: Path) -> list[str]:
        """Take over torchvision's ResNet-50 trained on ImageNet into the encoder.

        Raises
        ------
        ConfigError
            Size small has no pretrained weights.
        InputError
            Another file.
        """
        if self.settings.segmentation.size == "small":
            raise ConfigError(f"got {path} for hover_net of size small, which has no weights; set `initial: none`")
        content = read_checkpoint(path)
        if "layer1.0.conv3.weight" not in content:
            raise InputError(
                f"{path}: got keys {sorted(map(str, content))[:4]}, expected torchvision's weights of a ResNet-50 "
                "(resnet50-0676ba61.pth)"
            )
        own, part = self.state_dict(), f"{self.encoder}."
        source = {name: _resnet_name(name.removeprefix(part)) for name in own if name.startswith(part)}
        given = {name: content[old] for name, old in source.items() if old in content}
        kept = [name for name in own if name not in source]
        counters = {name: own[name] for name in source if name.endswith(".num_batches_tracked")}
        load_exactly(self, given | counters | {name: own[name] for name in kept}, path)
        return kept


def _resnet_name(name: str) -> str:
    for pattern, replacement in _RESNET_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _paper(classes: int) -> Network:
    net = MonaiHoverNet(mode="fast", out_classes=classes, decoder_padding=True)
    first, *deeper = net.res_blocks
    branches = (net.nucleus_prediction, net.horizontal_vertical, net.type_prediction)
    return Network(
        nn.Sequential(nn.Sequential(net.conv0, first), *deeper),
        net.bottleneck,
        [[*branch.decoder_blocks, branch.output_features] for branch in branches],
    )


def _small(classes: int) -> Network:
    def layers(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def level(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(layers(inputs, outputs, 2), layers(outputs, outputs, 1))

    def output(channels: int) -> nn.Sequential:
        return nn.Sequential(layers(16, 16, 1), nn.Conv2d(16, channels, 1), nn.UpsamplingBilinear2d(scale_factor=2))

    return Network(
        nn.Sequential(level(3, 16), level(16, 32), level(32, 64)),
        nn.Conv2d(64, 32, 1, bias=False),
        [[layers(32, 16, 1), output(channels)] for channels in (2, 2, classes)],
    )
