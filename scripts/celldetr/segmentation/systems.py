"""The systems by name; each needs packages of envs/baselines.yaml, which are imported when it is built."""

from celldetr.config.segmentation import SystemName, SystemSettings
from celldetr.runtime.errors import ConfigError
from celldetr.segmentation.system import System


def build_system(settings: SystemSettings) -> System:
    """Build a system with random weights.

    Raises
    ------
    ConfigError
        A package that it needs is not installed.
    """
    name = settings.segmentation.system
    try:
        return _class(name)(settings)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"segmentation.system: {name} needs the package {error.name}, which is not installed; use the environment "
            "of envs/baselines.yaml (conda), or `make baselines`"
        ) from error


def _class(name: SystemName) -> type[System]:
    """Import the class of a system, by a statement: the hash of the code that a rule depends on follows these."""
    match name:
        case "mask_rcnn":
            from celldetr.segmentation.mask_rcnn import MaskRCNN

            return MaskRCNN
        case "micro_net":
            from celldetr.segmentation.micro_net import MicroNet

            return MicroNet
        case "hover_net":
            from celldetr.segmentation.hover_net import HoverNet

            return HoverNet
        case "cellvit_256" | "cellvit_sam_b":
            from celldetr.segmentation.cellvit import CellViT

            return CellViT
