"""What the stages of CellDETR share: from a batch to its losses, and the counts of validation."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import Experiment, ModelSettings
from celldetr.model.celldetr import CellDETR, Detections, Features, Seen
from celldetr.model.compiled import compiled
from celldetr.model.device import to_device
from celldetr.training.data import Batch, PatchData, Targets
from celldetr.training.initial import build_model
from celldetr.training.matching import Matching, costs
from celldetr.training.processes import Group
from celldetr.training.stage import Losses, Stage

TRAINED_PARTS = {"head": ("class_head",), "representation": ("representation", "class_head")}
"""Parts of the model that train with the setting ``training.probe``; all others are frozen."""


class Outputs(NamedTuple):
    """What a stage computes of a batch."""

    losses: dict[str, Tensor]
    """Losses without weights; those of detection for each decoder layer."""
    total: Tensor
    """Their weighted sum, ()."""
    seen: Seen
    inner: Any
    """What `Stage.inner` returned."""


class DetectionStage(Stage):
    """Losses and validation of one stage of CellDETR.

    Parts of the model that ``training.probe`` freezes lose their gradients here.

    What a step computes lies in four functions of tensors whose shapes depend on no value, `REGIONS`: nothing in them
    waits for the device, and each can be compiled as one graph. Between `costs` and `losses` nuclei are matched on the
    CPU, while the device is busy with `inner`.
    """

    REGIONS = ("look", "costs", "inner", "losses")
    compilable = True
    encoder = "backbone"
    model: CellDETR

    def __init__(
        self,
        experiment: Experiment,
        model: CellDETR,
        train: PatchData,
        val: PatchData,
        scoring: ScoringSettings,
        group: Group | None = None,
    ) -> None:
        self.mode = experiment.model.mode
        super().__init__(experiment, model, train, val, scoring, group)
        self._frozen = self._freeze()

    @classmethod
    def build_model(
        cls, experiment: Experiment, train: PatchData, backbone: Path | None, initial: Path | None, device: str
    ) -> CellDETR:
        """Build the model of a run on its device; see `celldetr.training.initial.build_model`."""
        return build_model(experiment, backbone, initial, device)

    @property
    def model_settings(self) -> ModelSettings:
        """What the model file is built from."""
        return self.model.settings

    def _freeze(self) -> list[nn.Module]:
        """Freeze what ``training.probe`` does not train; autograd then keeps no graph for it."""
        if self.settings.probe == "none":
            return []
        trained = TRAINED_PARTS[self.settings.probe]
        self.model.requires_grad_(False)
        for name in trained:
            self.model.get_submodule(name).requires_grad_(True)
        return [part for name, part in self.model.named_children() if name not in trained]

    def train(self, epoch: int = 0) -> None:
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
        found = self.model.select(outputs.seen, kept)
        self.count(
            batch,
            np.repeat(np.arange(len(found)), [len(nuclei.query) for nuclei in found]),
            *(
                torch.cat([getattr(nuclei, name) for nuclei in found]).float().cpu().numpy()
                for name in ("boxes", "nucleus_score", "class_scores")
            ),
        )
        return outputs
