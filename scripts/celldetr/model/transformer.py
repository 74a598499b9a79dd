"""Encoder and detection decoder of Deformable DETR with iterative box refinement (paper, 3.1, eqs. 1-3).

The position code of the tokens and their reference points are here as well.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celldetr.config.experiment import ModelSettings
from celldetr.model.deformable_attention import DeformableAttention, SamplingPoints
from celldetr.model.device import CheckpointedLayers, ExactLinear, constant_table
from celldetr.model.sampling import Shapes

PRIOR = 0.01
"""Initial score of every class: it keeps the many queries without a nucleus from dominating the focal loss."""

TEMPERATURE = 10_000.0
_POSITION_EPS = 1e-6
_LOGIT_EPS = 1e-5
_FIRST_SIZE = -2.0


@constant_table
def sine_code(shape: tuple[int, int], channels: int, offset: float, device: torch.device) -> Tensor:
    """Two-dimensional sine code (h * w, channels) float32 of the positions of a feature map, rows first.

    Row i of n has the coordinate 2 pi (i + 1 - offset) / (n + 1e-6), columns likewise. The first half of the channels
    codes the row, the second the column; sine and cosine alternate, with wavelengths from 2 pi to 10,000 * 2 pi.
    `shape` is height and width; `channels` is a multiple of 4; `offset` is 0 for CellDETR, 0.5 for COCO Deformable
    DETR.
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    wavelength = TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / half)
    rows, columns = (_axis_code(size, offset, wavelength) for size in shape)
    height, width = shape
    grid = (rows[:, None].expand(height, width, half), columns[None].expand(height, width, half))
    return torch.cat(grid, dim=-1).flatten(0, 1)


def _axis_code(size: int, offset: float, wavelength: Tensor) -> Tensor:
    """Code (size, half) of the positions along one axis."""
    position = torch.arange(1, size + 1, dtype=torch.float32, device=wavelength.device)
    angle = (position - offset) / (position[-1:] + _POSITION_EPS) * (2 * math.pi)
    angles = angle[:, None] / wavelength
    return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=-1).flatten(1)


@constant_table
def reference_grid(shapes: Shapes, device: torch.device) -> Tensor:
    """Pixel centres (T, 2) float32 of all levels, x and y in [0, 1], rows first."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        levels.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    return torch.cat(levels)


class SelfAttention(nn.Module):
    """Multi-head attention among queries; positions are added to queries and keys, not to values."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Attend among queries (B, Q, C); `position` is (B, Q, C) or (Q, C).

        `mask` says which key (last dimension) a query may attend to, bool (B, 1, Q, Q); None: every one.
        """
        channels = x.shape[-1]
        moved = x if position is None else x + position
        weights, biases = (part.split([2 * channels, channels]) for part in (self.in_proj.weight, self.in_proj.bias))
        query, key = F.linear(moved, weights[0], biases[0]).chunk(2, dim=-1)
        value = F.linear(x, weights[1], biases[1])
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        result = F.dropout(F.relu(x), p, training=True)  # not in place: that takes a GPU three kernels
        ctx.p = p
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        passed = torch.ops.aten.threshold_backward(gradient / (1 - ctx.p), result, 0)  # that of ReLU
        return passed, None


def relu_dropout(x: Tensor, p: float) -> Tensor:
    """ReLU, then dropout; `x` may be overwritten. The result is > 0 exactly where both pass, so only it is kept."""
    if not p or not torch.is_grad_enabled():
        return F.dropout(F.relu(x, inplace=True), p, training=p > 0)
    passed: Tensor = _ReluDropout.apply(x, p)
    return passed


class FeedForward(nn.Module):
    """Two linear layers with ReLU beside a shortcut, then layer norm."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C)."""
        rows, p = x.flatten(0, -2), self.dropout.p if self.training else 0.0
        if p or torch.is_grad_enabled():  # in rows: else the compiler keeps the signs of the result beside it
            hidden = relu_dropout(self.linear1(rows), p)
        else:  # one kernel on a GPU; autocast leaves it alone there
            weight, bias = self.linear1.weight, self.linear1.bias
            hidden = torch._addmm_activation(bias, rows.to(weight.dtype), weight.t())
        out: Tensor = self.norm(x + self.dropout(self.linear2(hidden).view_as(x)))
        return out


class EncoderLayer(nn.Module):
    """Deformable self-attention of the tokens, then the feed-forward layer."""

    def __init__(self, settings: ModelSettings, levels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(settings, levels)
        self.norm = nn.LayerNorm(settings.d_model)
        self.dropout = nn.Dropout(settings.dropout)
        self.ffn = FeedForward(settings.d_model, settings.ffn, settings.dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """Transform tokens (B, T, C) with position (T, C) and centres (B, T, 2)."""
        attended, _ = self.attention(tokens + position, reference, tokens, shapes)
        out: Tensor = self.ffn(self.norm(tokens + self.dropout(attended)))
        return out


class Encoder(CheckpointedLayers):
    """Encoder layers; the reference point of a token is its own location on all levels."""

    def __init__(self, settings: ModelSettings, levels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(settings, levels) for _ in range(settings.encoder_layers))

    def forward(self, tokens: Tensor, position: Tensor, shapes: Shapes) -> Tensor:
        """Transform tokens (B, T, C) with position (T, C) into the memory (B, T, C)."""
        grid = reference_grid(shapes, tokens.device).to(tokens.dtype)
        reference = grid.expand(len(tokens), -1, -1)
        for layer in self.layers:
            tokens = self.run(layer, tokens, position, reference, shapes)
        return tokens


class DecoderLayer(nn.Module):
    """Self-attention (optional), deformable attention to the memory, feed-forward layer.

    `constrained`: a layer of the representation decoder; its self-attention sees positions if the settings say so.
    """

    def __init__(
        self, settings: ModelSettings, levels: int, *, self_attention: bool = True, constrained: bool = False
    ) -> None:
        super().__init__()
        if self_attention:
            self.self_attention = SelfAttention(settings.d_model, settings.heads, settings.dropout)
            self.norm_self = nn.LayerNorm(settings.d_model)
        self.has_self_attention = self_attention
        self.positions = settings.representation.positions or not constrained
        self.cross_attention = DeformableAttention(settings, levels, constrained=constrained)
        self.norm_cross = nn.LayerNorm(settings.d_model)
        self.dropout = nn.Dropout(settings.dropout)
        self.ffn = FeedForward(settings.d_model, settings.ffn, settings.dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, SamplingPoints]:
        """Transform queries (B, Q, C); returns them, and the points that the deformable attention sampled.

        The position, (B, Q, C) or (Q, C), is added to queries and keys of self-attention and to queries of the
        deformable attention. For reference, memory and shapes see `DeformableAttention.forward`, for the mask
        `SelfAttention.forward`.
        """
        if self.has_self_attention:
            attended = self.self_attention(x, position if self.positions else None, mask)
            x = self.norm_self(x + self.dropout(attended))
        attended, points = self.cross_attention(x + position, reference, memory, shapes)
        x = self.norm_cross(x + self.dropout(attended))
        return self.ffn(x), points


class BoxHead(nn.Module):
    """Three linear layers with ReLU that predict the shift of a box in logits (..., 4). Initially the shift is 0."""

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        last = ExactLinear(channels, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if first:  # its reference is a point without a size
            nn.init.constant_(last.bias[2:], _FIRST_SIZE)
        self.layers = nn.ModuleList([*(ExactLinear(channels, channels) for _ in range(2)), last])

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C) into (..., 4)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


class DetectionDecoder(CheckpointedLayers):
    """Learned queries that become boxes: each layer refines the detached box of the layer before it.

    `classes` is the number of logits of a query: 1 (nucleus score), or the classes of the baseline.
    """

    def __init__(self, settings: ModelSettings, levels: int, classes: int) -> None:
        super().__init__()
        channels, layers = settings.d_model, range(settings.decoder_layers)
        self.query_embed = nn.Embedding(settings.queries, 2 * channels)
        self.reference_points = ExactLinear(channels, 2)
        self.layers = nn.ModuleList(DecoderLayer(settings, levels) for _ in layers)
        self.class_embed = nn.ModuleList(class_head(channels, classes) for _ in layers)
        self.bbox_embed = nn.ModuleList(BoxHead(channels, first=index == 0) for index in layers)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor, SamplingPoints]:
        """Detect nuclei in encoded tokens (B, T, C).

        Returns logits (L, B, Q, classes), boxes (L, B, Q, 4) cxcywh in [0, 1], and the points of the last layer.
        """
        position, content = self.query_embed.weight.chunk(2, dim=-1)
        reference = self.reference_points(position).sigmoid().expand(len(memory), -1, -1)
        x = content.expand(len(memory), -1, -1)
        logits, boxes = [], []
        for layer, classify, move in zip(self.layers, self.class_embed, self.bbox_embed, strict=True):
            x, points = self.run(layer, x, position, reference, memory, shapes)
            before = torch.logit(reference, eps=_LOGIT_EPS)
            if before.shape[-1] == 2:
                before = F.pad(before, (0, 2))
            boxes.append((move(x) + before).sigmoid())
            logits.append(classify(x))
            reference = boxes[-1].detach()
        return torch.stack(logits), torch.stack(boxes), points


def class_head(channels: int, classes: int) -> ExactLinear:
    """Linear layer to sigmoid logits; initially every score is about the prior."""
    layer = ExactLinear(channels, classes)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(layer.bias, -math.log(1 / PRIOR - 1))
    return layer
