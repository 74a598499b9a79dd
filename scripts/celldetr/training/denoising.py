"""Query denoising: the decoder gets boxes near the true ones as well and learns to move them back (beyond the paper).

No matching is needed for them, so every step tells every layer what to do, from the first one on (DN-DETR, Li et al.,
CVPR 2022). Here their content is that of the other queries, which do not see them.
"""

import numpy as np
import torch
from torch import Tensor

from celldetr import boxes as box_ops
from celldetr.experiment import DenoisingSettings
from celldetr.training.data import DENOISING, Batch, Targets, noise_uniforms
from celldetr.training.matching import Matches


def noised_boxes(targets: Targets, batch: Batch, settings: DenoisingSettings, seed: int) -> Tensor:
    """Boxes near the true ones (B, G, R, 4); the same ones on any number of devices."""
    return box_ops.noise(
        targets.boxes[:, None].expand(-1, settings.groups, -1, -1),
        noise_uniforms(batch, targets, seed, DENOISING, settings.groups),
        low=0.0,
        high=settings.noise,
        enlarge=0.5,
    )


def own_matches(targets: Targets, groups: int, layers: int) -> Matches:
    """Match each noised box, group after group, to the nucleus that it was made from, in all layers."""
    counts, slots = targets.counts.numpy(), targets.labels.shape[1]
    image = np.repeat(np.arange(len(counts)), counts)
    box = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    each = np.indices((layers, groups, len(image))).reshape(3, -1)
    rows = np.stack([each[0], image[each[2]], each[1] * slots + box[each[2]], box[each[2]]])
    return Matches(*torch.from_numpy(rows).to(targets.boxes.device, non_blocking=True))
