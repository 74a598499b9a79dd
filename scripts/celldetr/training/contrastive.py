"""Contrastive pretraining: two views of each nucleus, the attention mask, and the loss (paper, 3.3 and A.2).

The original boxes of an image are its global views. Its anchors, the same boxes with noise, are local views, each of
which must find its original among all originals of the image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from celldetr.config.experiment import NoiseSettings
from celldetr.model import boxes as box_ops
from celldetr.model.celldetr import CellDETR, Features
from celldetr.model.device import cached_tensor, padded_size, to_device
from celldetr.model.representation import FULL_IMAGE
from celldetr.training.data import NOISE, VALIDATION, Batch, Targets, random_stream


class ViewDraws(NamedTuple):
    """How the slots of B images are filled with views."""

    counts: Tensor  # nuclei of each image (B,)
    filled: Tensor  # slots of each image that hold a view (B,)
    uniforms: Tensor  # random numbers (B, S, 9) for the noise of anchors; S is at least twice the largest count

    def to(self, device: torch.device | str) -> "ViewDraws":
        """Move them to a device."""
        return ViewDraws(*(to_device(values, device) for values in self))


class Views(NamedTuple):
    """Boxes for the representation decoder, in S slots: n originals, anchors, padding."""

    boxes: Tensor  # (B, S, 4), cxcywh in [0, 1]; the whole image at padding
    nucleus: Tensor  # slot of each view's original (B, S); 0 at padding
    valid: Tensor  # False at padding (B, S)
    anchor: Tensor  # True at anchors (B, S)
    counts: Tensor  # nuclei n of each image (B,)

    @property
    def original(self) -> Tensor:
        """True at originals (B, S); they fill the first slots."""
        return self.valid & ~self.anchor

    @property
    def compared(self) -> Tensor:
        """True at anchors in images with at least two originals (B, S)."""
        return self.anchor & (self.counts[:, None] >= 2)

    @property
    def mask(self) -> Tensor:
        """Self-attention mask (B, S, S) bool, row attends to column: every slot to the originals, and to itself."""
        seen = self.original[:, None]
        return seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)


def training_draws(batch: Batch, seed: int) -> ViewDraws:
    """Draw for a step's images, as for the global batch.

    Views fill twice as many slots of an image as the largest number of nuclei in the global batch; the rest is padding.
    """
    filled = 2 * max(1, int(batch.counts_global.max(initial=0)))
    shape = (len(batch.counts_global), filled, box_ops.NOISE_DRAWS)
    drawn = random_stream(seed, batch.step, NOISE).random(shape, dtype=np.float32)[batch.rows]
    uniforms = np.zeros((len(drawn), 2 * padded_size(filled // 2), box_ops.NOISE_DRAWS), dtype=np.float32)
    uniforms[:, :filled] = drawn
    return ViewDraws(batch.targets.counts, torch.full((len(drawn),), filled), torch.from_numpy(uniforms))


def validation_draws(patches: Sequence[int], targets: Targets, seed: int) -> ViewDraws:
    """Draw one anchor per nucleus; the numbers depend only on the seed and the patch."""
    slots = targets.labels.shape[1]
    uniforms = np.zeros((len(patches), 2 * slots, box_ops.NOISE_DRAWS), dtype=np.float32)
    for row, (patch, count) in enumerate(zip(patches, targets.counts.tolist(), strict=True)):
        random = random_stream(seed, int(patch), VALIDATION)
        uniforms[row, count : 2 * count] = random.random((count, box_ops.NOISE_DRAWS), dtype=np.float32)
    return ViewDraws(targets.counts, 2 * targets.counts, torch.from_numpy(uniforms))


def make_views(boxes: Tensor, draws: ViewDraws, noise: NoiseSettings) -> Views:
    """Lay out the views of the nuclei in true boxes (B, R, 4) in S slots.

    The originals of an image come first, then anchors of all of them in turn, each with noise, then padding.
    """
    counts, filled, uniforms = draws
    n, slot = counts[:, None], torch.arange(uniforms.shape[1], device=boxes.device)
    valid = (n > 0) & (slot < filled[:, None])
    nucleus = torch.where(valid, slot % n.clamp(min=1), 0)
    anchor = valid & (slot >= n)
    views = boxes.gather(1, nucleus[..., None].expand(-1, -1, 4))
    moved = box_ops.noise(views, uniforms, low=noise.low, high=noise.high, enlarge=noise.enlarge)
    views = torch.where(anchor[..., None], moved, views)
    whole = cached_tensor(FULL_IMAGE, views.device, views.dtype)
    return Views(torch.where(valid[..., None], views, whole), nucleus, valid, anchor, counts)


def project_views(model: CellDETR, features: Features, views: Views) -> Tensor:
    """Projected embeddings (B, S, P) of the views."""
    return model.project(model.represent(features, views.boxes, views.valid, views.mask))


def similarities(projected: Tensor, views: Views) -> Tensor:
    """Cosine similarity (B, S, R) of every slot to the R slots of originals of its image; -2 at other slots."""
    unit = functional.normalize(projected.float(), dim=-1)
    largest = projected.shape[1] // 2
    return (unit @ unit[:, :largest].mT).masked_fill(~views.original[:, None, :largest], -2.0)


def contrastive_loss(projected: Tensor, views: Views, temperature: float, negatives: str) -> Tensor:
    """Negative log-probability of an anchor's own original, mean over the anchors of an image, summed over images.

    Computed in float32 from the projected embeddings (B, S, P) of the views; call it with autocast off. An image with
    fewer than two nuclei contributes nothing. The negatives are the originals of the anchor's own ``image``, or of the
    whole ``batch``.
    """
    unit = functional.normalize(projected.float(), dim=-1)
    largest = projected.shape[1] // 2
    originals, real = unit[:, :largest], views.original[:, :largest]
    target = views.nucleus
    if negatives == "batch":
        originals, real = originals.flatten(0, 1), real.flatten()
        target = target + largest * torch.arange(len(unit), device=unit.device)[:, None]
    logits = (unit @ originals.mT / temperature).masked_fill(~real.unsqueeze(-2), torch.finfo(torch.float32).min)
    chosen = logits.log_softmax(dim=-1).gather(-1, target[..., None]).squeeze(-1)
    compared = views.compared
    by_image = torch.where(compared, -chosen, 0).sum(dim=1) / compared.sum(dim=1).clamp(min=1)
    return by_image.sum()


def found_own(similarity: Tensor, views: Views) -> Tensor:
    """Return (B, S) bool: anchors whose most similar original is their own; False at single nuclei."""
    return (similarity.argmax(dim=-1) == views.nucleus) & views.compared


def similarity_sums(similarity: Tensor, views: Views) -> Tensor:
    """Sum over the compared anchors the similarity to their original, and the mean one to the others: (2,)."""
    own = similarity.gather(-1, views.nucleus[..., None]).squeeze(-1)
    real = views.original[:, None, : similarity.shape[-1]]
    others = (similarity.masked_fill(~real, 0).sum(dim=-1) - own) / (views.counts[:, None] - 1).clamp(min=1)
    return torch.stack([torch.where(views.compared, values, 0).double().sum() for values in (own, others)])


def spread(count: float, total: Tensor, squares: Tensor) -> float:
    """Spread of unit vectors: mean standard deviation of a coordinate, relative to that of random directions.

    1 for vectors in uniformly random directions, 0 if all are the same (a collapsed representation). Given are the
    number of vectors, and the sums of their coordinates (P,) and of the squares of these (P,).
    """
    mean = total / count
    deviation = (squares / count - mean**2).clamp(min=0).sqrt()
    return float(deviation.mean()) * len(total) ** 0.5
