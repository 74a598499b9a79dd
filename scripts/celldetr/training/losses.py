"""Losses of supervised training (paper, 3.1, 3.2 and A.1).

All are computed in float32 and divided by the number of nuclei in the global batch, at least 1.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from celldetr.config.experiment import LossSettings
from celldetr.model.boxes import cxcywh_to_xyxy, giou
from celldetr.training.data import Targets
from celldetr.training.matching import FOCAL_ALPHA, FOCAL_GAMMA


def focal(logits: Tensor, positive: Tensor) -> Tensor:
    """Sigmoid focal loss (...) of logits (...) for targets (...) that are 1 or 0, without reduction."""
    logits = logits.float()
    probability = logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    missed = (probability - positive).abs()
    alpha = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * positive
    return alpha * missed**FOCAL_GAMMA * entropy


def detection_losses(
    logits: Tensor, boxes: Tensor, targets: Targets, query: Tensor, n_boxes: Tensor | float
) -> dict[str, Tensor]:
    """Losses of the detection decoder, layer by layer, divided by `n_boxes`.

    Parameters
    ----------
    logits
        (L, B, Q, C); C = 1 is the nucleus logit, else one logit per class. With classes, a query that is matched to an
        unlabelled nucleus is left out of the focal loss. So is one without a match in an image that is not complete.
    boxes
        (L, B, Q, 4), cxcywh in [0, 1].
    query
        (L, B, R) int64, the query of each nucleus; -1 without one and at padding.

    Returns
    -------
    dict
        ``nucleus`` (focal loss summed over queries), ``l1`` and ``giou`` (of matched queries), each (L,), unweighted.
    """
    matched = query >= 0
    slot, queries, classes = query.clamp(min=0)[..., None], logits.shape[2], logits.shape[3]
    spare = torch.where(matched, query, queries)[..., None]  # a query more than there are takes what has no match
    label = targets.labels.expand_as(query)[..., None]
    alike = torch.ones_like(label) if classes == 1 else label == torch.arange(classes, device=label.device)
    positive = logits.new_zeros((*logits.shape[:2], queries + 1, classes), dtype=torch.float32)
    positive = positive.scatter(2, spare.expand_as(alike), alike.float())[:, :, :queries]
    found_more = (positive.amax(dim=-1) == 0) & ~targets.complete[:, None]
    by_query = focal(logits, positive).sum(dim=-1).masked_fill(found_more, 0)
    if classes > 1:
        ignored = torch.zeros_like(by_query[:, :, :1], dtype=torch.bool).expand(-1, -1, queries + 1)
        by_query = by_query.masked_fill(ignored.scatter(2, spare[..., 0], label[..., 0] < 0)[:, :, :queries], 0)

    predicted = boxes.gather(2, slot.expand(*slot.shape[:-1], 4)).float()
    l1 = (predicted - targets.boxes).abs().sum(dim=-1)
    apart = 1 - giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(targets.boxes))
    return {
        "nucleus": by_query.sum(dim=(1, 2)) / n_boxes,
        "l1": torch.where(matched, l1, 0).sum(dim=(1, 2)) / n_boxes,
        "giou": torch.where(matched, apart, 0).sum(dim=(1, 2)) / n_boxes,
    }


def class_weights(labels: NDArray[np.int8], classes: int, exponent: float) -> tuple[float, ...]:
    """Weights (K,) of the classes in the class loss: inverse frequency to a power, with mean 1 over the nuclei.

    Exponent 0: all nuclei weigh the same; 1: all classes have the same sum. A class without nuclei weighs 1.

    Not in the paper: class-balanced loss (Cui et al., CVPR 2019); a common exponent is 0.5 (Mahajan et al., ECCV 2018).
    """
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    if not exponent or not counts.sum():
        return (1.0,) * classes
    weights = np.where(counts > 0, np.maximum(counts, 1) ** -exponent, 0.0)
    weights = weights * counts.sum() / (weights * counts).sum()
    return tuple(np.where(counts > 0, weights, 1.0).tolist())


def class_loss(logits: Tensor, labels: Tensor, n_boxes: Tensor | float, weights: Tensor | None = None) -> Tensor:
    """Focal loss of class logits (..., K), divided by `n_boxes`: mean over classes, summed over nuclei with a label.

    `labels` (...) are -1 where there is no label or no nucleus. `weights` (K,) are those of the classes; None: 1.
    """
    positive = (labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)).float()
    by_nucleus = focal(logits, positive).mean(dim=-1)
    if weights is not None:
        by_nucleus = by_nucleus * weights[labels.clamp(min=0)]
    return torch.where(labels >= 0, by_nucleus, 0).sum() / n_boxes


def weighted(losses: Mapping[str, Tensor], weights: LossSettings) -> Tensor:
    """Sum of the losses of `detection_losses`, and of ``classes`` where there is one, with their weights."""
    nucleus, l1, apart = (losses[part] for part in ("nucleus", "l1", "giou"))
    total = (weights.nucleus * nucleus + weights.l1 * l1 + weights.giou * apart).sum()
    if "classes" in losses:
        total = total + weights.classes * losses["classes"]
    return total
