"""Contrastive pretraining: two views of each nucleus, who sees whom, and the loss (paper, 3.3 and A.2).

The original boxes of an image are its global views. Its anchors, the same boxes with noise, are local views that must
find their original among all originals.
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
from celldetr.model.device import cached_tensor
from celldetr.model.representation import FULL_IMAGE
from celldetr.training.data import NOISE, VALIDATION, Batch, Targets, random_stream


class Views(NamedTuple):
    """The boxes that the representation decoder gets, in S slots: n originals, anchors, padding.

    Attributes
    ----------
    boxes
        (B, S, 4), cxcywh in [0, 1]; the whole image at padding.
    nucleus
        Slot of the original of each slot (B, S); 0 at padding.
    valid
        False at padding (B, S).
    anchor
        True at anchors (B, S).
    counts
        Nuclei n of each image (B,).
    """

    boxes: Tensor
    nucleus: Tensor
    valid: Tensor
    anchor: Tensor
    counts: Tensor

    @property
    def original(self) -> Tensor:
        """True at originals (B, S); they fill the first slots."""
        return self.valid & ~self.anchor

    @property
    def compared(self) -> Tensor:
        """True at anchors with more than one original to choose from (B, S)."""
        return self.anchor & (self.counts[:, None] >= 2)

    def mask(self, tokens: int) -> Tensor:
        """Who may attend to whom, bool (B, S + tokens, S + tokens).

        Everything attends to the originals and to itself: no anchor is seen by another slot, nor is a global token.
        """
        seen = functional.pad(self.original, (0, tokens))
        itself = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
        return seen[:, None] | itself


def training_uniforms(batch: Batch, seed: int) -> Tensor:
    """Random numbers (B, S, 9) for the slots of a step's images: a share of those of the global batch.

    S is twice the largest number of nuclei in the global batch, so that all images are filled with anchors.
    """
    slots = 2 * max(1, int(batch.counts_global.max(initial=0)))
    random = random_stream(seed, batch.step, NOISE)
    uniforms = random.random((len(batch.counts_global), slots, box_ops.NOISE_DRAWS), dtype=np.float32)
    return torch.from_numpy(uniforms[batch.rows])


def validation_uniforms(patches: Sequence[int], targets: Targets, seed: int) -> Tensor:
    """Random numbers (B, S, 9) that depend on the seed and the patch alone, for one anchor of each nucleus."""
    slots = targets.labels.shape[1]
    uniforms = np.zeros((len(patches), 2 * slots, box_ops.NOISE_DRAWS), dtype=np.float32)
    for row, (patch, count) in enumerate(zip(patches, targets.counts.tolist(), strict=True)):
        random = random_stream(seed, int(patch), VALIDATION)
        uniforms[row, count : 2 * count] = random.random((count, box_ops.NOISE_DRAWS), dtype=np.float32)
    return torch.from_numpy(uniforms)


def make_views(targets: Targets, uniforms: Tensor, noise: NoiseSettings, *, once: bool) -> Views:
    """Lay out the views of B images in the S slots that `uniforms` has numbers for.

    Parameters
    ----------
    targets
        Nuclei.
    uniforms
        Random numbers (B, S, 9) of the noise; S is at least twice the largest number of nuclei.
    noise
        Range of the noise; every anchor gets it.
    once
        One anchor for each nucleus, and padding; else the nuclei take turns until all slots are filled.
    """
    device, slots = targets.boxes.device, uniforms.shape[1]
    counts = targets.counts.to(device, non_blocking=True)
    slot, n = torch.arange(slots, device=device), counts[:, None]
    valid = (n > 0) & (slot < (2 * n if once else slots))
    nucleus = torch.where(valid, slot % n.clamp(min=1), 0)
    anchor = valid & (slot >= n)
    boxes = targets.boxes.gather(1, nucleus[..., None].expand(-1, -1, 4))
    moved = box_ops.noise(
        boxes, uniforms.to(device, non_blocking=True), low=noise.low, high=noise.high, enlarge=noise.enlarge
    )
    boxes = torch.where(anchor[..., None], moved, boxes)
    whole = cached_tensor(FULL_IMAGE, device, boxes.dtype)
    return Views(torch.where(valid[..., None], boxes, whole), nucleus, valid, anchor, counts)


def project_views(model: CellDETR, features: Features, views: Views) -> Tensor:
    """Projected embeddings (B, S, P) of the views; self-attention among them knows no locations."""
    mask = views.mask(model.representation.global_tokens)
    return model.project(model.represent(features, views.boxes, views.valid, mask=mask, positions=False))


def similarities(projected: Tensor, views: Views) -> Tensor:
    """Cosine similarity (B, S, R) of every slot to the R slots of originals of its image; -2 where none is."""
    unit = functional.normalize(projected.float(), dim=-1)
    largest = projected.shape[1] // 2
    return (unit @ unit[:, :largest].mT).masked_fill(~views.original[:, None, :largest], -2.0)


def contrastive_loss(projected: Tensor, views: Views, temperature: float, negatives: str) -> Tensor:
    """Negative log-probability of an anchor's own original, mean over the anchors of an image, summed over images.

    Computed in float32; call it with autocast off. An image with fewer than two nuclei contributes nothing.

    Parameters
    ----------
    projected
        Projected embeddings (B, S, P).
    views
        Their views.
    temperature
        Divides the similarities.
    negatives
        ``image``: the originals of the anchor's own image; ``batch``: those of all B images.
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
    """Whether the most similar original of an anchor is its own (B, S); False at other slots and single nuclei."""
    return (similarity.argmax(dim=-1) == views.nucleus) & views.compared


def similarity_sums(similarity: Tensor, views: Views) -> Tensor:
    """Sum over the compared anchors the similarity to the own original, and the mean one to the others: (2,)."""
    own = similarity.gather(-1, views.nucleus[..., None]).squeeze(-1)
    real = views.original[:, None, : similarity.shape[-1]]
    others = (similarity.masked_fill(~real, 0).sum(dim=-1) - own) / (views.counts[:, None] - 1).clamp(min=1)
    return torch.stack([torch.where(views.compared, values, 0).double().sum() for values in (own, others)])


def spread(count: float, total: Tensor, squares: Tensor) -> float:
    """How far unit vectors are spread: the standard deviation of a coordinate, relative to that of random directions.

    1 for vectors in all directions alike, 0 where all are the same: a collapsed representation.

    Parameters
    ----------
    count
        Number of vectors.
    total, squares
        Sums of their coordinates (P,), and of the squares of these (P,).
    """
    mean = total / count
    deviation = (squares / count - mean**2).clamp(min=0).sqrt()
    return float(deviation.mean()) * len(total) ** 0.5
