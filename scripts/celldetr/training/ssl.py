"""Self-supervised pretraining: contrastive learning of nuclei and detection, without labels (paper, 3.3)."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from celldetr.model.celldetr import Features, Seen
from celldetr.training.contrastive import (
    ViewDraws,
    Views,
    contrastive_loss,
    found_own,
    make_views,
    project_views,
    similarities,
    similarity_sums,
    spread,
    training_draws,
    validation_draws,
)
from celldetr.training.data import Batch, Targets
from celldetr.training.detection import DetectionStage, Outputs
from celldetr.training.losses import detection_losses, weighted

COLLAPSED = 0.1
"""Spread of the embeddings below which the log warns."""

log = logging.getLogger(__name__)


class SslStage(DetectionStage):
    """Contrastive pretraining; see `celldetr.training.detection.DetectionStage`.

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

    def given_beside(self, targets: Targets, batch: Batch) -> tuple[Tensor, ...]:
        """Draw the views: the tensors of `ViewDraws`."""
        if batch.training:
            draws = training_draws(batch, self.settings.seed)
        else:
            draws = validation_draws(batch.patches.tolist(), targets, self.settings.seed)
        return draws.to(targets.boxes.device)

    def inner(self, features: Features, boxes: Tensor, *given: Tensor) -> tuple[Tensor, Views]:
        """Projected embeddings (B, S, P) of the originals and anchors of the nuclei, and these views."""
        views = make_views(boxes, ViewDraws(*given), self.settings.noise)
        return project_views(self.model, features, views), views

    def losses(
        self, seen: Seen, inner: Any, targets: Targets, query: Tensor, divisors: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the detection losses, the contrastive loss of the views, and their weighted sum."""
        losses = detection_losses(*seen.detections, targets, query, divisors[0])
        settings = self.settings.contrastive
        projected, views = inner
        with torch.autocast(query.device.type, enabled=False):
            loss = contrastive_loss(projected, views, settings.temperature, settings.negatives)
        losses["contrastive"] = loss / divisors[1]
        total = weighted(losses, self.settings.losses) + settings.weight * losses["contrastive"]
        return {name: value.detach() for name, value in losses.items()}, total

    def validate(self, batch: Batch) -> Outputs:
        """Count also the anchors that find their original, and sum up the spread of the originals."""
        outputs = super().validate(batch)
        projected, views = outputs.inner
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
