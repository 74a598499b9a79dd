"""Model files of segmentation systems; `celldetr.model.weights` writes them."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from celldetr.config.segmentation import SystemSettings
from celldetr.model.weights import check_facts, load_exactly, model_file, read_checkpoint
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.segmentation.system import System
from celldetr.segmentation.systems import build_system


def load_system(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, mpp: float, patch_size: int
) -> System:
    """Rebuild a system from its file, in evaluation mode.

    `mpp` and `patch_size` are the pixel size, um, and the side, px, of the images that it will see.

    Raises
    ------
    InputError
        Not a model file of such a system, its weights do not fit its settings, or it was trained on other images.
    """
    content = model_file(path, read_checkpoint(path))
    check_facts(path, content, mpp=mpp, patch_size=patch_size)
    settings = content["settings"]
    if not isinstance(settings.get("segmentation"), Mapping):
        raise InputError(
            f"{path}: got a model of CellDETR or Deformable DETR, expected one of a system that segments nuclei"
        )
    try:
        known = SystemSettings.from_dict(settings, "settings")
    except ConfigError as error:
        raise InputError(f"{path}: its settings do not fit this version of celldetr; {error}") from error
    model = build_system(known)
    load_exactly(model, content["state"], Path(path))
    return model.to(device).eval()
