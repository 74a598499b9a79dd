"""Base of the training stages: from a batch to its losses, and the counts of validation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import Experiment
from celldetr.evaluation.counting import Evaluator
from celldetr.evaluation.matching import NucleusCentres
from celldetr.evaluation.metrics import COUNTS, scores
from celldetr.model.celldetr import CellDETR, Detections, Features, ImagePredictions, Seen
from celldetr.model.compiled import compiled
from celldetr.model.device import to_device
from celldetr.runtime.errors import NonFinite
from celldetr.training.data import UNLABELLED, Batch, PatchData, Targets
from celldetr.training.matching import Matching, costs
from celldetr.training.processes import Group

TRAINED_PARTS = {"head": ("class_head",), "representation": ("representation", "class_head")}
"""Parts of the model that train with the setting ``training.probe``; all others are frozen."""
_NAMED_PATCHES = 16  # at most, in an error


class Outputs(NamedTuple):
    """What a stage computes of a batch."""

    losses: dict[str, Tensor]
    """Losses without weights; those of detection for each decoder layer."""
    total: Tensor
    """Their weighted sum, ()."""
    seen: Seen
    inner: Any
    """What `Stage.inner` returned."""


class Stage(ABC):
    """Losses and validation of one stage of training.

    Parts of the model that ``training.probe`` freezes lose their gradients here. `val` may be empty; `scoring` says
    which detections count in validation. The processes of the group share each batch.

    What a step computes lies in four functions of tensors whose shapes depend on no value, `REGIONS`: nothing in them
    waits for the device, and each can be compiled as one graph. Between `costs` and `losses` nuclei are matched on the
    CPU, while the device is busy with `inner`.
    """

    REGIONS = ("look", "costs", "inner", "losses")

    uncompiled_calls: int
    """Calls of these functions after `compile` that ran uncompiled."""

    validates_start = False
    """Whether the untrained model is validated, as epoch 0 of the log."""

    def __init__(
        self,
        experiment: Experiment,
        model: CellDETR,
        train: PatchData,
        val: PatchData,
        scoring: ScoringSettings,
        group: Group | None = None,
    ) -> None:
        self.model, self.settings, self.mode = model, experiment.training, experiment.model.mode
        self.classes = experiment.model.classes
        self.train_data, self.val_data = train, val
        self.evaluator = Evaluator(scoring, val.mpp, self.mode)
        self.group = group or Group()
        self.uncompiled_calls = 0
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

    def compile(self, device: str) -> None:
        """Compile each of the four functions when it is first called with tensors of some shapes."""
        for name in self.REGIONS:
            setattr(self, name, compiled(getattr(self, name), device, self._missed))

    def _missed(self) -> None:
        self.uncompiled_calls += 1

    def give_up_compiling(self) -> None:
        """Run the four functions as they are again."""
        for name in self.REGIONS:
            self.__dict__.pop(name, None)

    def look(self, images: Tensor) -> Seen:
        """Look at images (B, 3, S, S) in [0, 1]."""
        seen: Seen = self.model(images)
        return seen

    def costs(self, detections: Detections, targets: Targets) -> Tensor:
        """Costs (L, B, R, Q) of the matching."""
        return costs(*detections, targets, self.settings.matching)

    @abstractmethod
    def inner(self, features: Features, boxes: Tensor, *given: Tensor) -> Any:
        """Represent nuclei in true boxes (B, R, 4); `given` comes from `given_beside`."""

    @abstractmethod
    def losses(
        self, seen: Seen, inner: Any, targets: Targets, query: Tensor, divisors: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses, and their weighted sum; only the sum has a gradient, so that a backward graph takes no other.

        `query` (L, B, R) are the matches, see `detection_losses`. `divisors` (2,) are the number of nuclei, and that of
        images with at least two nuclei, of the global batch in training; 1 in validation, where losses are summed.
        """

    @abstractmethod
    def given_beside(self, targets: Targets, batch: Batch) -> tuple[Tensor, ...]:
        """Tensors that `inner` needs beside the true boxes, on the device; empty: there is nothing to represent."""

    @abstractmethod
    def validation_summary(self) -> dict[str, Any]:
        """Summarise a validation for the log; ``score`` chooses the model's epoch and may be None."""

    def training_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of a prepared batch, and their weighted sum.

        Both are this process' part of the losses of the whole batch: the sum over the processes is the loss.

        Raises
        ------
        NonFinite
            A matching cost is NaN or infinite; names the patches.
        """
        with self.naming_patches(batch):
            outputs = self.compute(batch.images, batch.targets, batch)
        return outputs.losses, outputs.total

    def compute(self, images: Tensor, targets: Targets, batch: Batch) -> Outputs:
        """Compute the losses of images (B, 3, S, S) in [0, 1] with their nuclei.

        They were made from the batch; in training they are augmented.
        """
        divisors = torch.ones(2)
        if batch.training:
            divisors = torch.tensor([batch.boxes_global, (batch.counts_global >= 2).sum()]).float().clamp(min=1)
        divisors, given = to_device(divisors, images.device), self.given_beside(targets, batch)
        seen = self.look(images)
        detached = Detections(*(values.detach() for values in seen.detections))
        matching = Matching(self.costs(detached, targets), targets.counts)
        inner = self.inner(seen.features, targets.boxes, *given) if given else None
        losses, total = self.losses(seen, inner, targets, matching.result(), divisors)
        return Outputs(losses, total, seen, inner)

    def start_validation(self) -> None:
        """Forget the last validation."""
        self.sums: dict[str, float] = {}
        self._counts = np.zeros((1 + max(1, len(self.classes)), len(COUNTS)), dtype=np.int64)

    def validate(self, batch: Batch) -> Outputs:
        """Sum the losses of a prepared batch, undivided, and count the nuclei that the model predicts.

        Raises
        ------
        NonFinite
            A loss or matching cost is NaN or infinite; names the patches.
        """
        with self.naming_patches(batch):
            outputs = self.compute(batch.images, batch.targets, batch)
            values = Losses(outputs.losses, outputs.total).values()
        for name, value in (values | {"boxes": float(batch.boxes_global)}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        size = (self.val_data.patch_size,) * 2
        kept = self.model.keep(outputs.seen.detections, size, self.evaluator.settings.nucleus_threshold)
        self._count(batch.targets, self.model.select(outputs.seen, kept))
        return outputs

    def _count(self, targets: Targets, found: list[ImagePredictions]) -> None:
        """Count the nuclei of each image as the test does."""
        size, counts = self.val_data.patch_size, targets.counts.numpy()
        valid = torch.arange(targets.labels.shape[1]) < targets.counts[:, None]
        labels = targets.labels.cpu()[valid].numpy()
        truth = NucleusCentres(
            np.append(0, np.cumsum(counts)),
            (targets.boxes.cpu()[valid][:, :2].double() * size).numpy(),
            labels if self.classes else np.full_like(labels, UNLABELLED),
        )
        image = np.repeat(np.arange(len(found)), [len(nuclei.query) for nuclei in found])
        nucleus_score, class_scores, boxes = (
            torch.cat([getattr(nuclei, name) for nuclei in found]).float().cpu().numpy()
            for name in ("nucleus_score", "class_scores", "boxes")
        )
        keep = self.evaluator.keep(nucleus_score, class_scores)
        corners = boxes[keep].clip(0, size).astype(np.float64)
        predicted = NucleusCentres(
            np.searchsorted(image[keep], np.arange(len(found) + 1)),
            (corners[:, :2] + corners[:, 2:]) / 2,
            class_scores[keep].argmax(axis=1) if self.classes else np.zeros(len(corners), dtype=np.int64),
        )
        self._counts += self.evaluator.count(truth, predicted, len(self._counts) - 1).sum(axis=0)

    def counted_scores(self) -> tuple[dict[str, float | None], NDArray[np.float64]]:
        """P, R, F of detection, and F of each class (K,), over the validation patches of all processes."""
        table = scores(self.group.sum(self._counts).astype(np.int64))
        detection = dict(zip(("precision", "recall", "f1"), map(finite, table[0].tolist()), strict=True))
        return detection, table[1:, 2]

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
