"""Self-supervised pretraining: contrastive learning of nuclei and detection, without labels (paper, 3.3)."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from celldetr.training.contrastive import (
    Views,
    contrastive_loss,
    found_own,
    make_views,
    project_views,
    similarities,
    similarity_sums,
    spread,
    training_uniforms,
    validation_uniforms,
)
from celldetr.training.data import Batch, Targets
from celldetr.training.losses import detection_losses
from celldetr.training.stage import Outputs, Stage

COLLAPSED = 0.1
"""Spread of the embeddings below which the log warns."""

log = logging.getLogger(__name__)


class SslStage(Stage):
    """Contrastive pretraining; see `celldetr.training.stage.Stage`.

    In validation every nucleus has one anchor whose noise depends only on the seed and the patch: all epochs see the
    same anchors, and losses and retrieval do not depend on how patches are put into batches (except for the contrastive
    loss with ``negatives: batch``).
    """

    validates_start = True

    def start_validation(self) -> None:
        """Forget the last validation."""
        super().start_validation()
        self._retrieved = np.zeros(4)
        self._moments = np.zeros((2, self.model.settings.projection))
        self._originals = 0

    def compute(self, images: Tensor, targets: Targets, batch: Batch) -> Outputs:
        """Compute the detection losses, and the contrastive loss between the views of each nucleus."""
        views, settings = self.views(targets, batch), self.settings.contrastive
        features = self.model.encode(images)
        detections, matching = self.detect(features, targets)
        projected = project_views(self.model, features, views)
        n_boxes = n_images = 1.0  # in validation losses are summed
        if batch.training:
            n_boxes, n_images = max(1, batch.boxes_global), max(1, int((batch.counts_global >= 2).sum()))
        losses = detection_losses(*detections, targets, matching.result(), n_boxes)
        with torch.autocast(images.device.type, enabled=False):
            loss = contrastive_loss(projected, views, settings.temperature, settings.negatives)
            losses["contrastive"] = loss / n_images
        return Outputs(losses, features, detections, projected)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the detection losses and the contrastive loss."""
        return super().total(losses) + self.settings.contrastive.weight * losses["contrastive"]

    def views(self, targets: Targets, batch: Batch) -> Views:
        """Originals and anchors of the nuclei of a batch."""
        seed = self.settings.seed
        if batch.training:
            uniforms = training_uniforms(batch, seed)
        else:
            uniforms = validation_uniforms(batch.patches.tolist(), targets, seed)
        return make_views(targets, uniforms, self.settings.noise, once=not batch.training)

    def validate(self, batch: Batch) -> Outputs:
        """Count also the anchors that find their original, and sum up the spread of the originals."""
        outputs = super().validate(batch)
        views, projected = self.views(batch.targets, batch), outputs.projected
        assert projected is not None
        with torch.autocast(projected.device.type, enabled=False):
            similarity = similarities(projected, views)
            sums = similarity_sums(similarity, views).tolist()
        own = int(found_own(similarity, views).sum())
        self._retrieved += np.array([own, int(views.compared.sum()), *sums])
        unit = functional.normalize(projected[views.original].double(), dim=-1)
        self._moments += torch.stack([unit.sum(dim=0), unit.square().sum(dim=0)]).cpu().numpy()
        self._originals += len(unit)
        self.sums["images"] = self.sums.get("images", 0.0) + float((batch.targets.counts >= 2).sum())
        return outputs

    def validation_summary(self) -> dict[str, Any]:
        """Losses (detection per nucleus, contrastive per image), retrieval, spread, and P, R, F of detection.

        ``retrieval`` is the fraction of anchors whose most similar original in the image is their own; as ``score`` it
        chooses the epoch. ``own`` and ``others`` are the mean similarities of anchors to their original and to the
        others. All are None without an image of two nuclei. ``spread``: see `celldetr.training.contrastive.spread`.
        """
        names = ("loss", "contrastive", "nucleus", "l1", "giou", "boxes", "images")
        sums = self.group.sum_each({name: self.sums.get(name, 0.0) for name in names})
        boxes, images = max(1.0, sums["boxes"]), max(1.0, sums["images"])
        weighted = self.settings.contrastive.weight * sums["contrastive"]
        found, anchors, *similarity = self.group.sum(self._retrieved).tolist()
        retrieval, own, others = (value / anchors if anchors else None for value in (found, *similarity))
        moments = torch.from_numpy(self.group.sum(self._moments))
        originals = float(self.group.sum(np.array(self._originals)))
        far = spread(originals, *moments) if originals > 1 else None
        if far is not None and far < COLLAPSED and self.group.rank == 0:
            log.warning(
                "the embeddings have a spread of %.3f, below %g: they are nearly identical. If it does not rise, "
                "lower training.lr, or raise training.contrastive.temperature or training.batch_size",
                far,
                COLLAPSED,
            )
        return {
            "loss": (sums["loss"] - weighted) / boxes + weighted / images,
            "contrastive": sums["contrastive"] / images,
            **{name: sums[name] / boxes for name in ("nucleus", "l1", "giou")},
            "retrieval": retrieval,
            "own": own,
            "others": others,
            "spread": far,
            "detection": self.counted_scores()[0],
            "score": retrieval,
        }
