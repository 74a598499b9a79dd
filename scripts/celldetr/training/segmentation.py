"""Training of systems that segment nuclei (`celldetr.segmentation`), by the same loop, patches and augmentation."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.segmentation import SegmentationExperiment, SystemSettings
from celldetr.model.device import to_device
from celldetr.segmentation.system import System, Truth
from celldetr.segmentation.systems import build_system
from celldetr.training.balance import sampling_weights
from celldetr.training.data import Batch, PatchData
from celldetr.training.optimizer import parameter_groups
from celldetr.training.processes import Group
from celldetr.training.stage import Stage

_OPTIMIZERS: Mapping[str, type[Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD}
_MOMENTUM = 0.9

log = logging.getLogger(__name__)


class SegmentationStage(Stage):
    """Losses and validation of a segmentation system; see `celldetr.training.stage.Stage`.

    Several processes share a batch: each takes the losses of its images, and the gradient is the mean over the
    processes. On GPUs the statistics of batch normalisation are those of the whole batch, on a CPU those of a process,
    as in the ResNet of a Mask R-CNN without pretrained weights; those of the first process are kept.
    """

    reads_instances = True
    mode = "segmentation"
    model: System

    def __init__(
        self,
        experiment: SegmentationExperiment,
        model: System,
        train: PatchData,
        val: PatchData,
        scoring: ScoringSettings,
        group: Group | None = None,
    ) -> None:
        self.recipe = experiment.segmentation
        self.encoder = model.encoder
        super().__init__(experiment, model, train, val, scoring, group)
        self._steps_per_epoch = -(-len(train) // self.settings.batch_size)
        if self.group.world > 1 and next(model.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        number = {name: index for index, name in enumerate(self.model_settings.tissues)}
        self._tissues = np.array([number.get(str(name), -1) for name in train.tissues], dtype=np.int64)

    @classmethod
    def build_model(
        cls,
        experiment: SegmentationExperiment,
        train: PatchData,
        backbone: Path | None,
        initial: Path | None,
        device: str,
    ) -> System:
        """Build the system with random weights, then those of a file as far as it has them."""
        torch.manual_seed(experiment.training.seed)
        tissues = tuple(sorted({str(name) for name in train.tissues if name}))
        settings = SystemSettings(
            segmentation=experiment.segmentation, classes=experiment.classes, tissues=tissues, mpp=train.mpp
        )
        model = build_system(settings)
        for path in filter(None, (backbone, initial)):
            kept = model.load_pretrained(path)
            log.info("%d tensors start from random weights, not from %s: %s", len(kept), path, ", ".join(kept))
        return model.to(device)

    @classmethod
    def patch_weights(cls, experiment: SegmentationExperiment, train: PatchData) -> NDArray[np.float64] | None:
        """Weights of the patches by their classes and tissues; see `celldetr.training.balance.sampling_weights`."""
        if not experiment.segmentation.balance:
            return None
        present = np.zeros((len(train), len(experiment.classes)), dtype=bool)
        patch = np.repeat(np.arange(len(train)), np.diff(train.ptr))
        present[patch, train.labels] = True
        tissues = np.unique(train.tissues.astype(str), return_inverse=True)[1]
        return sampling_weights(present, tissues, experiment.segmentation.balance)

    @property
    def model_settings(self) -> SystemSettings:
        """What the model file is built from."""
        return self.model.settings

    def make_optimizer(self) -> Optimizer:
        """Optimiser of the recipe; the encoder has its own learning rate."""
        groups, recipe = parameter_groups(self.model, self.settings, self.encoder), self.recipe
        own = {"momentum": _MOMENTUM} if recipe.optimizer == "sgd" else {"betas": recipe.betas}
        kind: Any = _OPTIMIZERS[recipe.optimizer]
        made: Optimizer = kind(groups, weight_decay=self.settings.weight_decay, fused=True, **own)
        return made

    def learning_rate_factor(self, step: int, total: int) -> float:
        """Factor of the learning rates: linear warm-up, then the schedule of the recipe."""
        if self.recipe.schedule == "cosine" or step < self.settings.warmup_steps:
            return super().learning_rate_factor(step, total)
        epoch = step // self._steps_per_epoch
        if self.recipe.schedule == "exponential":
            return float(self.recipe.decay**epoch)
        begun = [start for start in self.recipe.steps if start <= epoch]
        return self.recipe.steps[max(begun)] if begun else 1.0

    def train(self, epoch: int = 0) -> None:
        """Switch to training mode; a frozen encoder stays in evaluation mode."""
        self.model.train()
        self.model.epoch = 1 + epoch
        if not self.encoder:
            return
        frozen, encoder = epoch < self.recipe.frozen_epochs, self.model.get_submodule(self.encoder)
        encoder.train(not frozen)
        encoder.requires_grad_(not frozen)

    def training_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of a prepared batch, and their sum: this process' part of the mean over the processes."""
        assert batch.instances is not None
        tissues = to_device(torch.from_numpy(self._tissues[batch.patches]), batch.images.device)
        truth = Truth(batch.instances.long(), batch.targets.labels, tissues)
        losses = {name: loss / self.group.world for name, loss in self.model.losses(batch.images, truth).items()}
        total = torch.stack(list(losses.values())).sum()
        return {name: loss.detach() for name, loss in losses.items()}, total

    def validate(self, batch: Batch) -> None:
        """Count the nuclei that the system finds."""
        found = self.model.segment(batch.images)
        self.count(
            batch,
            np.repeat(np.arange(len(found)), [len(nuclei.boxes) for nuclei in found]),
            np.concatenate([nuclei.boxes for nuclei in found]),
            np.concatenate([nuclei.nucleus_score for nuclei in found]),
            np.concatenate([nuclei.class_scores for nuclei in found]),
        )

    def validation_summary(self) -> dict[str, Any]:
        """P, R, F of detection, and F of the classes, over all validation patches; see `validation_scores`."""
        return self.validation_scores()
