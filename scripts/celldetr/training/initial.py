"""The model of a run and its initial weights."""

import logging
from pathlib import Path

import torch

from celldetr.config.experiment import Experiment
from celldetr.model.celldetr import CellDETR
from celldetr.model.deformable_attention import use_sampling
from celldetr.model.device import use_activation_checkpointing
from celldetr.model.weights import initial_weights, model_settings, read_checkpoint
from celldetr.runtime.errors import InputError

log = logging.getLogger(__name__)


def build_model(experiment: Experiment, backbone: Path | None, initial: Path | None, device: str) -> CellDETR:
    """Build the model of a run on its device: random weights, then those of the backbone, then those of a model file.

    Parts that differ from the model file with mode or classes, or that it lacks, keep their random weights.

    Raises
    ------
    InputError
        A file does not fit the model.
    """
    settings = experiment.training
    torch.manual_seed(settings.seed)
    model = CellDETR(experiment.model)
    if backbone is not None:
        initial_weights(model, backbone)
    if initial is not None:
        _start_from(model, initial, frozen=settings.probe == "head")
    use_activation_checkpointing(model, settings.activation_checkpointing)
    kernel = use_sampling(model, device, compiled=settings.compile)
    log.info("deformable sampling: %s", kernel)
    return model.to(device)


def _start_from(model: CellDETR, path: Path, *, frozen: bool) -> None:
    """Take over the weights of a model of another mode or other classes as far as they fit, and log what does not.

    If the representation decoder stays `frozen`, its settings must be those that it was trained with.
    """
    content, settings = read_checkpoint(path), model.settings
    theirs = model_settings(content, path) if "format" in content else settings
    if frozen and theirs.representation != settings.representation:
        raise InputError(
            f"model.representation: got {settings.representation.to_dict()}, but {path}, whose decoder stays frozen "
            f"(training.probe: head), was trained with {theirs.representation.to_dict()}; give the same"
        )
    fresh = []
    if (theirs.mode == "baseline") != (settings.mode == "baseline"):
        fresh += ["class_head", "representation", "decoder.class_embed"]
    elif theirs.classes != settings.classes:
        fresh += ["decoder.class_embed"] if settings.mode == "baseline" else ["class_head"]
    if theirs.projection != settings.projection:
        fresh += ["projection"]
    kept = initial_weights(model, path, fresh=fresh)
    if kept:
        log.info("%d tensors start from random weights, not from %s: %s", len(kept), path, ", ".join(kept))
    unused = [name for name in content.get("state", {}) if name not in model.state_dict()]
    if unused:
        log.info("%d tensors of %s are not used, this model has no such part: %s", len(unused), path, ", ".join(unused))
