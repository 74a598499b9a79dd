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


def celldetr_shapes() -> Shapes:
    """Names and shapes of a small model in the authors' format: an eighth as wide, with fewer blocks and layers."""
    found = {}
    for name, shape in authors_shapes().items():
        kept = 1 if re.search("sampling_offsets|attention_weights", name) else 0  # numbers of points
        if not re.search(r"layer[134]\.[1-9]|layer2\.[2-9]|encoder\.layers\.[2-9]", name):
            found[name] = (*shape[:kept], *(size // 8 if size >= 64 else size for size in shape[kept:]))
    return found


def deformable_detr_shapes() -> Shapes:
    """Names and shapes of a small COCO Deformable DETR: stages 2 to 4 and one strided level, box refinement."""
    found = {name.removeprefix("detr."): shape for name, shape in celldetr_shapes().items() if name.startswith("detr.")}
    for level, (channels, kernel) in enumerate(((64, 1), (128, 1), (256, 1), (256, 3))):
        found[f"input_proj.{level}.0.weight"] = (32, channels, kernel, kernel)
    for layer in range(3):
        found |= {f"class_embed.{layer}.weight": (7, 32), f"class_embed.{layer}.bias": (7,)}
    return found
