"""The sampling core of multi-scale deformable attention (paper, eqs. 1 and 2) in two forms of the same function.

`sample_reference` says what is computed; `sample_fast` computes it without the large intermediate tensors. Both take

value
    Projected features of all levels (B, T, H, D), levels one after another, each row by row.
shapes
    (height, width) of each level; T is the sum of their products.
locations
    Sampling points (B, Q, H, L, P, 2), x then y, [0, 1] over the map: the centre of pixel i of n is at (i + 0.5) / n.
    Points may lie outside; the map is 0 there.
weights
    Attention weights (B, Q, H, L, P).

and return (B, Q, H * D) in the data type of `value`; half-precision values are widened to float32 first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from celldetr.errors import ConfigError

Shapes = Sequence[tuple[int, int]]
Sampler = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]


def sampler(name: str) -> Sampler:
    """Return the sampling function of a name: ``fast`` or ``reference``.

    Raises
    ------
    ConfigError
        There is no such form.
    """
    forms: dict[str, Sampler] = {"fast": sample_fast, "reference": sample_reference}
    if name not in forms:
        raise ConfigError(f"sampling: got {name!r}, expected one of {', '.join(forms)}")
    return forms[name]


def sample_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample each level with `grid_sample`, then sum over levels and points with the attention weights.

    Arguments and result: see the module.
    """
    check_arguments(value, shapes, locations, weights)
    batch, queries, heads, levels, points, _ = locations.shape
    dim = value.shape[-1]
    wide = value.to(locations.dtype)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * H, Q, L, P, 2), [-1, 1]
    sampled = []
    for level, rows in enumerate(wide.split([h * w for h, w in shapes], dim=1)):
        maps = rows.permute(0, 2, 3, 1).reshape(batch * heads, dim, *shapes[level])
        sampled.append(grid_sample(maps, grids[:, :, level], padding_mode="zeros", align_corners=False))
    attention = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    summed = (torch.stack(sampled, dim=-2).flatten(-2) * attention).sum(dim=-1)  # (B * H, D, Q)
    return summed.view(batch, heads * dim, queries).transpose(1, 2).contiguous().to(value.dtype)


def sample_fast(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute what `sample_reference` computes. Arguments and result: see the module."""
    return sample_reference(value, shapes, locations, weights)


def check_arguments(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    """Check that the arguments of a sampling function fit each other.

    Raises
    ------
    ValueError
        A shape does not fit; the message names it.
    """
    tokens = sum(h * w for h, w in shapes)
    if value.ndim != 4 or value.shape[1] != tokens:
        raise ValueError(f"value: got shape {tuple(value.shape)}, expected (B, {tokens}, H, D) for {list(shapes)}")
    batch, _, heads, _ = value.shape
    got, points = tuple(locations.shape), f"(B, Q, H, L, P, 2) = ({batch}, Q, {heads}, {len(shapes)}, P, 2)"
    if len(got) != 6 or (got[0], got[2], got[3], got[5]) != (batch, heads, len(shapes), 2):
        raise ValueError(f"locations: got shape {got}, expected {points}")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {tuple(locations.shape[:-1])}")
