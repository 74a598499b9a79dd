"""Deformable DETR with box refinement as plain functions of a state dict in the original names.

Independent of the library: it says what a checkpoint in that format means, so that imports can be compared with it.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def detect(
    w: Weights, images: Tensor, *, stages: tuple[int, ...], offset: float, heads: int = 8
) -> tuple[Tensor, Tensor]:
    """Logits (L, B, Q, K) and boxes (L, B, Q, 4) for normalised images (B, 3, h, w)."""
    maps = _backbone(w, images, stages)
    levels = []
    for index in range(len(w["transformer.level_embed"])):
        weight, bias = w[f"input_proj.{index}.0.weight"], w[f"input_proj.{index}.0.bias"]
        source = maps[index] if index < len(maps) else maps[-1]
        x = F.conv2d(source, weight, bias, stride=1 if index < len(maps) else 2, padding=weight.shape[-1] // 2)
        levels.append(F.group_norm(x, 32, w[f"input_proj.{index}.1.weight"], w[f"input_proj.{index}.1.bias"]))
    shapes = [tuple(x.shape[-2:]) for x in levels]
    channels = levels[0].shape[1]
    position = torch.cat(
        [_sine(h, v, channels, offset).to(images) + w["transformer.level_embed"][i] for i, (h, v) in enumerate(shapes)]
    )
    memory = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)
    centres = torch.cat(
        [torch.tensor([[(c + 0.5) / v, (r + 0.5) / h] for r in range(h) for c in range(v)]) for h, v in shapes]
    ).to(images)
    layer = 0
    while f"transformer.encoder.layers.{layer}.norm1.weight" in w:
        name = f"transformer.encoder.layers.{layer}"
        attended = _deformable(w, f"{name}.self_attn", memory + position, centres[None], memory, shapes, heads)
        memory = _ffn(w, name, _norm(w, f"{name}.norm1", memory + attended), "norm2")
        layer += 1
    return _decode(w, memory, shapes, heads)


def _decode(w: Weights, memory: Tensor, shapes: list[tuple[int, ...]], heads: int) -> tuple[Tensor, Tensor]:
    position, content = w["query_embed.weight"].chunk(2, dim=1)
    position, x = (part.expand(len(memory), -1, -1) for part in (position, content))
    reference = _linear(w, "transformer.reference_points", position).sigmoid()
    logits, boxes, layer = [], [], 0
    while f"class_embed.{layer}.weight" in w:
        name = f"transformer.decoder.layers.{layer}"
        moved = (x + position).transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            moved, moved, x.transpose(0, 1), x.shape[-1], heads,
            w[f"{name}.self_attn.in_proj_weight"], w[f"{name}.self_attn.in_proj_bias"], None, None, False, 0.0,
            w[f"{name}.self_attn.out_proj.weight"], w[f"{name}.self_attn.out_proj.bias"],
        )  # fmt: skip
        x = _norm(w, f"{name}.norm2", x + attended.transpose(0, 1))
        x = _norm(
            w,
            f"{name}.norm1",
            x + _deformable(w, f"{name}.cross_attn", x + position, reference, memory, shapes, heads),
        )
        x = _ffn(w, name, x, "norm3")
        delta = x
        for step in range(3):
            delta = _linear(w, f"bbox_embed.{layer}.layers.{step}", delta)
            delta = delta.relu() if step < 2 else delta
        known = reference.shape[-1]
        before = torch.log(reference.clamp(min=1e-5) / (1 - reference).clamp(min=1e-5))
        delta = torch.cat((delta[..., :known] + before, delta[..., known:]), dim=-1)
        reference = delta.sigmoid()
        boxes.append(reference)
        logits.append(_linear(w, f"class_embed.{layer}", x))
        layer += 1
    return torch.stack(logits), torch.stack(boxes)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _ffn(w: Weights, name: str, x: Tensor, norm: str) -> Tensor:
    return _norm(w, f"{name}.{norm}", x + _linear(w, f"{name}.linear2", _linear(w, f"{name}.linear1", x).relu()))


def _deformable(
    w: Weights, name: str, query: Tensor, reference: Tensor, memory: Tensor, shapes: list[tuple[int, ...]], heads: int
) -> Tensor:
    batch, queries, channels = query.shape
    levels, depth = len(shapes), channels // heads
    offsets = _linear(w, f"{name}.sampling_offsets", query).view(batch, queries, heads, levels, -1, 2)
    points = offsets.shape[4]
    attention = _linear(w, f"{name}.attention_weights", query).view(batch, queries, heads, -1).softmax(-1)
    attention = attention.view(batch, queries, heads, levels, points)
    values = _linear(w, f"{name}.value_proj", memory).split([h * v for h, v in shapes], dim=1)
    result = query.new_zeros(batch, queries, heads, depth)
    for level, (height, width) in enumerate(shapes):
        centre = reference[:, :, None, None, :2]
        if reference.shape[-1] == 2:
            place = centre + offsets[:, :, :, level] / query.new_tensor([width, height])
        else:
            place = centre + offsets[:, :, :, level] / points * reference[:, :, None, None, 2:] * 0.5
        for head in range(heads):
            grid = 2 * place[:, :, head] - 1
            image = values[level][..., head * depth : (head + 1) * depth].transpose(1, 2)
            sampled = F.grid_sample(image.reshape(batch, depth, height, width), grid, align_corners=False)
            result[:, :, head] += (sampled * attention[:, None, :, head, level]).sum(-1).transpose(1, 2)
    return _linear(w, f"{name}.output_proj", result.flatten(2))


def _sine(height: int, width: int, channels: int, offset: float) -> Tensor:
    half = channels // 2
    code = torch.zeros(height, width, channels)
    for axis, size in ((0, height), (1, width)):
        place = (torch.arange(1, size + 1, dtype=torch.float32) - offset) / (size + 1e-6) * 2 * math.pi
        for feature in range(half):
            angle = place / 10000 ** (2 * (feature // 2) / half)
            value = angle.cos() if feature % 2 else angle.sin()
            code[..., axis * half + feature] = value[:, None] if axis == 0 else value[None]
    return code.flatten(0, 1)


def _backbone(w: Weights, x: Tensor, stages: tuple[int, ...]) -> list[Tensor]:
    body = "backbone.0.body"

    def frozen(name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            w[f"{body}.{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = frozen("bn1", F.conv2d(x, w[f"{body}.conv1.weight"], stride=2, padding=3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for stage in (1, 2, 3, 4):
        block = 0
        while f"{body}.layer{stage}.{block}.conv1.weight" in w:
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = frozen(f"{name}.bn1", F.conv2d(x, w[f"{body}.{name}.conv1.weight"])).relu()
            y = frozen(f"{name}.bn2", F.conv2d(y, w[f"{body}.{name}.conv2.weight"], stride=stride, padding=1)).relu()
            y = frozen(f"{name}.bn3", F.conv2d(y, w[f"{body}.{name}.conv3.weight"]))
            if block == 0:
                shortcut = F.conv2d(x, w[f"{body}.{name}.downsample.0.weight"], stride=stride)
                x = frozen(f"{name}.downsample.1", shortcut)
            x = (x + y).relu()
            block += 1
        if stage in stages:
            maps.append(x)
    return maps
