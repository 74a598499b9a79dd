"""Import checkpoints of other codes: the authors' CellDETR, and Deformable DETR trained on COCO.

Both contain Deformable DETR under the same names (the authors' with the prefix ``detr.``). The imported model computes
what the original does. Every tensor of a file is used or listed with the reason why not; every tensor of the model
comes from the file or is listed as new. Sizes are inferred from shapes.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.experiment import BackboneSettings, Mode, ModelSettings, RepresentationSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import load_exactly, read_checkpoint
from celldetr.runtime.errors import ConfigError, InputError

Source = Literal["authors", "coco"]
Weights = Mapping[str, Tensor]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUTHORS_TOKENS, CONTRASTIVE_TOKENS = 50, 1
"""Global tokens of the authors' parallel mode, and of their contrastive pretraining."""

_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^detr\.", ""),
    (r"^transformer\.", ""),
    (r"^decouple_class_embed\.", "class_head."),
    (r"^contrastive_project\.", "projection."),
    (r"^wh_project\.", "representation.size_project."),
    (r"^xy_project\.", "representation.location_project."),
    (r"^decouple_decoder\.inital_layer\.", "representation.layers.0."),
    (r"^decouple_decoder\.layers\.(\d+)\.", lambda found: f"representation.layers.{int(found[1]) + 1}."),
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^input_proj\.", "input_projection.levels."),
    (r"^(reference_points|query_embed|class_embed|bbox_embed)\.", r"decoder.\1."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.norm1\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.norm2\.", r"\1.ffn.norm."),
    (r"^((?:decoder|representation)\.layers\.\d+)\.self_attn\.in_proj_", r"\1.self_attention.in_proj."),
    (r"^((?:decoder|representation)\.layers\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"^((?:decoder|representation)\.layers\.\d+)\.cross_attn\.", r"\1.cross_attention."),
    (r"^((?:decoder|representation)\.layers\.\d+)\.norm1\.", r"\1.norm_cross."),
    (r"^((?:decoder|representation)\.layers\.\d+)\.norm2\.", r"\1.norm_self."),
    (r"^((?:decoder|representation)\.layers\.\d+)\.norm3\.", r"\1.ffn.norm."),
    (r"^((?:encoder|decoder|representation)\.layers\.\d+)\.(linear[12])\.", r"\1.ffn.\2."),
]
_UNUSED = [
    (r"transformer\.decoder\.bbox_embed\.", "a second name of bbox_embed"),
    (r"inital_layer\.(self_attn|norm2)\.", "the first representation layer has no self-attention"),
    (r"\.num_batches_tracked$", "frozen batch norm counts no batches"),
]


@dataclass(frozen=True)
class Imported:
    """A model from another code's checkpoint, in evaluation mode, and where each tensor went."""

    model: CellDETR
    used: dict[str, str]
    """Name in the file -> name in the model."""
    unused: dict[str, str]
    """Name in the file -> why the model does not have it."""
    fresh: dict[str, str]
    """Name in the model -> why it did not come from the file."""


def import_checkpoint(
    path: str | os.PathLike[str],
    source: Source,
    mode: Mode,
    *,
    classes: Sequence[str] | None = None,
    global_tokens: int | None = None,
    heads: int = 8,
) -> Imported:
    """Build our model from a checkpoint of another code.

    The file holds {"model_state_dict": ...} of the CellDETR repository (``authors``), or {"model": ...} of the
    Deformable DETR repository (``coco``), ResNet-50, four levels, with iterative box refinement.

    Parameters
    ----------
    mode
        Mode of the model; the authors' sequential and parallel checkpoints cannot be told apart. Those of contrastive
        pretraining, which have a projection head, are parallel, without classes and positions in self-attention. From
        ``coco``, ``baseline`` takes the whole detector; the other modes take all but its class layers, and their
        representation decoder starts from random values.
    classes
        Class names in the order of the logits; None: PanNuke's for five, else ``class_0``, ``class_1``, ...
    global_tokens
        Global tokens of the parallel mode, which are not in the file; None: 50 for ``authors`` (contrastive: 1), 0 for
        ``coco``.
    heads
        Attention heads, which cannot be inferred from shapes.

    Raises
    ------
    InputError
        Another architecture, or tensors that are missing or have no place in the model; the message names them.
    ConfigError
        A number of classes or heads that does not fit the file.
    """
    weights = _weights(path, source)
    core = {name.removeprefix("detr."): tensor for name, tensor in weights.items()}
    _refuse_other_architectures(core, path)
    settings = _settings(core, source, mode, path, classes, global_tokens, heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CellDETR(settings)
    if source == "coco":
        model.image_mean.copy_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        model.image_std.copy_(torch.tensor(IMAGENET_STD).view(3, 1, 1))
    unused = {name: reason for name in weights if (reason := _unused(name, source, settings))}
    used = {name: _renamed(name) for name in weights if name not in unused}
    own = model.state_dict()
    unknown = [old for old, new in used.items() if new not in own]
    if unknown:
        raise InputError(f"{path}: {unknown[:8]} have no place in our model; is it another variant or a later version?")
    fresh = {name: reason for name in own if (reason := _fresh(name, source, settings.mode))}
    load_exactly(
        model, {new: weights[old].float() for old, new in used.items()} | {name: own[name] for name in fresh}, path
    )
    return Imported(model.eval(), used, unused, fresh)


def _weights(path: str | os.PathLike[str], source: Source) -> dict[str, Tensor]:
    content = read_checkpoint(path)
    key = "model_state_dict" if source == "authors" else "model"
    weights = content.get(key)
    if not isinstance(weights, Mapping):
        raise InputError(
            f"{path}: got keys {sorted(map(str, content))[:8]}, expected {key!r} with the weights; "
            f"is this a checkpoint of source {source!r}?"
        )
    other = [name for name, tensor in weights.items() if not isinstance(tensor, Tensor)]
    if other:
        raise InputError(f"{path}: {other[:4]} in {key!r} are not tensors; expected weights alone")
    return {str(name).removeprefix("module."): tensor for name, tensor in weights.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _unused(name: str, source: Source, settings: ModelSettings) -> str | None:
    """Reason why the model does not use a tensor of the file; None if it does."""
    if source == "coco" and settings.mode != "baseline" and name.startswith("class_embed."):
        return "logits of COCO's classes; this mode has one logit, the nucleus score"
    if settings.projection and name.startswith("decouple_class_embed."):
        return "contrastive pretraining does not train it"
    return next((reason for pattern, reason in _UNUSED if re.search(pattern, name)), None)


def _fresh(name: str, source: Source, mode: Mode) -> str | None:
    """Reason why a tensor of the model does not come from the file; None if it does."""
    if name in ("image_mean", "image_std"):
        return "constants; the original normalises images outside of its model"
    if source == "coco" and mode != "baseline" and name.startswith(("representation.", "class_head.")):
        return "Deformable DETR has no representation decoder: random values"
    if source == "coco" and mode != "baseline" and name.startswith("decoder.class_embed."):
        return "COCO's classes are not nuclei: random values"
    return None


def _refuse_other_architectures(core: Weights, path: str | os.PathLike[str]) -> None:
    """Refuse variants of Deformable DETR that our model cannot compute."""
    if any(name.startswith("transformer.enc_output") for name in core):
        raise InputError(
            f"{path}: got a two-stage Deformable DETR, whose queries are not parameters; "
            "use the checkpoint of the variant with iterative box refinement alone"
        )
    if "transformer.level_embed" not in core or core["transformer.level_embed"].dim() != 2:
        raise InputError(
            f"{path}: got names such as {sorted(core)[:4]} without a table transformer.level_embed, expected a "
            "Deformable DETR or CellDETR; weights of a ResNet need no import, a DETR cannot be imported"
        )
    if len(core["transformer.level_embed"]) == 1:
        raise InputError(
            f"{path}: got a single-scale Deformable DETR, whose stride and dilation are not in the file; "
            "use a checkpoint with several feature levels"
        )
    alias = "transformer.decoder.bbox_embed."
    refined = [name for name in core if name.startswith(alias)]
    if not refined:
        raise InputError(
            f"{path}: got no names that begin with {alias}, so its layers do not refine boxes one after another; "
            "expected the variant with iterative box refinement (with_box_refine)"
        )
    for name in refined:
        twin = core.get(name.removeprefix("transformer.decoder."))
        if twin is None or not torch.equal(twin, core[name]):
            raise InputError(
                f"{path}: got a {name} other than {name.removeprefix('transformer.decoder.')}, expected equal tensors"
            )


def _settings(
    core: Weights,
    source: Source,
    mode: Mode,
    path: str | os.PathLike[str],
    classes: Sequence[str] | None,
    global_tokens: int | None,
    heads: int,
) -> ModelSettings:
    """Infer the settings of the model from the shapes in a file."""

    def size(name: str, dimension: int = 0) -> int:
        if name not in core or core[name].dim() <= dimension:
            raise InputError(
                f"{path}: got no tensor {name!r} of the expected kind; is this a checkpoint of source {source!r}?"
            )
        return int(core[name].shape[dimension])

    levels, channels = size("transformer.level_embed"), size("transformer.level_embed", 1)
    logits = size("transformer.encoder.layers.0.self_attn.attention_weights.weight")
    if heads < 1 or channels % heads or logits % (heads * levels):
        raise ConfigError(
            f"heads: got {heads}, which does not divide {channels} channels and {logits // levels} points"
        )
    decoupled = any(name.startswith("decouple_decoder.") for name in core)
    contrastive = any(name.startswith("contrastive_project.") for name in core)
    if source == "authors" and decoupled == (mode == "baseline") or contrastive and mode != "parallel":
        expected = "parallel" if contrastive else "sequential or parallel" if decoupled else "baseline"
        raise InputError(
            f"{path}: got {'a' if decoupled else 'no'} representation decoder (decouple_decoder.*) and mode {mode!r}, "
            f"expected mode {expected}"
        )
    head = "decouple_class_embed.weight" if decoupled else "class_embed.0.weight"
    known = source == "authors" or mode == "baseline"
    if global_tokens is None:
        global_tokens = {"authors": CONTRASTIVE_TOKENS if contrastive else AUTHORS_TOKENS, "coco": 0}[source]
    representation = {
        "layers": 1 + _count(core, r"^decouple_decoder\.layers\.(\d+)\.") if decoupled else 3,
        "positions": not contrastive,
        "global_tokens": global_tokens if mode == "parallel" else 0,
    }
    return ModelSettings(
        mode=mode,
        classes=_class_names(classes, 0 if contrastive else size(head) if known else None),
        d_model=channels,
        heads=heads,
        points=logits // (heads * levels),
        ffn=size("transformer.encoder.layers.0.linear1.weight"),
        encoder_layers=_count(core, r"^transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=_count(core, r"^transformer\.decoder\.layers\.(\d+)\."),
        queries=size("query_embed.weight"),
        position_offset=0.5 if source == "coco" else 0.0,
        projection=size("contrastive_project.2.weight") if contrastive else 0,
        backbone=_backbone(core, levels, path),
        representation=RepresentationSettings.from_dict(representation, "representation"),
    )


def _class_names(names: Sequence[str] | None, count: int | None) -> tuple[str, ...]:
    """Names of classes; `count` is the number of logits in the file, None if the class head starts at random values."""
    if names is None:
        known = count in (None, len(PANNUKE_CLASSES))
        return PANNUKE_CLASSES if known else tuple(f"class_{i}" for i in range(count or 0))
    if count not in (None, len(names)):
        raise ConfigError(f"classes: got {len(names)} names, expected {count}, one for each class logit of the file")
    return tuple(names)


def _count(core: Weights, pattern: str) -> int:
    """Count the different numbers in the first group of a pattern, over the names of a file."""
    return len({found[1] for name in core if (found := re.match(pattern, name))})


def _backbone(core: Weights, levels: int, path: str | os.PathLike[str]) -> BackboneSettings:
    """Infer the blocks of the residual network and the stages that feed the levels."""
    body = r"^backbone\.0\.body\.layer{}\.(\d+)\."
    blocks = [_count(core, body.format(stage)) for stage in (1, 2, 3, 4)]
    stem = core.get("backbone.0.body.conv1.weight")
    kernels = [
        core[name].shape[-1]
        for name in (f"input_proj.{i}.0.weight" for i in range(levels))
        if name in core and core[name].dim() == 4
    ]
    used = kernels.count(1)
    if stem is None or stem.dim() != 4 or 0 in blocks or len(kernels) != levels or not 1 <= used <= 4:
        raise InputError(
            f"{path}: got {blocks} blocks in the stages of the backbone and input projections with kernels {kernels}, "
            f"expected a ResNet of four stages and {levels} projections"
        )
    return BackboneSettings(
        block="bottleneck" if "backbone.0.body.layer1.0.conv3.weight" in core else "basic",
        layers=(blocks[0], blocks[1], blocks[2], blocks[3]),
        width=int(stem.shape[0]),
        stages=tuple(range(5 - used, 5)),
        extra_levels=levels - used,
        norm="frozen_batch",
    )
