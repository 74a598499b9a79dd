"""The systems by name; each needs packages of envs/baselines.yaml, which are imported when it is built."""

from importlib import import_module

from celldetr.config.segmentation import SystemName, SystemSettings
from celldetr.runtime.errors import ConfigError
from celldetr.segmentation.system import System

_MODULES: dict[SystemName, tuple[str, str]] = {
    "mask_rcnn": ("mask_rcnn", "MaskRCNN"),
    "micro_net": ("micro_net", "MicroNet"),
    "hover_net": ("hover_net", "HoverNet"),
    "cellvit_256": ("cellvit", "CellViT"),
    "cellvit_sam_b": ("cellvit", "CellViT"),
}
"""Module of this room, and its class."""


def build_system(settings: SystemSettings) -> System:
    """Build a system with random weights.

    Raises
    ------
    ConfigError
        A package that it needs is not installed.
    """
    name = settings.segmentation.system
    module, kind = _MODULES[name]
    try:
        built: System = getattr(import_module(f"celldetr.segmentation.{module}"), kind)(settings)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"segmentation.system: {name} needs the package {error.name}, which is not installed; use the environment "
            "of envs/baselines.yaml (conda), or `make baselines`"
        ) from error
    return built
