"""Base of the training stages: what the loop asks of a stage, and how validation counts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import NetworkSettings, TrainingSettings
from celldetr.evaluation.counting import Evaluator
from celldetr.evaluation.matching import NucleusCentres
from celldetr.evaluation.metrics import COUNTS, scores
from celldetr.runtime.errors import NonFinite
from celldetr.training.data import UNLABELLED, Batch, PatchData
from celldetr.training.optimizer import learning_rate_factor, make_optimizer
from celldetr.training.processes import Group

_NAMED_PATCHES = 16  # at most, in an error


class Stage(ABC):
    """Losses and validation of one stage of training.

    `val` may be empty; `scoring` says which detections count in validation. The processes of the group share each
    batch.
    """

    validates_start: ClassVar[bool] = False
    """Whether the untrained model is validated, as epoch 0 of the log."""

    compilable: ClassVar[bool] = False
    """Whether a step can be compiled; see `celldetr.training.detection.DetectionStage`."""

    reads_instances: ClassVar[bool] = False
    """Whether batches hold instance maps."""

    encoder: str
    """Name of the part of the model that trains with ``training.backbone_lr``; "": none."""

    mode: str
    """Of the model, for `celldetr.evaluation.counting.Evaluator`."""

    def __init__(
        self,
        experiment: Any,
        model: nn.Module,
        train: PatchData,
        val: PatchData,
        scoring: ScoringSettings,
        group: Group | None = None,
    ) -> None:
        self.model = model
        self.settings: TrainingSettings = experiment.training
        self.classes: tuple[str, ...] = experiment.classes
        self.train_data, self.val_data = train, val
        self.evaluator = Evaluator(scoring, val.mpp, self.mode)
        self.group = group or Group()
        self.uncompiled_calls = 0  # after `compile`
        self.start_validation()

    @classmethod
    @abstractmethod
    def build_model(
        cls, experiment: Any, train: PatchData, backbone: Path | None, initial: Path | None, device: str
    ) -> nn.Module:
        """Build the model of a run on its device, with its initial weights."""

    @classmethod
    def patch_weights(cls, experiment: Any, train: PatchData) -> NDArray[np.float64] | None:
        """Weights (N,) by which training patches are drawn; None: each once per epoch."""
        return None

    @property
    @abstractmethod
    def model_settings(self) -> NetworkSettings:
        """What the model file is built from."""

    def make_optimizer(self) -> Optimizer:
        """Make the optimiser of the parameters that train."""
        return make_optimizer(self.model, self.settings, self.encoder)

    def learning_rate_factor(self, step: int, total: int) -> float:
        """Factor of the learning rates at a step of `total`."""
        return learning_rate_factor(step, total, self.settings)

    def compile(self, device: str) -> None:
        """Compile the step, if the stage is `compilable`."""
        assert self.compilable

    def give_up_compiling(self) -> None:
        """Run the step as it is again."""
        return None

    @abstractmethod
    def train(self, epoch: int = 0) -> None:
        """Switch to training mode, in an epoch (from 0)."""

    @abstractmethod
    def training_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of a prepared batch, and their weighted sum.

        Both are this process' part of the losses of the whole batch: the sum over the processes is the loss.

        Raises
        ------
        NonFinite
            A value that the losses need is NaN or infinite; names the patches.
        """

    @abstractmethod
    def validate(self, batch: Batch) -> Any:
        """Add a prepared batch to the validation: its losses, and the nuclei that the model finds."""

    def start_validation(self) -> None:
        """Forget the last validation."""
        self.sums: dict[str, float] = {}
        self._counts = np.zeros((1 + max(1, len(self.classes)), len(COUNTS)), dtype=np.int64)

    @abstractmethod
    def validation_summary(self) -> dict[str, Any]:
        """Summarise a validation for the log; ``score`` chooses the model's epoch and may be None."""

    def count(
        self,
        batch: Batch,
        image: NDArray[np.int64],
        boxes: NDArray[np.float32],
        nucleus_score: NDArray[np.float32],
        class_scores: NDArray[np.float32],
    ) -> None:
        """Count nuclei as the test does: D detections, ordered by image (D,), with boxes (D, 4) xyxy px and scores."""
        size, targets = self.val_data.patch_size, batch.targets
        valid = torch.arange(targets.labels.shape[1]) < targets.counts[:, None]
        labels = targets.labels.cpu()[valid].numpy()
        truth = NucleusCentres(
            np.append(0, np.cumsum(targets.counts.numpy())),
            (targets.boxes.cpu()[valid][:, :2].double() * size).numpy(),
            labels if self.classes else np.full_like(labels, UNLABELLED),
        )
        keep = self.evaluator.keep(nucleus_score, class_scores)
        corners = boxes[keep].clip(0, size).astype(np.float64)
        predicted = NucleusCentres(
            np.searchsorted(image[keep], np.arange(len(targets.counts) + 1)),
            (corners[:, :2] + corners[:, 2:]) / 2,
            class_scores[keep].argmax(axis=1) if self.classes else np.zeros(len(corners), dtype=np.int64),
        )
        self._counts += self.evaluator.count(truth, predicted, len(self._counts) - 1).sum(axis=0)

    def counted_scores(self) -> tuple[dict[str, float | None], NDArray[np.float64]]:
        """P, R, F of detection, and F of each class (K,), over the validation patches of all processes."""
        table = scores(self.group.sum(self._counts).astype(np.int64))
        detection = dict(zip(("precision", "recall", "f1"), map(finite, table[0].tolist()), strict=True))
        return detection, table[1:, 2]

    def validation_scores(self) -> dict[str, Any]:
        """P, R, F of detection and F of the classes for the log.

        ``score``, the mean of the detection F and the mean class F, chooses the epoch; it is None without true nuclei.
        """
        detection, by_class = self.counted_scores()
        mean = float(np.nanmean(by_class)) if np.isfinite(by_class).any() else math.nan
        found = detection["f1"] if detection["f1"] is not None else math.nan
        return {
            "detection": detection,
            "f1": {name: finite(float(value)) for name, value in zip(self.classes, by_class, strict=True)},
            "class_f1": finite(mean),
            "score": finite((found + mean) / 2 if math.isfinite(mean) else found),
        }

    @contextmanager
    def naming_patches(self, batch: Batch) -> Iterator[None]:
        """Add the patches of the batch to a `NonFinite` error."""
        try:
            yield
        except NonFinite as error:
            data = self.train_data if batch.training else self.val_data
            where = f"step {batch.step + 1}" if batch.training else "validation"
            names = [data.name(int(patch)) for patch in batch.patches]
            more = f" and {len(names) - _NAMED_PATCHES} more" if len(names) > _NAMED_PATCHES else ""
            raise NonFinite(
                f"{where}: {error} are not finite, in a batch of patches {', '.join(names[:_NAMED_PATCHES])}{more} "
                "(store:patch). Check these patches; otherwise lower training.lr or training.gradient_clip, or set "
                "training.precision: fp32"
            ) from error


class Losses:
    """Losses of a batch on their way to the host, in one transfer: the total, and the last decoder layer's parts."""

    def __init__(self, losses: Mapping[str, Tensor], total: Tensor) -> None:
        self._names = ("loss", *losses)
        last = [value if value.ndim == 0 else value[-1] for value in losses.values()]
        self._values = torch.stack([total.detach(), *(value.detach() for value in last)]).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if total.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def values(self) -> dict[str, float]:
        """Losses by name, once they have arrived.

        Raises
        ------
        NonFinite
            One of them is NaN or infinite.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        found = dict(zip(self._names, self._values.tolist(), strict=True))
        broken = [name for name, value in found.items() if not np.isfinite(value)]
        if broken:
            raise NonFinite(f"losses {', '.join(broken)}")
        return found


def finite(value: float) -> float | None:
    """Value for the log: None instead of NaN or infinity."""
    return value if np.isfinite(value) else None
