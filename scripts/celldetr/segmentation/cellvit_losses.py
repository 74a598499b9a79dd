"""Losses of CellViT (Hoerst et al. 2024), with the weights of its published runs on PanNuke.

They are those of `logs_paper/PanNuke/CellViTHV` in the repository TIO-IKIM/CellViT.
"""

import torch
from monai.losses import DiceLoss, TverskyLoss
from torch import Tensor
from torch.nn import functional as F

from celldetr.segmentation.cellvit_network import Maps
from celldetr.segmentation.hover import gradient_loss, hover_maps
from celldetr.segmentation.system import Truth

_DICE = DiceLoss(batch=True, reduction="sum", smooth_nr=1e-3, smooth_dr=1e-3)
"""Over all pixels of the batch, one term per channel, the background among them."""
_TVERSKY = TverskyLoss(alpha=0.3, beta=0.7, batch=True, reduction="none", smooth_nr=1e-6, smooth_dr=1e-6)
"""False positives count 0.3, missed pixels 0.7."""


def cellvit_losses(maps: Maps, truth: Truth) -> dict[str, Tensor]:
    """Weighted losses of each map, and of the tissue if it is known of an image."""
    with torch.autocast(truth.instances.device.type, enabled=False):  # sums over all pixels need float32
        nuclei, hover, classes, tissues = (logits.float() for logits in maps)
        inside = truth.instances > 0
        target = hover_maps(truth.instances)
        nucleus, nucleus_target = nuclei.softmax(1), _one_hot(inside.long(), 2)
        kind, kind_target = classes.softmax(1), _one_hot(truth.classes, classes.shape[1])
        both = (values.reshape(1, 1, -1) for values in (nucleus.softmax(1), nucleus_target))
        known = (truth.tissues >= 0).sum().clamp(min=1)
        entropy = F.cross_entropy(tissues, truth.tissues, ignore_index=-1, reduction="sum")
        return {
            "nucleus_tversky": _focal(_TVERSKY(*both)),
            "nucleus_dice": _DICE(nucleus, nucleus_target),
            "hover": 2.5 * F.mse_loss(hover, target),
            "hover_gradient": 8 * gradient_loss(hover, target, inside),
            "class_entropy": 0.5 * F.cross_entropy(classes, truth.classes),
            "class_dice": 0.2 * _DICE(kind, kind_target),
            "class_tversky": 0.5 * _focal(_TVERSKY(kind.softmax(1), kind_target)),
            "tissue": 0.1 * entropy / known,
        }


def _focal(tversky: Tensor) -> Tensor:
    """Sum of (1 - Tversky index)^(4/3) (Abraham and Khan 2019) over channels (C,).

    The published runs give it a softmax of the softmax; those of nuclei and background as one channel, so that it is
    the mean error of all pixels. Kept as it is, since the published figures come from it.
    """
    return tversky.pow(4 / 3).sum()


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """(B, S, S) int64 -> (B, count, S, S) float32."""
    return F.one_hot(classes, count).movedim(-1, 1).float()
