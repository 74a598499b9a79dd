"""Files of weights: our models, and backbones of torchvision to start from.

A model file holds {"format": 1, "settings": {...}, "classes": [...], "state": {...}, "extra": {...}} and is read by
`torch.load(..., weights_only=True)`.
"""

import argparse
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from celldetr.config.experiment import ModelSettings, NetworkSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.deformable_attention import use_sampling
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic

FORMAT = 1

log = logging.getLogger(__name__)

_SCALAR: Any = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "util.config.config.ConfigDict"),  # the authors' settings; their class is not needed
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)},
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name in numpy 1
]
"""Harmless types that other training codes save in their checkpoints beside the weights."""


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    settings: NetworkSettings,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model file atomically, with the settings it was built from and JSON-like values, e.g. epoch and score."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    save_weights(path, state, settings, extra)


def save_weights(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    settings: NetworkSettings,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model file of weights that are on the host; see `save_model`."""
    content = {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "classes": list(settings.classes),
        "state": dict(state),
        "extra": dict(extra or {}),
    }
    write_checkpoint(path, content)


@dataclass(frozen=True)
class ModelFacts:
    """What a model file says about its training; None where it does not."""

    mpp: float | None
    """um per px of the patches."""
    size: int | None
    """Side of the patches, px."""
    experiment: str | None
    trained_on: tuple[str, ...] | None
    """Groups that it has seen, see `celldetr.store.seen`."""


def model_facts(path: str | os.PathLike[str]) -> ModelFacts:
    """Read what a model file says about its training; for errors see `read_checkpoint`."""
    extra = _extra(read_checkpoint(path))
    groups = extra.get("trained_on")
    return ModelFacts(
        extra.get("mpp"), extra.get("patch_size"), extra.get("experiment"), None if groups is None else tuple(groups)
    )


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    mpp: float | None = None,
    patch_size: int | None = None,
) -> CellDETR:
    """Rebuild a model from its file, in evaluation mode.

    `mpp` and `patch_size` are the pixel size, um, and the side, px, of the images that it will see.

    Raises
    ------
    InputError
        Not a model file, its weights do not fit its settings, or it was trained on images of another size.
    """
    content = read_checkpoint(path)
    check_facts(path, content, mpp=mpp, patch_size=patch_size)
    settings = model_settings(content, path)
    if 2 * _least_weights(settings) > Path(path).stat().st_size:  # at least two bytes each
        raise InputError(f"{path}: its settings describe a larger model than it has weights for; is it complete?")
    model = CellDETR(settings)
    load_exactly(model, content["state"], path)
    return _ready(model, device)


def check_facts(
    path: str | os.PathLike[str], content: Mapping[str, Any], *, mpp: float | None, patch_size: int | None
) -> None:
    """Refuse a model that was trained on images of another pixel size (um) or side (px); None: any.

    Raises
    ------
    InputError
        Its file says so.
    """
    extra = _extra(content)
    for name, unit, value, key in (
        ("mpp", "at {} um per px", mpp, "patch.mpp"),
        ("patch_size", "on patches of {} px", patch_size, "patch.size"),
    ):
        if value is not None and (own := extra.get(name)) not in (None, value):
            raise InputError(f"{path}: got a model that was trained {unit.format(own)}, expected {value} ({key})")


def random_model(settings: ModelSettings, seed: int, device: str | torch.device = "cpu") -> CellDETR:
    """Build a model with random weights, the backbone's too, in evaluation mode."""
    torch.manual_seed(seed)
    return _ready(CellDETR(settings), device)


def _ready(model: CellDETR, device: str | torch.device) -> CellDETR:
    log.info("deformable sampling: %s", use_sampling(model, device))
    return model.to(device).eval()


def _least_weights(settings: ModelSettings) -> int:
    """Count most weights of a model before memory is taken for them."""
    channels, backbone = settings.d_model, settings.backbone
    layers = settings.encoder_layers + settings.decoder_layers
    layers += settings.representation.layers if settings.mode != "baseline" else 0
    of_layer = 2 * channels * (channels + settings.ffn) + channels * settings.heads * settings.points
    blocks = enumerate(backbone.layers[: max(backbone.stages)])
    convolutions = sum(count * 9 * (backbone.width * 2**stage) ** 2 for stage, count in blocks)
    return layers * of_layer + channels * (2 * settings.queries + settings.projection) + convolutions


def initial_weights(model: CellDETR, path: str | os.PathLike[str], *, fresh: Collection[str] = ()) -> list[str]:
    """Initialise a model from a file: a model file, or a ResNet of torchvision for the backbone alone.

    `fresh` are the parts of the model, as prefixes of parameter names, that keep their own values whatever the file
    holds, e.g. ``("class_head",)`` if the classes differ. Returns the names of the tensors that kept their values.

    Raises
    ------
    InputError
        The file does not fit the model: every other name must be in both, with the same shape.
    """
    content = read_checkpoint(path)
    if "format" in content:
        state = model_file(path, content)["state"]
        unfit = [name for name in state if name.startswith(tuple(fresh))]
        given = {name: tensor for name, tensor in state.items() if name not in unfit}
        part = ""
    else:
        given = _torchvision(model, content, path)
        part = "backbone."
    own = model.state_dict()
    kept = [name for name in own if name not in given and (not name.startswith(part) or name.startswith(tuple(fresh)))]
    load_exactly(model, given | {name: own[name] for name in kept}, path)
    return kept


def trained_on(path: str | os.PathLike[str], declared: Collection[str] | None, key: str) -> list[str]:
    """Return the groups that a model was trained or validated on: as its file says, and as declared for it.

    `celldetr.store.seen` says how groups are named. `key` is where a user declares them.

    Raises
    ------
    InputError
        Neither the file nor the declaration says, or the file lies where the model of another experiment belongs.
    """
    extra = _extra(read_checkpoint(path))
    named, made_by = extra.get("trained_on"), extra.get("experiment")
    place = re.search(r"/results/models/([^/]+)/split\d/model\.pt$", Path(path).absolute().as_posix())
    if place and made_by not in (None, place[1]):
        raise InputError(f"{path}: got the model of experiment {made_by!r}, expected {place[1]!r}; train it again")
    if named is None and declared is None:
        raise InputError(
            f"{path}: does not say what it was trained on; list it in {key}, e.g. [fold1, fold3], or [] if it has seen "
            "none of the folds, slides and samples of this configuration"
        )
    return sorted({*(named or ()), *(declared or ())})


def _extra(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values that were saved with a model; none if its file has none."""
    extra = content.get("extra")
    return extra if isinstance(extra, Mapping) else {}


def model_settings(content: Mapping[str, Any], path: str | os.PathLike[str]) -> ModelSettings:
    """Return the settings of a model file that `read_checkpoint` has read.

    Raises
    ------
    InputError
        Not a model file, or settings that this version does not know.
    """
    settings = dict(model_file(path, content)["settings"])
    if isinstance(own := settings.get("segmentation"), Mapping):
        raise InputError(
            f"{path}: got a model of {own.get('system')}, which segments nuclei, expected one of CellDETR or "
            "Deformable DETR"
        )
    settings.pop("fast", None)  # earlier versions saved how to compute; it changes no weights
    if settings.get("projection") and isinstance(own := settings.get("representation"), Mapping):
        settings["representation"] = {"positions": False, **own}  # earlier versions had it in the stage
    try:
        return ModelSettings.from_dict(settings, "settings")
    except ConfigError as error:
        raise InputError(f"{path}: its settings do not fit this version of celldetr; {error}") from error


def model_file(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a file that `read_checkpoint` has read, if it is one of our model files.

    Raises
    ------
    InputError
        It is not.
    """
    found = content.get("format")
    if found != FORMAT or not all(isinstance(content.get(part), Mapping) for part in ("settings", "state")):
        raise InputError(
            f"{path}: got keys {sorted(map(str, content))[:8]} and format {found!r}, expected a model file of format "
            f"{FORMAT}; scripts/import_checkpoint.py converts checkpoints of other codes"
        )
    return content


def _torchvision(model: CellDETR, content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights of a torchvision ResNet under our names, without its classifier and the stages that the model lacks."""
    if "conv1.weight" not in content or model.settings.backbone.norm != "frozen_batch":
        raise InputError(
            f"{path}: got keys {sorted(map(str, content))[:8]}, expected a model file, or weights of a torchvision "
            f"ResNet for a model with backbone.norm frozen_batch (here {model.settings.backbone.norm})"
        )
    last = max(model.settings.backbone.stages)
    unused = re.compile(rf"^fc\.|\.num_batches_tracked$|^layer[{last + 1}-9]\.")
    return {f"backbone.{name}": tensor for name, tensor in content.items() if not unused.search(str(name))}


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a PyTorch file without running code from it.

    Raises
    ------
    InputError
        No such file, not a PyTorch file, or objects in it other than tensors and plain values.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for damaged files, with advice to read them without care
        said = str(error)
        if unsafe := re.search(r"GLOBAL (\S+)", said):
            raise InputError(
                f"{path}: not read, because it holds {unsafe[1]}, which could run code; expected tensors and plain "
                "values: save the weights alone and use that file"
            ) from None
        said = said.rpartition("WeightsUnpickler error: ")[2].strip().split("\n", 1)[0][:200]
        reason = type(error).__name__ if "weights_only" in said or not said or said.isdigit() else said
        raise InputError(
            f"{path}: cannot be read as a PyTorch file ({reason}); is it complete? Download or write it again"
        ) from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: got a {type(content).__name__}, expected a mapping with weights")
    return content


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Compare the checksums that PyTorch writes but does not read: a flipped bit would be another weight."""
    if zipfile.is_zipfile(path):  # files of PyTorch before 1.6 are no zip archives and have no checksums
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("it is compressed, which PyTorch does not do")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it has a wrong checksum")


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write what `read_checkpoint` reads, atomically."""
    # Through a Python file: PyTorch's own writer reports a full disk as an unexpected position.
    with atomic(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_exactly(model: nn.Module, state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Load weights whose names and shapes are exactly those of the model.

    Raises
    ------
    InputError
        Names, shapes or types differ, or a weight is not finite; the message lists the first few.
    """
    own = model.state_dict()
    problems = [f"{name}: missing, expected {tuple(own[name].shape)}" for name in own if name not in state]
    problems += [f"{name}: not in this model" for name in state if name not in own]
    unfit = {name: _why_unfit(tensor, own[name]) for name, tensor in state.items() if name in own}
    problems += [f"{name}: {reason}" for name, reason in unfit.items() if reason]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            f"{path}: does not fit the model, {len(problems)} tensors differ:\n  "
            + "\n  ".join(problems[:8])
            + f"{more}\nUse the settings of the training of this file, or name the parts that start from random values"
        )
    model.load_state_dict(dict(state), strict=True)


def _why_unfit(tensor: Any, own: Tensor) -> str | None:
    """Say why a value of a file cannot replace a tensor of the model; None if it can."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return f"got a {type(tensor).__name__}, expected a tensor"
    if tensor.shape != own.shape:
        return f"got {tuple(tensor.shape)}, expected {tuple(own.shape)}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "holds fewer values than its shape says"
    if tensor.is_floating_point() != own.is_floating_point():
        return f"got {tensor.dtype}, expected {own.dtype}"
    return None if tensor.isfinite().all() else "holds values that are not finite"
