"""Weights that are a function of their names: those that fixtures/golden_model.npz was computed with.

Values are drawn from a generator seeded by the CRC of the name, then scaled and shifted by the first rule that fits.
"""

import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).parent.parent / "fixtures"

# pattern, dimensions (0: any), scale, divided by sqrt(fan in), offset
_RULES = [
    (r"running_var$", 0, 1.0, False, 0.5),
    (r"running_mean$", 0, 0.05, False, 0.0),
    (r"level_embed$|query_embed\.weight$", 0, 1.0, False, 0.0),
    (r"^decouple_decoder\..*sampling_offsets\.bias$", 0, 1.0, False, 0.0),
    (r"sampling_offsets\.bias$", 0, 2.0, False, 0.0),
    (r"sampling_offsets\.weight$", 0, 0.5, True, 0.0),
    (r"reference_points\.weight$", 0, 1.5, True, 0.0),
    (r"reference_points\.bias$", 0, 0.1, False, 0.0),
    (r"^(detr\.)?bbox_embed\.0\.layers\.2\.bias$", 0, 0.1, False, (0.0, 0.0, -2.0, -2.0)),
    (r"bbox_embed\.\d+\.layers\.2\.bias$", 0, 0.1, False, 0.0),
    (r"bbox_embed\.\d+\.layers\.2\.weight$", 0, 0.5, True, 0.0),
    (r"^detr\.class_embed\.2\.bias$", 0, 0.02, False, -3.155),
    (r"^decouple_class_embed\.bias$", 0, 0.02, False, (-3.568, -1.979, -1.592, 0.721, -0.638)),
    (r"class_embed\.\d+\.bias$", 0, 0.02, False, -1.0),
    (r"^(wh|xy)_project\.weight$", 0, 2.0, False, 0.0),
    (r"weight$", 1, 0.05, False, 1.0),
    (r"", 1, 0.02, False, 0.0),
    (r"^(detr\.)?backbone\.", 4, math.sqrt(2.0), True, 0.0),
    (r"", 0, 1.0, True, 0.0),
]

Shapes = dict[str, tuple[int, ...]]


def weights(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors for names and shapes; box heads have a second name for the same tensor."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    name = name.replace("transformer.decoder.bbox_embed.", "bbox_embed.")
    drawn = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    drawn = np.abs(drawn) if name.endswith("running_var") else drawn
    scale, by_fan_in, offset = next(
        rule[2:] for rule in _RULES if re.search(rule[0], name) and rule[1] in (0, len(shape))
    )
    scale = scale / math.sqrt(math.prod(shape[1:])) if by_fan_in else scale
    return torch.from_numpy((np.asarray(offset) + scale * drawn).astype(np.float32))


def authors_shapes() -> Shapes:
    """Names and shapes of the state dict of the authors' full-size model."""
    lines = (FIXTURES / "authors_names.tsv").read_text().splitlines()[1:]
    return {name: tuple(map(int, shape.split(","))) for name, shape in (line.split("\t") for line in lines)}


def deformable_detr_shapes(
    *,
    channels: int = 32,
    ffn: int = 40,
    encoder_layers: int = 2,
    decoder_layers: int = 3,
    queries: int = 12,
    classes: int = 7,
    width: int = 8,
    blocks: tuple[int, ...] = (1, 2, 1, 1),
    points: int = 4,
    heads: int = 8,
) -> Shapes:
    """Names and shapes of a COCO Deformable DETR: stages 2 to 4 and one strided level, box refinement."""
    levels, samples = 4, heads * 4 * points
    found: Shapes = {"transformer.level_embed": (levels, channels), "query_embed.weight": (queries, 2 * channels)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, size: int, *more: str) -> None:
        found.update({f"{name}.{part}": (size,) for part in ("weight", "bias", *more)})

    linear("transformer.reference_points", 2, channels)
    for part, count in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        for layer in (f"transformer.{part}.layers.{index}" for index in range(count)):
            attention = f"{layer}.{'self_attn' if part == 'encoder' else 'cross_attn'}"
            linear(f"{attention}.sampling_offsets", 2 * samples, channels)
            linear(f"{attention}.attention_weights", samples, channels)
            linear(f"{attention}.value_proj", channels, channels)
            linear(f"{attention}.output_proj", channels, channels)
            linear(f"{layer}.linear1", ffn, channels)
            linear(f"{layer}.linear2", channels, ffn)
            norm(f"{layer}.norm1", channels)
            norm(f"{layer}.norm2", channels)
            if part == "decoder":
                norm(f"{layer}.norm3", channels)
                found[f"{layer}.self_attn.in_proj_weight"] = (3 * channels, channels)
                found[f"{layer}.self_attn.in_proj_bias"] = (3 * channels,)
                linear(f"{layer}.self_attn.out_proj", channels, channels)
    for index in range(decoder_layers):
        linear(f"class_embed.{index}", classes, channels)
        for name in (f"bbox_embed.{index}", f"transformer.decoder.bbox_embed.{index}"):
            for step, size in enumerate((channels, channels, 4)):
                linear(f"{name}.layers.{step}", size, channels)
    body, inputs, frozen = "backbone.0.body", width, ("running_mean", "running_var")
    found[f"{body}.conv1.weight"] = (width, 3, 7, 7)
    norm(f"{body}.bn1", width, *frozen)
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for block in (f"{body}.layer{stage + 1}.{index}" for index in range(count)):
            sizes = [(inner, inputs, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            for step, size in enumerate(sizes, 1):
                found[f"{block}.conv{step}.weight"] = size
                norm(f"{block}.bn{step}", size[0], *frozen)
            if block.endswith(".0"):
                found[f"{block}.downsample.0.weight"] = (4 * inner, inputs, 1, 1)
                norm(f"{block}.downsample.1", 4 * inner, *frozen)
            inputs = 4 * inner
    for level, kernel in enumerate((1, 1, 1, 3)):
        source = 4 * width * 2 ** min(level + 1, 3)
        found[f"input_proj.{level}.0.weight"] = (channels, source, kernel, kernel)
        found[f"input_proj.{level}.0.bias"] = (channels,)
        norm(f"input_proj.{level}.1", channels)
    return found


def celldetr_shapes(classes: int = 5, **sizes: int) -> Shapes:
    """Names and shapes of a small model in the authors' format; the levels are those of `deformable_detr_shapes`."""
    detector = deformable_detr_shapes(classes=1, **sizes)  # type: ignore[arg-type]
    found = {f"detr.{name}": shape for name, shape in detector.items()}
    layer = "transformer.decoder.layers.0."
    parts = {name.removeprefix(layer): shape for name, shape in detector.items() if name.startswith(layer)}
    for place in ("inital_layer", "layers.0"):
        found |= {f"decouple_decoder.{place}.{name}": shape for name, shape in parts.items()}
    channels = detector["transformer.level_embed"][1]
    for name, size in (
        ("decouple_class_embed", (classes, channels)),
        *((f"{x}_project", (channels, 2)) for x in ("wh", "xy")),
    ):
        found |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return found
