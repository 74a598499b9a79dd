"""Supervised training of any mode, on PanNuke or on cell types of Xenium (paper, 3.1, 3.2, 4.4 and A.1)."""

import functools
from typing import Any

from torch import Tensor

from celldetr.model import boxes as box_ops
from celldetr.model.celldetr import Features, Seen
from celldetr.model.device import cached_tensor
from celldetr.training.data import UNLABELLED, Batch, Targets, noise_uniforms
from celldetr.training.detection import DetectionStage
from celldetr.training.losses import class_loss, class_weights, detection_losses, weighted

LOSSES = {
    "baseline": ("loss", "nucleus", "l1", "giou"),
    "sequential": ("loss", "nucleus", "l1", "giou", "classes"),
    "parallel": ("loss", "nucleus", "l1", "giou", "classes"),
}
"""Losses that are logged in each mode: the weighted sum of all layers, and the last layer's parts without weights."""


class SupervisedStage(DetectionStage):
    """Training on nuclei with classes; see `celldetr.training.detection.DetectionStage`."""

    def given_beside(self, targets: Targets, batch: Batch) -> tuple[Tensor, ...]:
        """Which slots hold a nucleus (B, R), and in training with noise its random numbers (B, R, 9)."""
        if self.mode != "parallel":
            return ()
        if batch.training and self.settings.noise.share:
            return targets.valid, noise_uniforms(batch, targets, self.settings.seed)
        return (targets.valid,)

    def inner(self, features: Features, boxes: Tensor, *given: Tensor) -> Tensor:
        """Class logits (B, R, K) of nuclei in true boxes, with noise in training (paper, A.2); mode ``parallel``."""
        valid, *uniforms = given
        if uniforms:
            noise = self.settings.noise
            boxes = box_ops.noise(
                boxes, *uniforms, low=noise.low, high=noise.high, enlarge=noise.enlarge, share=noise.share
            )
        return self.model.classify(self.model.represent(features, boxes, valid))

    def losses(
        self, seen: Seen, inner: Any, targets: Targets, query: Tensor, divisors: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the detection losses and the class loss, and their weighted sum.

        The class head got the embeddings of the queries' boxes (mode ``sequential``), of which the matched ones count,
        or of the true boxes (mode ``parallel``).
        """
        losses = detection_losses(*seen.detections, targets, query, divisors[0])
        logits, labels = inner, targets.labels
        if seen.class_logits is not None:
            chosen = query[-1].clamp(min=0)[..., None].expand(-1, -1, seen.class_logits.shape[-1])
            logits, labels = seen.class_logits.gather(1, chosen), labels.where(query[-1] >= 0, UNLABELLED)
        if logits is not None:
            weights = cached_tensor(self._weights, labels.device)
            losses["classes"] = class_loss(logits, labels, divisors[0], weights)
        total = weighted(losses, self.settings.losses)
        return {name: value.detach() for name, value in losses.items()}, total

    @functools.cached_property
    def _weights(self) -> tuple[float, ...]:
        """Weights of the classes by their frequency among the training nuclei."""
        return class_weights(self.train_data.labels, len(self.classes), self.settings.losses.class_balance)

    def validation_summary(self) -> dict[str, Any]:
        """Losses per nucleus, and the scores of `validation_scores`, over all validation patches."""
        sums = self.group.sum_each({name: self.sums.get(name, 0.0) for name in (*LOSSES[self.mode], "boxes")})
        boxes = max(1.0, sums.pop("boxes"))
        return {**{name: value / boxes for name, value in sums.items()}, **self.validation_scores()}
