"""Base of the training stages: from a batch to its losses, and the counts of validation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from celldetr.config.experiment import Experiment
from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, count_images, scores
from celldetr.model.boxes import cxcywh_to_xyxy
from celldetr.model.celldetr import CellDETR, Detections, Features, float_images
from celldetr.runtime.errors import NonFinite
from celldetr.training.augment import augment, draw
from celldetr.training.data import Batch, PatchData, Targets
from celldetr.training.losses import detection_losses, weighted
from celldetr.training.matching import Matches, Matching
from celldetr.training.processes import Group

TRAINED_PARTS = {"head": ("class_head",), "representation": ("representation", "class_head")}
"""Parts of the model that train with the setting ``training.probe``; all others are frozen."""
_NAMED_PATCHES = 16  # at most, in an error


class Outputs(NamedTuple):
    """What a stage computes of a batch.

    Attributes
    ----------
    losses
        Losses without weights; those of detection for each decoder layer.
    features, detections
        Results of the encoder and of the detection decoder.
    nuclei
        (B, n, C) one vector for each box given to the representation decoder; None if validation does not need them.
    """

    losses: dict[str, Tensor]
    features: Features
    detections: Detections
    nuclei: Tensor | None


class Stage(ABC):
    """Losses and validation of one stage of training.

    Parameters
    ----------
    experiment
        Model and recipe.
    model
        Model on its device. Parts that ``training.probe`` freezes lose their gradients here.
    train, val
        Patches; `val` may be empty.
    nucleus_threshold
        Smallest nucleus score of a detection in validation.
    radius
        Largest distance of a matched pair of centres in validation, px.
    group
        Processes that share each batch.
    """

    validates_start = False
    """Whether the untrained model is validated, as epoch 0 of the log."""

    def __init__(
        self,
        experiment: Experiment,
        model: CellDETR,
        train: PatchData,
        val: PatchData,
        *,
        nucleus_threshold: float,
        radius: float,
        group: Group | None = None,
    ) -> None:
        self.model, self.settings, self.mode = model, experiment.training, experiment.model.mode
        self.classes = experiment.model.classes
        self.train_data, self.val_data = train, val
        self.nucleus_threshold, self.radius = nucleus_threshold, radius
        self.group = group or Group()
        self._frozen = self._freeze()
        self.start_validation()

    def _freeze(self) -> list[nn.Module]:
        """Freeze what ``training.probe`` does not train; autograd then keeps no graph for it."""
        if self.settings.probe == "none":
            return []
        trained = TRAINED_PARTS[self.settings.probe]
        self.model.requires_grad_(False)
        for name in trained:
            self.model.get_submodule(name).requires_grad_(True)
        return [part for name, part in self.model.named_children() if name not in trained]

    def train(self) -> None:
        """Switch to training mode; frozen parts stay in evaluation mode, without dropout."""
        self.model.train()
        for part in self._frozen:
            part.eval()

    @abstractmethod
    def compute(self, images: Tensor, targets: Targets, batch: Batch) -> Outputs:
        """Compute the losses of a batch and what validation looks at.

        Parameters
        ----------
        images
            (B, 3, S, S) in [0, 1].
        targets
            Their nuclei.
        batch
            The batch that these were made from; in training they are augmented.
        """

    @abstractmethod
    def measure(self, batch: Batch, outputs: Outputs) -> None:
        """Count what validation reports beside the losses."""

    @abstractmethod
    def validation_summary(self) -> dict[str, Any]:
        """Summarise a validation for the log; ``score`` chooses the model's epoch and may be None."""

    def training_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of an augmented batch, and their weighted sum.

        Both are this process' part of the losses of the whole batch: the sum over the processes is the loss.

        Raises
        ------
        NonFinite
            A matching cost is NaN or infinite; names the patches.
        """
        settings = self.settings
        with torch.autocast(batch.images.device.type, enabled=False):
            draws = draw(settings.augmentation, settings.seed, batch.step, settings.batch_size).of(batch.rows)
            images, targets = augment(float_images(batch.images), batch.targets, draws, settings.augmentation)
        with self.naming_patches(batch):
            losses = self.compute(images, targets, batch).losses
        return losses, self.total(losses)

    def start_validation(self) -> None:
        """Forget the last validation."""
        self.sums: dict[str, float] = {}
        self._counts = np.zeros((1 + max(1, len(self.classes)), len(COUNTS)), dtype=np.int64)

    def validate(self, batch: Batch) -> None:
        """Sum the losses of a batch, undivided, and count its detections.

        Raises
        ------
        NonFinite
            A loss or matching cost is NaN or infinite; names the patches.
        """
        with self.naming_patches(batch):
            outputs = self.compute(float_images(batch.images), batch.targets, batch)
            values = Losses(outputs.losses, self.total(outputs.losses)).values()
        for name, value in (values | {"boxes": float(batch.boxes_global)}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.measure(batch, outputs)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the losses of `compute`."""
        return weighted(losses, self.settings.losses)

    def detect(self, features: Features, targets: Targets) -> tuple[Detections, Matching]:
        """Detect nuclei and start matching; do other work before calling ``result()`` of the matching."""
        detections = self.model.detect(features)
        logits, boxes = (values.detach() for values in detections)
        return detections, Matching(logits, boxes, targets, self.settings.matching)

    def detection_losses(
        self, detections: Detections, targets: Targets, matching: Matching, divisor: float
    ) -> tuple[dict[str, Tensor], Matches]:
        """Losses of the detection decoder (see `celldetr.training.losses.detection_losses`), and the matches."""
        matches = matching.result()
        with torch.autocast(detections.logits.device.type, enabled=False):
            losses = detection_losses(*detections, targets, matches, divisor)
        return losses, matches

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

    def kept(self, detections: Detections) -> tuple[Tensor, Tensor, Tensor]:
        """Image (D,), query (D,) and centre (D, 2) in px of the detections with a nucleus score >= threshold."""
        boxes = detections.boxes[-1]
        score = detections.logits[-1].sigmoid().amax(dim=-1)
        image, query = (score >= self.nucleus_threshold).nonzero(as_tuple=True)
        clipped = cxcywh_to_xyxy(boxes[image, query]).clamp(0, 1)  # as in predictions
        return image, query, (clipped[:, :2] + clipped[:, 2:]) * (self.val_data.patch_size / 2)

    def count(self, targets: Targets, true_labels: Tensor, image: Tensor, centres: Tensor, labels: Tensor) -> None:
        """Count detections as `celldetr.evaluation.metrics` does, summed over the images.

        Parameters
        ----------
        targets
            True nuclei of the batch, not augmented.
        true_labels
            Their classes (B, R), -1 if unknown.
        image, centres, labels
            Image (D,) in ascending order, centre (D, 2) in px, and class (D,) of the detections.
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
        table = scores(self.group.sum(self._counts).astype(np.int64))
        detection = dict(zip(("precision", "recall", "f1"), map(finite, table[0].tolist()), strict=True))
        return detection, table[1:, 2]

    def summed(self, *names: str) -> dict[str, float]:
        """Sum what validation counted over the processes."""
        values = self.group.sum(np.array([self.sums.get(name, 0.0) for name in names]))
        return dict(zip(names, values.tolist(), strict=True))


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
