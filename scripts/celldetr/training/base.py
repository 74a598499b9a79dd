"""What all stages of training share, as a Lightning module around the one model class."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from celldetr.config.experiment import Experiment, TrainingSettings
from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, count_images, scores
from celldetr.model import boxes as box_ops
from celldetr.model.celldetr import CellDETR, Detections, Features
from celldetr.training.augment import augment, draw
from celldetr.training.data import (
    DROPOUT,
    Batch,
    PatchData,
    Targets,
    TrainingBatches,
    ValidationBatches,
    random_stream,
)
from celldetr.training.errors import NonFinite
from celldetr.training.losses import detection_losses, weighted
from celldetr.training.matching import Matches, Matching
from celldetr.training.probe import freeze

LOG_STEPS = 10
"""Steps between two points of the TensorBoard curves."""
_SHOWN_PATCHES = 16


def learning_rate_factor(step: int, total: int, settings: TrainingSettings) -> float:
    """Factor of the learning rates at a step: linear warm-up, then cosine to 0 at step `total`."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.warmup_from + (1 - settings.warmup_from) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def pixels(images: Tensor) -> Tensor:
    """Turn images (B, S, S, 3) uint8 into (B, 3, S, S) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


class Outputs(NamedTuple):
    """What a stage computes of a batch.

    Attributes
    ----------
    losses
        Unweighted losses; those of detection layer by layer.
    features, detections
        Results of the encoder and of the detection decoder.
    nuclei
        A vector for each box that the representation decoder got, as far as validation needs them.
    """

    losses: dict[str, Tensor]
    features: Features
    detections: Detections
    nuclei: Tensor | None


class Report:
    """Losses of a batch on their way to the log, in one transfer: the total and the last layer's parts."""

    def __init__(self, batch: Batch, losses: Mapping[str, Tensor], total: Tensor) -> None:
        self.batch = batch
        self._names = ("loss", *losses)
        last = [value if value.ndim == 0 else value[-1] for value in losses.values()]
        self._values = torch.stack([total.detach(), *(value.detach() for value in last)]).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if total.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def values(self) -> dict[str, float]:
        """Numbers by the names of the losses.

        Raises
        ------
        NonFinite
            One of them is NaN or infinite.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        found = dict(zip(self._names, self._values.tolist(), strict=True))
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        if broken:
            raise NonFinite(f"losses {', '.join(broken)}")
        return found


class Stage(pl.LightningModule, ABC):
    """A training run: order, learning rate, augmentation, optimiser, validation; a stage adds its losses.

    Everything random in a step is a function of the seed, the step and, for dropout, the process.

    Parameters
    ----------
    experiment
        Model and recipe.
    model
        Model with its first weights.
    train, val
        Patches; `val` may be empty.
    nucleus_threshold
        Smallest nucleus score of a detection in validation.
    radius
        Largest distance of a pair of centres in validation, px.
    first_step
        Step of the run that comes next; above 0 when a run goes on.
    """

    measures_start = False
    """Whether the log begins with the model as it is before training, as epoch 0."""

    def __init__(
        self,
        experiment: Experiment,
        model: CellDETR,
        train: PatchData,
        val: PatchData,
        *,
        nucleus_threshold: float,
        radius: float,
        first_step: int = 0,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer validation patches than processes
        self.model = model
        self.settings = experiment.training
        self.mode = experiment.model.mode
        self.classes = experiment.model.classes
        self.train_data, self.val_data = train, val
        self.nucleus_threshold, self.radius = nucleus_threshold, radius
        self.step = first_step
        self.steps_per_epoch = math.ceil(len(train) / self.settings.batch_size)
        self.total_steps = self.settings.epochs * self.steps_per_epoch
        self.train_sums: dict[str, float] = {}
        self.last_losses: dict[str, float] = {}
        self._report: Report | None = None
        self._frozen = freeze(model, self.settings.probe)
        self.start_counting()
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation mode; what is frozen is always evaluated."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def on_train_start(self) -> None:
        """Begin in training mode, with the weights on their device."""
        self.train()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches from the next step to the end of its epoch; made anew for every epoch."""
        batches = TrainingBatches(
            self.train_data, self.settings.batch_size, self.settings.seed, self.global_rank, self.trainer.world_size
        )
        epoch = self.step // self.steps_per_epoch
        return self._loader(batches, range(self.step, (epoch + 1) * self.steps_per_epoch))

    def val_dataloader(self) -> DataLoader[Batch]:
        """All validation patches, shared by the processes."""
        size = max(1, self.settings.batch_size // self.trainer.world_size)
        batches = ValidationBatches(self.val_data, size, self.global_rank, self.trainer.world_size)
        return self._loader(batches, range(len(batches)))

    def _loader(self, batches: TrainingBatches | ValidationBatches, order: range) -> DataLoader[Batch]:
        workers = self.settings.workers if self.settings.cache == "none" else 0
        return DataLoader(batches, batch_size=None, sampler=order, num_workers=workers, collate_fn=_same)

    def configure_optimizers(self) -> Optimizer:
        """AdamW of what trains, with a learning rate of its own for the backbone."""
        backbone: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (backbone if name.startswith("backbone.") else rest).append(parameter)
        rates = ((rest, self.settings.lr), (backbone, self.settings.backbone_lr))
        groups = [{"params": those, "lr": rate, "base_lr": rate} for those, rate in rates if those]
        return torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay, fused=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limit the norm of the gradient (Lightning's own way refuses fused optimisers)."""
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one step.

        Raises
        ------
        NonFinite
            A loss is NaN or infinite; names the patches.
        """
        seed, step = self.settings.seed, self.step
        torch.manual_seed(int(random_stream(seed, step, DROPOUT).integers(2**62)) + self.global_rank)
        factor = learning_rate_factor(step, self.total_steps, self.settings)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["base_lr"] * factor
        with torch.autocast(self.device.type, enabled=False):
            draws = draw(self.settings.augmentation, seed, step, self.settings.batch_size).share(batch.share)
            images, targets = augment(pixels(batch.images), batch.targets, draws, self.settings.augmentation)
        with self._naming(batch):
            losses = self.compute(images, targets, batch).losses
            total = self.total(losses)
        self.settle()
        self._report = Report(batch, losses, total)
        if total.device.type == "cpu":
            self.settle()
        return total

    def settle(self) -> None:
        """Check and count the losses of the last step.

        On a GPU that is done a step later, when they have arrived: reading them at once would make every step wait.

        Raises
        ------
        NonFinite
            A loss is NaN or infinite; names the patches.
        """
        report, self._report = self._report, None
        if report is None:
            return
        with self._naming(report.batch):
            self.last_losses = report.values()
        for name, value in self.last_losses.items():
            self.train_sums[name] = self.train_sums.get(name, 0.0) + value

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the step and log it."""
        self.step += 1
        if self.logger is not None and (self.step % LOG_STEPS == 0 or self.step == 1):
            self.settle()
            values = {f"train/{name}": value for name, value in self.last_losses.items()}
            values["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.logger.log_metrics(values, step=self.step)

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self.start_counting()

    def start_counting(self) -> None:
        """Forget the last validation."""
        self.val_sums: dict[str, float] = {}
        self._counts = np.zeros((1 + max(1, len(self.classes)), len(COUNTS)), dtype=np.int64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum the losses of a batch, undivided, and count its detections."""
        images = pixels(batch.images)
        with self._naming(batch):
            outputs = self.compute(images, batch.targets, batch)
            values = Report(batch, outputs.losses, self.total(outputs.losses)).values()
        values["boxes"] = float(batch.boxes_global)
        for name, value in values.items():
            self.val_sums[name] = self.val_sums.get(name, 0.0) + value
        self.measure(batch, outputs)

    @abstractmethod
    def compute(self, images: Tensor, targets: Targets, batch: Batch) -> Outputs:
        """Compute losses, not weighted yet, and what validation looks at.

        Parameters
        ----------
        images
            (B, 3, S, S) in [0, 1].
        targets
            Their nuclei.
        batch
            What these come from; in training they are augmented.
        """

    @abstractmethod
    def measure(self, batch: Batch, outputs: Outputs) -> None:
        """Count what validation reports beside the losses."""

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the losses of `compute`."""
        return weighted(losses, self.settings.losses)

    def detect(self, features: Features, targets: Targets) -> tuple[Detections, Matching]:
        """Find nuclei and begin to match them; what does not need the matches is best computed before their result."""
        detections = self.model.detect(features)
        logits, boxes = (values.detach() for values in detections)
        return detections, Matching(logits, boxes, targets, self.settings.losses)

    def detection_losses(
        self, detections: Detections, targets: Targets, matching: Matching, n_boxes: float
    ) -> tuple[dict[str, Tensor], Matches]:
        """Losses of the detection decoder (see `celldetr.training.losses.detection_losses`), and the matches."""
        matches = matching.result()
        with torch.autocast(detections.logits.device.type, enabled=False):
            losses = detection_losses(*detections, targets, matches, n_boxes)
        return losses, matches

    def n_boxes(self, batch: Batch) -> float:
        """Divisor of the losses: a process' share of the nuclei in the global batch; in validation they are summed."""
        return max(1, batch.boxes_global) / self.trainer.world_size if batch.training else 1.0

    @contextlib.contextmanager
    def _naming(self, batch: Batch) -> Iterator[None]:
        """Name the patches when something in a batch is not finite."""
        try:
            yield
        except NonFinite as error:
            self.settle()  # what broke the step before breaks this one, too
            data = self.train_data if batch.training else self.val_data
            where = f"step {batch.step + 1}" if batch.training else f"validation after step {self.step}"
            names = [data.name(int(patch)) for patch in batch.patches]
            more = f" and {len(names) - _SHOWN_PATCHES} more" if len(names) > _SHOWN_PATCHES else ""
            raise NonFinite(
                f"{where}: {error} are not finite, in a batch of patches {', '.join(names[:_SHOWN_PATCHES])}{more} "
                "(store:patch). Look at these patches; else lower training.lr or training.gradient_clip, or use "
                "training.precision: fp32"
            ) from error

    def kept(self, detections: Detections) -> tuple[Tensor, Tensor, Tensor]:
        """Image (D,), query (D,) and centre (D, 2) in px of the detections with a nucleus score >= threshold."""
        boxes = detections.boxes[-1]
        score = detections.logits[-1].sigmoid().amax(dim=-1)
        image, query = (score >= self.nucleus_threshold).nonzero(as_tuple=True)
        clipped = box_ops.cxcywh_to_xyxy(boxes[image, query]).clamp(0, 1)  # as predictions are
        return image, query, (clipped[:, :2] + clipped[:, 2:]) * (self.val_data.patch_size / 2)

    def count(self, targets: Targets, true_labels: Tensor, image: Tensor, centres: Tensor, labels: Tensor) -> None:
        """Count detections as `celldetr.evaluation.metrics` does, summed over the images.

        Parameters
        ----------
        targets
            True nuclei of the batch, without augmentation.
        true_labels
            Their classes (B, R), -1 where unknown.
        image, centres, labels
            Image (D,), centre (D, 2) in px, and class (D,) of the detections.
        """
        size = self.val_data.patch_size
        valid = torch.arange(true_labels.shape[1]) < targets.counts[:, None]
        counts = targets.counts.numpy()
        truth = NucleusCentres(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            (targets.boxes.cpu()[valid][:, :2].double() * size).numpy(),
            true_labels.cpu()[valid].numpy(),
        )
        predicted = NucleusCentres(
            np.searchsorted(image.cpu().numpy(), np.arange(len(counts) + 1)).astype(np.int64),
            centres.cpu().double().numpy(),
            labels.cpu().numpy(),
        )
        pairs = pair_nuclei(truth, predicted, self.radius)
        classes = len(self._counts) - 1
        self._counts += count_images(truth, predicted, pairs, classes, radius=self.radius).sum(axis=0)

    def counted_scores(self) -> tuple[dict[str, float | None], NDArray[np.float64]]:
        """P, R, F of detection, and F of each class (K,), over the validation patches of all processes."""
        table = scores(self.summed(self._counts).astype(np.int64))
        detection = dict(zip(("precision", "recall", "f1"), (number(float(value)) for value in table[0]), strict=True))
        return detection, table[1:, 2]

    def train_means(self) -> dict[str, float]:
        """Losses of the epoch so far, averaged over its steps (and processes)."""
        self.settle()
        steps = (self.step - 1) % self.steps_per_epoch + 1
        return {name: value / steps for name, value in self.reduced(self.train_sums, mean=True).items()}

    @abstractmethod
    def val_summary(self) -> dict[str, Any]:
        """Sum up validation for the log; ``score`` chooses the checkpoint, it may be none."""

    def reduced(self, values: Mapping[str, float], *, mean: bool = False) -> dict[str, float]:
        """Sum, or mean, over the processes."""
        summed = self.summed(np.array(list(values.values()), dtype=np.float64))
        world = self.trainer.world_size
        return dict(zip(values, (summed / (world if mean else 1)).tolist(), strict=True))

    def summed(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """Sum of an array over the processes."""
        if self.trainer.world_size == 1:
            return values.astype(np.float64)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.cpu().numpy()


def number(value: float) -> float | None:
    """Value for the log: none instead of NaN."""
    return value if math.isfinite(value) else None


def _same(batch: Any) -> Any:
    return batch
