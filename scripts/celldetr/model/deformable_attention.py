"""Multi-scale deformable attention, free or constrained to a box (paper, eqs. 1 to 4)."""

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from celldetr.errors import ConfigError
from celldetr.model.sampling import Shapes, sampler


class SamplingPoints(NamedTuple):
    """Where an attention looked and how much each point counted.

    Attributes
    ----------
    locations
        Points (B, Q, H, L, P, 2), x then y, [0, 1] over the image.
    weights
        Attention weights (B, Q, H, L, P); they sum to 1 over levels and points.
    """

    locations: Tensor
    weights: Tensor


class DeformableAttention(nn.Module):
    """Attention of queries to a few learned points on the feature maps around their references.

    Parameters
    ----------
    d_model
        Width C of queries and features.
    heads, levels, points
        Attention heads H, feature levels L, and points P per head and level.
    constrained
        Keep every point inside the query's box (paper, eq. 4); references are then boxes.
    offset_init
        Where the points of a constrained attention start. ``authors``: the pattern of Deformable DETR, point k at
        k + 1 before the tanh, so that all points start near the edge of the box; ``spread``: evenly from the centre
        to the edge, point k at (2k + 1) / (2P) of the half box.
    sampling
        Form of the sampling core: ``fast`` or ``reference``.

    Raises
    ------
    ConfigError
        The settings contradict each other or are unknown.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        levels: int,
        points: int,
        *,
        constrained: bool = False,
        offset_init: Literal["authors", "spread"] = "authors",
        sampling: Literal["fast", "reference"] = "fast",
    ) -> None:
        super().__init__()
        if d_model % heads:
            raise ConfigError(f"d_model: got {d_model}, expected a multiple of heads ({heads})")
        if offset_init not in ("authors", "spread"):
            raise ConfigError(f"offset_init: got {offset_init!r}, expected one of authors, spread")
        if offset_init == "spread" and not constrained:
            raise ConfigError("offset_init: got 'spread' for an attention without box, where offsets have no half box")
        self.heads, self.levels, self.points = heads, levels, points
        self.constrained = constrained
        self.offset_init = offset_init
        self.sample = sampler(sampling)
        self.sampling_offsets = nn.Linear(d_model, heads * levels * points * 2)
        self.attention_weights = nn.Linear(d_model, heads * levels * points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Deformable DETR: points do not depend on the query, head m looks along 2 pi m / H."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(self._initial_offsets().flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def _initial_offsets(self) -> Tensor:
        """Offsets (H, L, P, 2) before any training; directions have a largest coordinate of 1."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1.0, self.points + 1)
        if self.offset_init == "spread":
            offsets = torch.atanh(directions[:, None] * ((2 * steps - 1) / (2 * self.points))[:, None])
        else:
            offsets = directions[:, None] * steps[:, None]
        return offsets[:, None].expand(-1, self.levels, -1, -1)

    @overload
    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        *,
        return_points: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, *, return_points: Literal[True]
    ) -> tuple[Tensor, SamplingPoints]: ...

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, *, return_points: bool = False
    ) -> Tensor | tuple[Tensor, SamplingPoints]:
        """Attend from queries to features.

        Locations, attention weights and sampling are float32 under autocast too.

        Parameters
        ----------
        query
            Queries (B, Q, C), with their position added.
        reference
            Points (B, Q, 2), x then y, or boxes (B, Q, 4), cxcywh, in [0, 1].
        memory
            Features of all levels (B, T, C), levels one after another.
        shapes
            (height, width) of each level.
        return_points
            Also return where and how strongly was sampled.

        Returns
        -------
        Tensor or (Tensor, SamplingPoints)
            Attended features (B, Q, C).

        Raises
        ------
        ValueError
            The reference has another shape, or is a point although the attention is constrained to boxes.
        """
        batch, queries, _ = query.shape
        value = self.value_proj(memory).unflatten(-1, (self.heads, -1))
        offsets = _wide(self.sampling_offsets(query))
        locations = self._locations(
            offsets.view(batch, queries, self.heads, self.levels, self.points, 2), _wide(reference), shapes
        )
        weights = _wide(self.attention_weights(query)).view(batch, queries, self.heads, -1).softmax(dim=-1)
        weights = weights.view(locations.shape[:-1])
        attended = self.output_proj(self.sample(value, shapes, locations, weights))
        return (attended, SamplingPoints(locations, weights)) if return_points else attended

    def _locations(self, offsets: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """Place the points (B, Q, H, L, P, 2) of offsets of that shape around references (B, Q, 2 or 4)."""
        if reference.shape[:2] != offsets.shape[:2] or reference.shape[2:] not in ((2,), (4,)):
            raise ValueError(
                f"reference: got shape {tuple(reference.shape)}, expected {(*offsets.shape[:2], 2)} (points) or "
                f"{(*offsets.shape[:2], 4)} (boxes)"
            )
        reference = reference[:, :, None, None, None, :]
        if reference.shape[-1] == 4:
            centre, size = reference.split(2, dim=-1)
            if self.constrained:
                return centre + 0.5 * torch.tanh(offsets) * size  # eq. 4
            return centre + offsets * (0.5 / self.points) * size  # eq. 3
        if self.constrained:
            raise ValueError("reference: got points, expected boxes (.., 4): this attention is constrained to boxes")
        per_pixel = offsets.new_tensor([(1 / w, 1 / h) for h, w in shapes])
        return reference + offsets * per_pixel[:, None]


def _wide(values: Tensor) -> Tensor:
    """Widen to float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
