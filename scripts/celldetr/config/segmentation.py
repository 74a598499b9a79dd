"""Settings of the systems that segment nuclei, with which CellDETR is compared (stage segmentation)."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from celldetr.config.base import Count, NotNegative, NotNegativeInt, Positive, Settings, Share
from celldetr.config.experiment import TrainingSettings
from celldetr.runtime.errors import ConfigError

SystemName = Literal["mask_rcnn", "micro_net", "hover_net", "cellvit_256", "cellvit_sam_b"]
Beta = Annotated[float, Field(ge=0, lt=1)]
PACKAGES = ("torchvision", "timm", "monai", "cellseg_models_pytorch")
"""What the systems import, beside what all models need; envs/baselines.yaml and `make baselines` bring it."""


def missing_packages() -> list[str]:
    """Return the packages of the systems that this Python cannot import; nothing is imported to find out."""
    return [name for name in PACKAGES if find_spec(name) is None]


class SegmentationSettings(Settings):
    """A system that segments nuclei: its network, what its recipe has beside `training`, and its post-processing."""

    system: SystemName = Field(description="network, losses and post-processing")
    size: Literal["paper", "small"] = Field("paper", description="paper: as published; small: for trying it on a CPU")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="sgd: with momentum 0.9")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the moments of adamw and adam")
    schedule: Literal["cosine", "exponential", "steps"] = Field(
        "cosine",
        description="learning rate after the warm-up; cosine: to 0; exponential: by `decay`; steps: by `steps`",
    )
    decay: float = Field(0.85, gt=0, le=1, description="factor of the learning rate per epoch (exponential)")
    steps: dict[NotNegativeInt, NotNegative] = Field(
        default_factory=dict, description="epoch from which on a factor of the learning rate holds (steps)"
    )
    frozen_epochs: NotNegativeInt = Field(0, description="first epochs in which the encoder does not train")
    balance: Share = Field(
        0.0,
        description="draw patches of rare classes and tissues more often (CellViT: 0.85); 0: each once per epoch",
    )
    max_detections: Count = Field(300, description="most nuclei of a patch (Mask R-CNN)")
    score_threshold: Share = Field(0.5, description="least score of a nucleus (Mask R-CNN)")
    min_area: NotNegativeInt = Field(10, description="smaller nuclei are dropped, px")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if (self.schedule == "steps") != bool(self.steps):
            raise ValueError(f"steps: got {self.steps} with schedule {self.schedule}, expected them with steps alone")
        return self

    def starts(self, weights: Iterable[str]) -> list[str]:
        """Return what the system may start from; `weights` are the names of published weights."""
        if self.size == "small" or self.system == "micro_net":
            return ["none"]
        return ["none", *(["imagenet"] if self.system in ("mask_rcnn", "hover_net") else []), *weights]

    def unread(self) -> list[str]:
        """Return the keys that nothing reads with this system, optimiser and schedule."""
        reads = {
            "betas": self.optimizer != "sgd",
            "decay": self.schedule == "exponential",
            "frozen_epochs": self.system != "micro_net",
            "max_detections": self.system == "mask_rcnn",
            "score_threshold": self.system == "mask_rcnn",
        }
        return [key for key, read in reads.items() if not read]

    def check_epochs(self, epochs: int, where: str) -> None:
        """Refuse a recipe for a longer training.

        Raises
        ------
        ConfigError
            The encoder would never train, or a step of the learning rate would never come.
        """
        if self.frozen_epochs > epochs:
            raise ConfigError(
                f"{where}.frozen_epochs: got {self.frozen_epochs}, expected at most {epochs}, all of training"
            )
        if late := [epoch for epoch in self.steps if epoch >= epochs]:
            raise ConfigError(f"{where}.steps: got epochs {late}, expected 0 to {epochs - 1}, those of training")


class SystemSettings(Settings):
    """What a model file of such a system is built from."""

    segmentation: SegmentationSettings
    classes: tuple[str, ...]
    tissues: tuple[str, ...] = ()  # of the training patches; a system may classify them
    mpp: Positive = 0.25  # of the training patches, um per px


class SegmentationExperiment(Settings):
    """Everything that defines one training run of such a system."""

    name: str
    stage: Literal["segmentation"] = "segmentation"
    classes: tuple[str, ...] = Field(min_length=1)
    segmentation: SegmentationSettings
    training: TrainingSettings = TrainingSettings()
