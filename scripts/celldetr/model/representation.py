"""Representation decoder: boxes in, one embedding per nucleus out (paper, 3.2 and eq. 4).

Size and location of a box enter through different projections: the size is the initial content of a query, the location
its position. Every sampling point stays inside its box. The first layer (with ``self_attention: none`` every layer) has
no attention among nuclei.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celldetr.config.experiment import ModelSettings
from celldetr.model.deformable_attention import SamplingPoints
from celldetr.model.device import CheckpointedLayers, ExactLinear, cached_tensor
from celldetr.model.sampling import Shapes
from celldetr.model.transformer import DecoderLayer

FULL_IMAGE = (0.5, 0.5, 1.0, 1.0)


class RepresentationDecoder(CheckpointedLayers):
    """Turn given boxes into embeddings.

    Contrastive pretraining trains without positions in self-attention, so that nuclei cannot be told apart by location,
    and its global token is attended by no nucleus (paper, 3.3): without positions, as without self-attention, global
    tokens cannot reach a nucleus and are left out.
    """

    def __init__(self, settings: ModelSettings, levels: int) -> None:
        super().__init__()
        options, channels = settings.representation, settings.d_model
        attends = [options.self_attention == "after_first" and index > 0 for index in range(options.layers)]
        self.size_project = ExactLinear(2, channels)
        self.location_project = ExactLinear(2, channels)
        reached = any(attends) and options.positions and settings.mode == "parallel"
        self.global_tokens = options.global_tokens if reached else 0
        self.layers = nn.ModuleList(
            DecoderLayer(settings, levels, self_attention=attend, constrained=True) for attend in attends
        )

    def forward(
        self,
        memory: Tensor,
        shapes: Shapes,
        boxes: Tensor,
        valid: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, SamplingPoints]:
        """Represent nuclei: embeddings (B, R, C), zero at padding, and the points that the last layer sampled.

        Parameters
        ----------
        memory, shapes
            Encoded tokens (B, T, C) and the levels.
        boxes
            Boxes (B, R, 4), cxcywh in [0, 1]; R = 0 is legal. No gradient flows into them.
        valid
            False at padding (B, R); None: every box is a nucleus. The values of padding have no influence.
        mask
            Which box (last dimension) a box may attend to, bool (B, R, R); None: every one. Global tokens attend to all
            and are attended by all. Padding is never attended to, and every slot attends to itself.
        """
        count = boxes.shape[1]
        slots, real = self._slots(boxes.detach(), valid)
        allowed = self._allowed(slots, real, mask)
        x, location = self.size_project(slots[..., 2:]), self.location_project(slots[..., :2])
        for layer in self.layers:
            x, points = self.run(layer, x, location, slots, memory, shapes, allowed)
        x = x[:, :count]
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        return x, SamplingPoints(points.locations[:, :count], points.weights[:, :count])

    def _slots(self, boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Boxes and tokens (B, S, 4), and which of them are real (B, S), None = all.

        Without boxes and tokens there is one slot that is not real, so that parameters get (zero) gradients even from
        images without nuclei: devices that share a batch must agree on which parameters have a gradient.
        """
        batch, count = boxes.shape[:2]
        full_image = cached_tensor(FULL_IMAGE, boxes.device, boxes.dtype)
        if valid is not None:
            boxes = torch.where(valid[..., None], boxes, full_image)
        extra = self.global_tokens or (count == 0)
        if not extra:
            return boxes, valid
        tokens = full_image.expand(batch, extra, 4)
        if valid is not None:
            valid = F.pad(valid, (0, extra), value=bool(self.global_tokens))
        return torch.cat((boxes, tokens), dim=1), valid

    def _allowed(self, slots: Tensor, real: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which slot may attend to which, (B or 1, 1, S, S), None = all to all."""
        if mask is None and real is None:
            return None
        batch, count = slots.shape[:2]
        allowed = torch.ones(1, count, count, dtype=torch.bool, device=slots.device)
        if mask is not None:
            missing = count - mask.shape[-1]
            allowed = allowed & F.pad(mask, (0, missing, 0, missing), value=True)
        if real is not None:
            allowed = allowed & real[:, None]
        itself = torch.eye(count, dtype=torch.bool, device=slots.device)
        return (allowed | itself)[:, None]
