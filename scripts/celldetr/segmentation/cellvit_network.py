"""The network of CellViT (Hoerst et al. 2024): a Vision Transformer with a decoder per map, joined like a U-Net.

Encoders are those of timm. No kept library has the decoder: `CellVitSamUnet` of cellseg_models_pytorch joins the skips
without normalisation and takes encoders of SAM alone, UNETR of MONAI has another number of convolutions, none of them
with biases. At full size, 5 classes and 19 tissues, the networks have as many parameters as the published ones:
46,750,349 (ViT-256) and 146,094,557 (SAM ViT-B).
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from celldetr.config.segmentation import SegmentationSettings
from celldetr.runtime.errors import InputError

PATCH = 16
"""Side of the patch of a token, px."""


class Widths(NamedTuple):
    """Channels of the encoder and of the decoders."""

    tokens: int
    heads: int
    depth: int
    decoder: tuple[int, int, int, int]
    """At 1/8, 1/4, 1/2 of the image's size, and at its full size."""
    skips: tuple[int, int]
    """Of tokens on their way to 1/4 and 1/2: at 1/8, at 1/4."""

    @property
    def after(self) -> tuple[int, ...]:
        """Blocks whose tokens the decoders take: four at equal distances, the last one among them."""
        return tuple(self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


VIT_256 = Widths(384, 6, 12, (312, 256, 128, 64), (256, 128))
SAM_B = Widths(768, 12, 12, (512, 256, 128, 64), (512, 256))
SMALL = Widths(96, 3, 4, (48, 32, 16, 8), (48, 32))


class Features(NamedTuple):
    """What an encoder makes of B images."""

    summary: Tensor
    """Of each image (B, D), for its tissue."""
    tokens: list[Tensor]
    """After four blocks, (B, D, S / 16, S / 16) each."""


class VitEncoder(nn.Module):
    """ViT-256 of HIPT (Chen et al. 2022): a ViT-S/16 pretrained by DINO, with a class token.

    Position embeddings are those of 224 px, interpolated to the size of the image. Shares of dropped attention and
    dropped paths as in the published runs.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.after, self.summary = widths.after, widths.tokens
        self.vit = VisionTransformer(
            patch_size=PATCH,
            embed_dim=widths.tokens,
            depth=widths.depth,
            num_heads=widths.heads,
            num_classes=0,
            attn_drop_rate=0.1,
            drop_path_rate=0.1,
            dynamic_img_size=True,
        )

    def forward(self, images: Tensor) -> Features:
        """Encode images (B, 3, S, S) in [-1, 1]."""
        normalised, tokens = self.vit.forward_intermediates(images, indices=self.after, return_prefix_tokens=False)
        return Features(self.vit.forward_head(normalised, pre_logits=True), tokens)


class SamEncoder(nn.Module):
    """Image encoder of Segment Anything (Kirillov et al. 2023): no class token, attention in windows in most blocks.

    An image is the upper left corner of one of 1024 px, for which the encoder is made: it has the position embeddings
    of that corner, as in the published runs.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.after, self.summary = widths.after, 256
        self.vit = VisionTransformerSAM(
            img_size=1024,
            patch_size=PATCH,
            embed_dim=widths.tokens,
            depth=widths.depth,
            num_heads=widths.heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=widths.after,
            neck_chans=self.summary,
        )

    def forward(self, images: Tensor) -> Features:
        """Encode images (B, 3, S, S) in [-1, 1], S <= 1024."""
        x = self.vit.patch_embed(images)
        height, width = x.shape[1:3]
        if max(height, width) > self.vit.pos_embed.shape[1]:
            raise InputError(f"got images of {tuple(images.shape[2:])} px, expected at most 1024 px for cellvit_sam_b")
        x = x + self.vit.pos_embed[:, :height, :width]
        tokens = []
        for number, block in enumerate(self.vit.blocks):
            x = block(x)
            if number in self.after:
                tokens.append(x.permute(0, 3, 1, 2))
        return Features(self.vit.neck(tokens[-1]).mean((2, 3)), tokens)


class Maps(NamedTuple):
    """Outputs for B images, before softmax."""

    nuclei: Tensor
    """(B, 2, S, S): background, nucleus."""
    hover: Tensor
    """(B, 2, S, S): horizontal, vertical; see `celldetr.segmentation.hover`."""
    classes: Tensor
    """(B, 1 + K, S, S): background, then the classes."""
    tissues: Tensor
    """(B, T); T is 1 if no tissue is known, so that all weights have a gradient."""


class CellViTNetwork(nn.Module):
    """Encoder, skips that all decoders share, a decoder per map, and a linear layer for the tissue."""

    def __init__(self, settings: SegmentationSettings, classes: int, tissues: int) -> None:
        super().__init__()
        sam = settings.system == "cellvit_sam_b"
        widths = SMALL if settings.size == "small" else SAM_B if sam else VIT_256
        self.encoder = SamEncoder(widths) if sam else VitEncoder(widths)
        self.tissues = nn.Linear(self.encoder.summary, max(tissues, 1))
        low, quarter, half, full = widths.decoder
        self.skips = nn.ModuleList(
            [
                _upsampling(widths.tokens, low),
                _upsampling(widths.tokens, widths.skips[0], quarter),
                _upsampling(widths.tokens, *widths.skips, half),
                nn.Sequential(*_convolution(3, full // 2), *_convolution(full // 2, full)),
            ]
        )
        self.decoders = nn.ModuleList([MapDecoder(widths, channels) for channels in (2, 2, 1 + classes)])
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]  # faster; needed up to torch 2.13

    def forward(self, images: Tensor) -> Maps:
        """Predict the maps of images (B, 3, S, S) in [-1, 1], S a multiple of 16."""
        if any(side % PATCH for side in images.shape[2:]):
            raise InputError(f"got images of {tuple(images.shape[2:])} px, expected multiples of {PATCH} for CellViT")
        summary, (*shallow, last) = self.encoder(images)
        sources = [*reversed(shallow), images]
        skips = [skip(source) for skip, source in zip(self.skips, sources, strict=True)]
        nuclei, hover, classes = (decoder(last, skips) for decoder in self.decoders)
        return Maps(nuclei, hover, classes, self.tissues(summary))


class MapDecoder(nn.Module):
    """From the last tokens to a map, doubling the size four times, each time joined by a skip of that size."""

    def __init__(self, widths: Widths, channels: int) -> None:
        super().__init__()
        steps = pairwise((widths.tokens, *widths.decoder))
        self.enlarge = nn.ModuleList([nn.ConvTranspose2d(before, after, 2, stride=2) for before, after in steps])
        self.join = nn.ModuleList(
            [
                nn.Sequential(
                    *_convolution(2 * width, width),
                    *(layer for _ in range(more) for layer in _convolution(width, width)),
                )
                for width, more in zip(widths.decoder, (2, 1, 1, 1), strict=True)
            ]
        )
        self.out = nn.Conv2d(widths.decoder[-1], channels, 1)

    def forward(self, tokens: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Decode tokens (B, D, S / 16, S / 16) to (B, channels, S, S)."""
        x = tokens
        for enlarge, join, skip in zip(self.enlarge, self.join, skips, strict=True):
            x = join(torch.cat([skip, enlarge(x)], 1))
        out: Tensor = self.out(x)
        return out


def _convolution(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)


def _upsampling(*channels: int) -> nn.Sequential:
    """Double the size once per step between the channels."""
    steps = [
        (nn.ConvTranspose2d(before, after, 2, stride=2), *_convolution(after, after))
        for before, after in pairwise(channels)
    ]
    return nn.Sequential(*(layer for step in steps for layer in step))
