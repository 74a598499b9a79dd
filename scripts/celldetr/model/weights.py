"""Files of weights: our models, and backbones of torchvision to start from.

A model file holds {"format": 1, "settings": {...}, "classes": [...], "state": {...}, "extra": {...}} and is read by
`torch.load(..., weights_only=True)`.
"""

import argparse
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from celldetr.config.experiment import ModelSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.deformable_attention import use_sampling
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic

FORMAT = 1

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SCALAR: Any = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)},
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name in numpy 1
]
"""Harmless types that training codes leave in their checkpoints beside the weights."""


def save_model(
    path: str | os.PathLike[str], model: CellDETR, settings: ModelSettings, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model file; it appears under its name when it is complete.

    Parameters
    ----------
    path
        File to write.
    model
        Model whose weights are kept.
    settings
        Settings that the model was built from.
    extra
        JSON-like values to keep with it, e.g. epoch and score.
    """
    content = {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "classes": list(settings.classes),
        "state": {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
        "extra": dict(extra or {}),
    }
    write_checkpoint(path, content)


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> CellDETR:
    """Rebuild a model from its file, in evaluation mode.

    Raises
    ------
    InputError
        Not a model file, or its weights do not fit its settings.
    """
    content = read_checkpoint(path)
    model = _build(model_settings(content, path), content["state"], path)
    load_exactly(model, content["state"], path)
    log.info("deformable sampling: %s", use_sampling(model, device))
    return model.to(device).eval()


def _build(settings: ModelSettings, state: Mapping[str, Any], path: str | os.PathLike[str]) -> CellDETR:
    """Build the model of a file; sizes that its weights do not have are refused before memory is asked for them."""
    layers = settings.encoder_layers + settings.decoder_layers + settings.representation.layers
    blocks = sum(settings.backbone.layers)
    if layers + blocks > len(state):
        raise InputError(
            f"{path}: got {len(state)} weights, expected those of {layers} layers and {blocks} blocks, as it says"
        )
    try:
        with torch.device("meta"):
            shell = CellDETR(settings)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: no model can be built from its settings ({error})") from error
    _check_fit(shell, state, path)
    return CellDETR(settings)


def initial_weights(model: CellDETR, path: str | os.PathLike[str], *, fresh: Collection[str] = ()) -> list[str]:
    """Start a model from a file: a model file, or a ResNet of torchvision for the backbone alone.

    Parameters
    ----------
    model
        Model whose weights are replaced.
    path
        File to read.
    fresh
        Parts of the model that keep their own initial values whatever the file holds, as beginnings of parameter names:
        ``("class_head",)`` where the classes differ, ``("class_head", "representation", "decoder.class_embed")`` to go
        on from a model of another mode.

    Returns
    -------
    list of str
        Names of the model's parameters and buffers that kept their values.

    Raises
    ------
    InputError
        The file does not fit the model: every other name must be in both, with the same shape.
    """
    content = read_checkpoint(path)
    if "format" in content:
        state = _model_file(path, content)["state"]
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


def model_settings(content: Mapping[str, Any], path: str | os.PathLike[str]) -> ModelSettings:
    """Return the settings in what `read_checkpoint` read of a model file.

    Raises
    ------
    InputError
        Not a model file, or settings that this version does not know.
    """
    try:
        return ModelSettings.from_dict(_model_file(path, content)["settings"], "settings")
    except ConfigError as error:
        raise InputError(f"{path}: its settings are not those of this version of celldetr; {error}") from error


def _model_file(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Mapping[str, Any]:
    found, state = content.get("format"), content.get("state")
    if type(found) is not int or found != FORMAT or not {"settings", "state"} <= content.keys():
        raise InputError(
            f"{path}: got keys {sorted(map(str, content))[:8]} and format {found!r}, expected a model file of format "
            f"{FORMAT}; checkpoints of other codes are turned into one by scripts/import_checkpoint.py"
        )
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: state: got a {type(state).__name__}, expected weights by their names")
    return content


def _torchvision(model: CellDETR, content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights of a torchvision ResNet under our names; the classifier and stages that the model lacks are left out."""
    if "conv1.weight" not in content or model.settings.backbone.norm != "frozen_batch":
        raise InputError(
            f"{path}: got keys {sorted(map(str, content))[:8]}, expected a model file, or weights of a torchvision "
            f"ResNet for a model with backbone.norm frozen_batch (here {model.settings.backbone.norm})"
        )
    last = max(model.settings.backbone.stages)
    unused = re.compile(rf"^fc\.|\.num_batches_tracked$|^layer[{last + 1}-9]\.")
    return {f"backbone.{name}": tensor for name, tensor in content.items() if not unused.search(str(name))}


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a file of PyTorch without running code from it.

    Raises
    ------
    InputError
        No such file, not a file of PyTorch, or objects in it other than tensors and plain values.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint")
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).split("\n", 1)[0])
        raise InputError(
            f"{path}: not read, because it is damaged, no file of PyTorch, or holds objects that could run code "
            f"({reason.strip()}); expected tensors and plain values: save the weights alone and use that file"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes there are many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{path}: cannot be read as a file of PyTorch ({reason}); is it complete? Download or write it again"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: got a {type(content).__name__}, expected a mapping with weights")
    return content


def _check_sums(path: str | os.PathLike[str]) -> None:
    """Compare the checksums that PyTorch writes and does not read: a changed bit would be another weight."""
    if zipfile.is_zipfile(path):  # files of PyTorch before 1.6 are none, and have no checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it has another checksum than was written")


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write what `read_checkpoint` reads; it appears under its name when it is complete.

    Raises
    ------
    OSError
        It cannot be written.
    """
    # Through a file of Python: PyTorch's own says of a full disk only that a position is unexpected.
    with atomic(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_exactly(model: CellDETR, state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Load weights whose names and shapes are exactly those of the model.

    Raises
    ------
    InputError
        Names, shapes or kinds differ, or a weight is not a number; the first few are listed.
    """
    _check_fit(model, state, path)
    model.load_state_dict(dict(state), strict=True)


def _check_fit(model: CellDETR, state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    own = model.state_dict()
    problems = [f"{name}: missing, expected {tuple(own[name].shape)}" for name in own if name not in state]
    problems += [f"{name}: not in this model" for name in state if name not in own]
    unfit = {name: why_unfit(tensor, own[name]) for name, tensor in state.items() if name in own}
    problems += [f"{name}: {reason}" for name, reason in unfit.items() if reason]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            f"{path}: does not fit the model, {len(problems)} of its names differ:\n  "
            + "\n  ".join(problems[:8])
            + f"{more}\nUse the settings that the file was trained with, or name the parts that start afresh"
        )


def why_unfit(tensor: Any, own: Tensor) -> str | None:
    """Say why a value of a file cannot take the place of a tensor; None if it can."""
    if not isinstance(tensor, Tensor):
        return f"got a {type(tensor).__name__}, expected a tensor"
    if tensor.shape != own.shape:
        return f"got {tuple(tensor.shape)}, expected {tuple(own.shape)}"
    kinds = _FLOATS if own.dtype in _FLOATS else (own.dtype,)
    if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.is_meta:
        return f"got {tensor.dtype}, {tensor.layout} on {tensor.device}, expected {own.dtype} with values"
    return None if tensor.isfinite().all() else "holds values that are not finite"
