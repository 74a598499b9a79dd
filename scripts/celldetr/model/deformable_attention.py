"""Multi-scale deformable attention with point, box and box-constrained references (paper, eqs. 1 to 4)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from celldetr.config.experiment import Kernel, ModelSettings
from celldetr.model.compiled import Compile
from celldetr.model.device import ExactLinear, cached_tensor, full_precision
from celldetr.model.sampling import Shapes, choose_sampler


class SamplingPoints(NamedTuple):
    """Sampling points of each query and their attention weights."""

    locations: Tensor
    """(B, Q, H, L, P, 2), x then y in [0, 1] of the patch."""
    weights: Tensor
    """(B, Q, H, L, P); the sum over L and P is 1."""


class DeformableAttention(nn.Module):
    """Cross-attention of queries to a few sampled points of feature maps.

    Parameters
    ----------
    settings
        Channels C, heads H, points P per head and level, and the kernel: the form of the sampling, see
        `celldetr.model.sampling.choose_sampler`. With ``auto`` it is that of the CPU until `use_sampling` is called.
    levels
        Feature levels L.
    constrained
        Keep every point inside the query's box (eq. 4). Otherwise a box reference only scales the offsets (eq. 3).
        Initial distances of constrained points are those of ``representation.offset_init``: ``authors`` 1 to P (through
        tanh nearly all on the border of the box), ``spread`` 1/(2P), 3/(2P), ... of the half box.
    """

    def __init__(self, settings: ModelSettings, levels: int, *, constrained: bool = False) -> None:
        super().__init__()
        d_model, heads, points = settings.d_model, settings.heads, settings.points
        self.heads, self.levels, self.points = heads, levels, points
        self.constrained = constrained
        self.kernel: Kernel = settings.kernel
        self.sample = choose_sampler("cpu", kernel=self.kernel, compiled=False).function
        self.sampling_offsets = ExactLinear(d_model, heads * levels * points * 2)
        self.attention_weights = ExactLinear(d_model, heads * levels * points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._initialise(spread=constrained and settings.representation.offset_init == "spread")

    def _initialise(self, *, spread: bool) -> None:
        """Head m starts along the angle 2 pi m / H; attention starts uniform."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        distance = direction[:, None] * steps[None, :, None]  # (H, P, 2)
        if spread:
            distance = torch.atanh(direction[:, None] * ((2 * steps - 1) / (2 * self.points))[None, :, None])
        bias = distance[:, None].expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes
    ) -> tuple[Tensor, SamplingPoints]:
        """Attend with queries (B, Q, C) to tokens (B, T, C) of levels with the given heights and widths.

        The reference is a point (B, Q, 2) x, y or a box (B, Q, 4) cxcywh, in [0, 1]; constrained attention takes boxes.
        Returns (B, Q, C), and the points that were sampled.
        """
        batch, queries, channels = query.shape
        grid = (batch, queries, self.heads, self.levels, self.points)
        value = self.value_proj(memory).view(batch, -1, self.heads, channels // self.heads)
        offsets, logits = self._offsets_and_logits(query)
        weights = logits.view(*grid[:3], -1).softmax(dim=-1).view(grid)
        locations = self._locations(reference.to(offsets.dtype), offsets.view(*grid, 2), shapes)
        result: Tensor = self.output_proj(self.sample(value, shapes, locations, weights))
        return result, SamplingPoints(locations, weights)

    def _offsets_and_logits(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Both projections in one product, never in half precision: its 8 bits would blur the locations."""
        with full_precision(query):
            weight = torch.cat([self.sampling_offsets.weight, self.attention_weights.weight])
            bias = torch.cat([self.sampling_offsets.bias, self.attention_weights.bias])
            joint = F.linear(query.to(weight.dtype), weight, bias)
        offsets, logits = joint.split([len(self.sampling_offsets.bias), len(self.attention_weights.bias)], dim=-1)
        return offsets, logits

    def _locations(self, reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
        reference = reference[:, :, None, None, None]
        if reference.shape[-1] == 4:
            centre, half = reference[..., :2], 0.5 * reference[..., 2:]
            if self.constrained:
                return centre + offsets.tanh() * half
            return centre + offsets * (half / self.points)
        assert reference.shape[-1] == 2
        assert not self.constrained
        size = cached_tensor(tuple((width, height) for height, width in shapes), offsets.device, offsets.dtype)
        return reference + offsets / size[:, None]


def use_sampling(model: nn.Module, device: torch.device | str, *, compiled: Compile = "auto") -> str:
    """Let all attentions of a model sample in the form that suits the device, and return its name for the log.

    For parameters and errors see `celldetr.model.sampling.choose_sampler`.
    """
    attentions = [module for module in model.modules() if isinstance(module, DeformableAttention)]
    kernel: Kernel = "reference" if any(module.kernel == "reference" for module in attentions) else "auto"
    form = choose_sampler(device, kernel=kernel, compiled=compiled)
    for module in attentions:
        module.sample = form.function
    return form.name
