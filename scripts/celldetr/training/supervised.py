"""Supervised training of any mode, on PanNuke or on cell types of Xenium (paper, 3.1, 3.2, 4.4 and A.1)."""

import functools
import math
from typing import Any

import numpy as np
from torch import Tensor

from celldetr.model import boxes as box_ops
from celldetr.model.device import cached_tensor
from celldetr.training.data import Batch, Targets, noise_uniforms
from celldetr.training.losses import class_loss, class_weights, detection_losses
from celldetr.training.matching import Matches
from celldetr.training.stage import Outputs, Stage, finite

LOSSES = {
    "baseline": ("loss", "nucleus", "l1", "giou"),
    "sequential": ("loss", "nucleus", "l1", "giou", "classes"),
    "parallel": ("loss", "nucleus", "l1", "giou", "classes"),
}
"""Losses that are logged in each mode: the weighted sum of all layers, and the last layer's parts without weights."""


class SupervisedStage(Stage):
    """Training on nuclei with classes; see `celldetr.training.stage.Stage`."""

    def compute(self, images: Tensor, targets: Targets, batch: Batch) -> Outputs:
        """Compute the detection losses and the class loss.

        The class head gets the embeddings of the matched queries' boxes (mode ``sequential``) or of the true boxes,
        with noise in training (mode ``parallel``).
        """
        n_boxes = max(1.0, batch.boxes_global) if batch.training else 1.0  # in validation losses are summed
        features = self.model.encode(images)
        detections, matching = self.detect(features, targets)
        embeddings = None
        if self.mode == "sequential":
            embeddings = self.model.represent(features, detections.boxes[-1].detach())
        elif self.mode == "parallel":
            given = self._noised(targets, batch) if batch.training else targets.boxes
            class_logits = self.model.classify(self.model.represent(features, given, targets.valid))
            labels = targets.labels
        matches = matching.result()
        losses = detection_losses(*detections, targets, matches, n_boxes)
        if embeddings is not None:
            pairs = int(targets.counts.clamp(max=detections.boxes.shape[2]).sum())  # of a layer; the last ones are last
            last = Matches(*(column[len(column) - pairs :] for column in matches))
            class_logits = self.model.classify(embeddings[last.image, last.query])
            labels = targets.labels[last.image, last.box]
        if self.mode != "baseline":
            weights = cached_tensor(self._weights, images.device)
            losses["classes"] = class_loss(class_logits, labels, n_boxes, weights)
        return Outputs(losses, features, detections)

    @functools.cached_property
    def _weights(self) -> tuple[float, ...]:
        """Weights of the classes by their frequency among the training nuclei."""
        return class_weights(self.train_data.labels, len(self.classes), self.settings.losses.class_balance)

    def _noised(self, targets: Targets, batch: Batch) -> Tensor:
        """Boxes for the representation decoder (paper, A.2)."""
        noise = self.settings.noise
        if not noise.share:
            return targets.boxes
        return box_ops.noise(targets.boxes, noise_uniforms(batch, targets, self.settings.seed), **noise.model_dump())

    def validation_summary(self) -> dict[str, Any]:
        """Losses per nucleus, P, R, F of detection, and F of the classes, over all validation patches.

        ``score``, the mean of the detection F and the mean class F, chooses the epoch; it is None without true nuclei.
        """
        sums = self.group.sum_each({name: self.sums.get(name, 0.0) for name in (*LOSSES[self.mode], "boxes")})
        boxes = max(1.0, sums.pop("boxes"))
        detection, by_class = self.counted_scores()
        mean = float(np.nanmean(by_class)) if np.isfinite(by_class).any() else math.nan
        found = detection["f1"] if detection["f1"] is not None else math.nan
        return {
            **{name: value / boxes for name, value in sums.items()},
            "detection": detection,
            "f1": {name: finite(float(value)) for name, value in zip(self.classes, by_class, strict=True)},
            "class_f1": finite(mean),
            "score": finite((found + mean) / 2 if math.isfinite(mean) else found),
        }
