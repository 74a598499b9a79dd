"""The stages of training as Lightning modules around one model class."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from celldetr import boxes as box_ops
from celldetr.evaluation.matching import Nuclei, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, count_images, scores
from celldetr.experiment import Experiment, TrainingSettings
from celldetr.model.celldetr import CellDETR, Detections, Features
from celldetr.training.augment import augment, draw
from celldetr.training.data import (
    DROPOUT,
    NOISE,
    Batch,
    PatchData,
    Targets,
    TrainingBatches,
    ValidationBatches,
    random_stream,
)
from celldetr.training.errors import NonFinite
from celldetr.training.losses import class_loss, detection_losses, weighted
from celldetr.training.matching import Matches, match

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


class SupervisedStage(pl.LightningModule):
    """Supervised training of any mode, on PanNuke or on cell types of Xenium (paper, 3.1, 3.2, 4.4 and A.1).

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
        self.val_sums: dict[str, float] = {}
        self._counts = np.zeros((1 + len(self.classes), len(COUNTS)), dtype=np.int64)
        self.last_losses: dict[str, float] = {}

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
        """AdamW with a learning rate of its own for the backbone."""
        backbone: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (backbone if name.startswith("backbone.") else rest).append(parameter)
        groups = [
            {"params": rest, "lr": self.settings.lr, "base_lr": self.settings.lr},
            {"params": backbone, "lr": self.settings.backbone_lr, "base_lr": self.settings.backbone_lr},
        ]
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
            given = self._noised(targets, batch)
        with self._naming(batch):
            n_boxes = max(1, batch.boxes_global) / self.trainer.world_size
            losses, _, _, _ = self.losses(images, targets, given, n_boxes)
            total = weighted(losses, self.settings.losses)
            self.last_losses = _checked(losses, total)
        for name, value in self.last_losses.items():
            self.train_sums[name] = self.train_sums.get(name, 0.0) + value
        return total

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the step and log it."""
        self.step += 1
        if self.logger is not None and (self.step % LOG_STEPS == 0 or self.step == 1):
            values = {f"train/{name}": value for name, value in self.last_losses.items()}
            values["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.logger.log_metrics(values, step=self.step)

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self.val_sums = {}
        self._counts[:] = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum the losses of a batch, undivided, and count its detections."""
        images = pixels(batch.images)
        with self._naming(batch):
            losses, features, detections, embeddings = self.losses(images, batch.targets, batch.targets.boxes, 1.0)
            values = _checked(losses, weighted(losses, self.settings.losses))
        values["boxes"] = float(batch.boxes_global)
        for name, value in values.items():
            self.val_sums[name] = self.val_sums.get(name, 0.0) + value
        self._counts += self._count(batch.targets, self._found(features, detections, embeddings))

    def losses(
        self, images: Tensor, targets: Targets, given: Tensor, n_boxes: float
    ) -> tuple[dict[str, Tensor], Features, Detections, Tensor | None]:
        """Unweighted losses of a batch.

        Parameters
        ----------
        images
            (B, 3, S, S) in [0, 1].
        targets
            Their nuclei.
        given
            Boxes (B, R, 4) that the representation decoder gets in mode ``parallel``: those of `targets`, or noised.
        n_boxes
            Divisor of the losses.

        Returns
        -------
        tuple
            The losses (see `detection_losses` and `class_loss`); features; detections; in mode ``sequential`` the
            embeddings of all queries (B, Q, C), else none.
        """
        features = self.model.encode(images)
        detections = self.model.detect(features)
        logits, boxes = detections
        with torch.autocast(images.device.type, enabled=False):
            matches = match(logits.detach(), boxes.detach(), targets, self.settings.losses)
            losses = detection_losses(logits, boxes, targets, matches, n_boxes)
        embeddings = None
        if self.mode == "sequential":
            embeddings = self.model.represent(features, boxes[-1].detach())
            last: Matches = matches.of_layer(logits.shape[0] - 1)
            class_logits = self.model.classify(embeddings[last.image, last.query])
            labels = targets.labels[last.image, last.box]
        elif self.mode == "parallel":
            class_logits = self.model.classify(self.model.represent(features, given, targets.valid))
            labels = targets.labels
        if self.mode != "baseline":
            with torch.autocast(images.device.type, enabled=False):
                losses["classes"] = class_loss(class_logits, labels, n_boxes)
        return losses, features, detections, embeddings

    def _noised(self, targets: Targets, batch: Batch) -> Tensor:
        """Boxes for the representation decoder (paper, A.2)."""
        noise = self.settings.noise
        if self.mode != "parallel" or not noise.share:
            return targets.boxes
        random = random_stream(self.settings.seed, batch.step, NOISE)
        uniforms = random.random((batch.boxes_global, box_ops.NOISE_DRAWS), dtype=np.float32)
        mine = uniforms[batch.boxes_before : batch.boxes_before + int(targets.counts.sum())]
        padded = torch.ones((*targets.labels.shape, box_ops.NOISE_DRAWS))  # 1 is no share: padding stays as it is
        slots = torch.arange(targets.labels.shape[1]) < targets.counts[:, None]
        padded[slots] = torch.from_numpy(mine)
        return box_ops.noise(
            targets.boxes,
            padded.to(targets.boxes.device),
            low=noise.low,
            high=noise.high,
            enlarge=noise.enlarge,
            share=noise.share,
        )

    @contextlib.contextmanager
    def _naming(self, batch: Batch) -> Iterator[None]:
        """Name the patches when something in a batch is not finite."""
        try:
            yield
        except NonFinite as error:
            training = batch.step >= 0
            data = self.train_data if training else self.val_data
            where = f"step {batch.step + 1}" if training else f"validation after step {self.step}"
            names = [data.name(int(patch)) for patch in batch.patches]
            more = f" and {len(names) - _SHOWN_PATCHES} more" if len(names) > _SHOWN_PATCHES else ""
            raise NonFinite(
                f"{where}: {error} are not finite, in a batch of patches {', '.join(names[:_SHOWN_PATCHES])}{more} "
                "(store:patch). Look at these patches; else lower training.lr or training.gradient_clip, or use "
                "training.precision: fp32"
            ) from error

    def _found(
        self, features: Features, detections: Detections, embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image, centre (px) and class of the detections: nucleus score >= threshold, class = the best."""
        score = detections.logits[-1].sigmoid()
        boxes = detections.boxes[-1]
        kept = score.amax(dim=-1) >= self.nucleus_threshold
        image, query = kept.nonzero(as_tuple=True)
        clipped = box_ops.cxcywh_to_xyxy(boxes[image, query]).clamp(0, 1)  # as predictions are
        centres = (clipped[:, :2] + clipped[:, 2:]) * (self.val_data.patch_size / 2)
        if self.mode == "baseline":
            return image, centres, score[image, query].argmax(dim=-1)
        if embeddings is None:
            counts = kept.sum(dim=1)
            slot = kept.cumsum(dim=1)[image, query] - 1
            padded = boxes.new_tensor([0.5, 0.5, 1, 1]).repeat(len(boxes), max(1, int(counts.max())), 1)
            padded[image, slot] = boxes[image, query]
            valid = torch.arange(padded.shape[1], device=boxes.device) < counts[:, None]
            chosen = self.model.represent(features, padded, valid)[image, slot]
        else:
            chosen = embeddings[image, query]
        return image, centres, self.model.classify(chosen).argmax(dim=-1)

    def _count(self, targets: Targets, found: tuple[Tensor, Tensor, Tensor]) -> NDArray[np.int64]:
        """Count as `celldetr.evaluation.metrics` does, summed over the images."""
        image, centres, labels = (values.cpu() for values in found)
        size = self.val_data.patch_size
        valid = torch.arange(targets.labels.shape[1]) < targets.counts[:, None]
        counts = targets.counts.numpy()
        truth = Nuclei(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            (targets.boxes.cpu()[valid][:, :2].double() * size).numpy(),
            targets.labels.cpu()[valid].numpy(),
        )
        predicted = Nuclei(
            np.searchsorted(image.numpy(), np.arange(len(counts) + 1)).astype(np.int64),
            centres.double().numpy(),
            labels.numpy(),
        )
        pairs = pair_nuclei(truth, predicted, self.radius)
        return count_images(truth, predicted, pairs, len(self.classes), radius=self.radius).sum(axis=0)

    def train_means(self) -> dict[str, float]:
        """Losses of the epoch so far, averaged over its steps (and processes)."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        return {name: value / steps for name, value in self.reduced(self.train_sums, mean=True).items()}

    def val_summary(self) -> dict[str, Any]:
        """Losses per nucleus, and P, R, F of detection and F of the classes, over all validation patches.

        ``score``, the mean of the detection's F and the mean F of the classes, chooses the checkpoint; it is none
        without true nuclei.
        """
        names = [*LOSSES[self.mode], "boxes"]
        sums = self.reduced({name: self.val_sums.get(name, 0.0) for name in names})
        boxes = max(1.0, sums.pop("boxes"))
        flat = self.reduced({str(k): float(value) for k, value in enumerate(self._counts.ravel())})
        counts = np.array(list(flat.values())).reshape(self._counts.shape)
        table = scores(counts)
        by_class = table[1:, 2]
        mean = float(np.nanmean(by_class)) if np.isfinite(by_class).any() else math.nan
        detection = [float(value) for value in table[0]]
        return {
            **{name: value / boxes for name, value in sums.items()},
            "detection": dict(zip(("precision", "recall", "f1"), map(_number, detection), strict=True)),
            "f1": {name: _number(float(value)) for name, value in zip(self.classes, by_class, strict=True)},
            "class_f1": _number(mean),
            "score": _number((detection[2] + mean) / 2 if math.isfinite(mean) else detection[2]),
        }

    def reduced(self, values: Mapping[str, float], *, mean: bool = False) -> dict[str, float]:
        """Sum, or mean, over the processes."""
        world = self.trainer.world_size
        if world == 1:
            return dict(values)
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return dict(zip(values, (summed / (world if mean else 1)).tolist(), strict=True))


LOSSES = {
    "baseline": ("loss", "nucleus", "l1", "giou"),
    "sequential": ("loss", "nucleus", "l1", "giou", "classes"),
    "parallel": ("loss", "nucleus", "l1", "giou", "classes"),
}
"""Losses that are logged in each mode: the weighted sum, and the last layer's parts without weights."""


def _checked(losses: Mapping[str, Tensor], total: Tensor) -> dict[str, float]:
    """Numbers for the log, in one transfer: the total and the last layer's parts."""
    last = [value if value.ndim == 0 else value[-1] for value in losses.values()]
    values = torch.stack([total.detach(), *(value.detach() for value in last)]).tolist()
    found = dict(zip(("loss", *losses), values, strict=True))
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        raise NonFinite(f"losses {', '.join(broken)}")
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _same(batch: Any) -> Any:
    return batch
