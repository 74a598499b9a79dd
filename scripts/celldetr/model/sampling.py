"""Multi-scale deformable sampling (paper, eqs. 1 and 2) in two forms that compute the same.

`sample_reference` says what is computed: `grid_sample` per level, then a weighted sum. `sample_fast`, the default, sees
the sampled sum of a query and head as one weighted sum over rows of the value table: 4 corners for each of the L * P
points, with attention times bilinear weight as the row's weight. The table gets a border of zeros around each level, so
that a point outside of the map needs no case of its own. On CUDA, the kernels of the optional package `deformops` are
used when it is installed.

Shapes, with B images, T tokens, H heads, D channels per head, Q queries, L levels, P points:
value (B, T, H, D), levels one after another, row by row; shapes, (height, width) of the L levels;
locations (B, Q, H, L, P, 2), x then y in [0, 1] of the map, pixel i has its centre at (i + 0.5) / size;
weights (B, Q, H, L, P); result (B, Q, H * D).
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F

# Only the pattern's values are used; PyTorch warns about everything else that such tensors cannot do yet.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

Shapes = Sequence[tuple[int, int]]
Sampler = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]


def sampler(name: str, *, compiled: bool = False) -> Sampler:
    """Find a sampling function by its name in the settings: ``fast`` or ``reference``.

    Parameters
    ----------
    name
        Name of the form.
    compiled
        Pass it through `torch.compile`.
    """
    function: Sampler = {"fast": sample_fast, "reference": sample_reference}[name]
    return torch.compile(function) if compiled else function


def sample_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample by `grid_sample`; shapes at the top of this module."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    sampled = []
    for level, values in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        maps = values.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        sampled.append(F.grid_sample(maps, grid.to(maps.dtype), padding_mode="zeros", align_corners=False))
    points = torch.stack(sampled, dim=-2)  # (B * H, D, Q, L, P)
    attention = weights.transpose(1, 2).reshape(batch * heads, 1, *points.shape[2:])
    summed = (points * attention).sum(dim=(-2, -1))
    return summed.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def sample_fast(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample by weighted sums over table rows; shapes at the top of this module.

    Half precision values are sampled in float32 and returned in their own type.
    """
    if value.is_cuda and (kernels := _cuda_kernels()) is not None:
        sizes = torch.tensor(shapes, device=value.device)
        return kernels(value, sizes, None, locations.to(value.dtype), weights.to(value.dtype)).flatten(2)
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    table = _bordered(value.to(exact), shapes)
    rows, row_weights = _corners(locations.to(exact), weights.to(exact), shapes, table.shape[1])
    bags = batch * queries * heads, 4 * weights.shape[3] * weights.shape[4]
    summed = _weighted_rows(table.view(-1, channels), rows.view(bags), row_weights.view(bags))
    return summed.view(batch, queries, heads * channels).to(value.dtype)


@functools.cache
def _cuda_kernels() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("deformops") is None:
        return None
    from deformops.registry import msda

    found: Callable[..., Tensor] = msda
    return found


def _bordered(value: Tensor, shapes: Shapes) -> Tensor:
    """Table (B, T', H, D) in which each level has a border of zeros, and a tail that the last corner may point to."""
    batch, _, heads, channels = value.shape
    levels = []
    for values, (height, width) in zip(value.split([h * w for h, w in shapes], dim=1), shapes, strict=True):
        maps = values.reshape(batch, height, width, heads * channels)
        levels.append(F.pad(maps, (0, 0, 1, 1, 1, 1)).flatten(1, 2))
    tail = value.new_zeros(batch, max(width for _, width in shapes) + 3, heads * channels)
    return torch.cat([*levels, tail], dim=1).view(batch, -1, heads, channels)


@functools.lru_cache(maxsize=32)
def _geometry(shapes: Shapes, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sizes (L, 1, 2) x then y; row stride (L, 1); first row (H, L, 1) of pixel (0, 0); corner offsets (4, L, 1)."""
    with torch.inference_mode(False):  # what is cached may be needed with gradients later
        size = torch.tensor([[width, height] for height, width in shapes], device=device).view(-1, 1, 2)
        stride = torch.tensor([width + 2 for _, width in shapes], dtype=torch.int32, device=device)
        cells = [(height + 2) * (width + 2) for height, width in shapes]
        origin = [sum(cells[:level]) + width + 3 for level, (_, width) in enumerate(shapes)]
        first = torch.tensor(origin, dtype=torch.int32, device=device).view(1, -1, 1) * heads
        first = first + torch.arange(heads, dtype=torch.int32, device=device).view(-1, 1, 1)
        corners = torch.stack([torch.zeros_like(stride), torch.ones_like(stride), stride, stride + 1]) * heads
        return size, stride.view(-1, 1), first, corners.view(4, -1, 1)


def _corners(locations: Tensor, weights: Tensor, shapes: Shapes, cells: int) -> tuple[Tensor, Tensor]:
    """Table rows and their weights, (B, Q, H, 4, L, P) each, of the pixels around each point."""
    batch, heads = locations.shape[0], locations.shape[2]
    size, stride, first, corners = _geometry(tuple(shapes), heads, locations.device)
    # Beyond the border everything is zero: points farther out are moved onto it.
    place = torch.minimum((locations * size - 0.5).clamp(min=-1), size.to(locations.dtype))
    low = place.detach().floor()
    right, down = (place - low).unbind(-1)
    column, line = low.to(torch.int32).unbind(-1)
    image = torch.arange(batch, dtype=torch.int32, device=locations.device).view(-1, 1, 1, 1, 1) * (cells * heads)
    rows = ((line * stride + column) * heads + (first + image)).unsqueeze(3) + corners
    below = weights * down
    above = weights - below
    above_right, below_right = above * right, below * right
    return rows, torch.stack([above - above_right, above_right, below - below_right, below_right], dim=3)


@torch.library.custom_op("celldetr::weighted_rows", mutates_args=())
def _weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum rows of a table (R, D) at indices (N, K) with weights (N, K): (N, D)."""
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


@torch.library.custom_op("celldetr::weighted_rows_backward", mutates_args=())
def _weighted_rows_backward(gradient: Tensor, table: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of table (R, D) and weights (N, K). On the CPU they are sparse products, several times faster."""
    if gradient.device.type == "cpu":
        return _transposed_product(table, rows, weights, gradient), _row_products(table, rows, gradient)
    with torch.enable_grad():
        leaves = table.detach().requires_grad_(), weights.detach().requires_grad_()
        summed = F.embedding_bag(rows, leaves[0], mode="sum", per_sample_weights=leaves[1])
    of_table, of_weights = torch.autograd.grad(summed, leaves, gradient)
    return of_table, of_weights


@_weighted_rows.register_fake
def _(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return table.new_empty(rows.shape[0], table.shape[1])


@_weighted_rows_backward.register_fake
def _(gradient: Tensor, table: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
    of_table, of_weights = _weighted_rows_backward(gradient.contiguous(), *ctx.saved_tensors)
    return of_table, None, of_weights


_weighted_rows.register_autograd(_backward, setup_context=_save)


def _transposed_product(table: Tensor, rows: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the table: the transposed sparse matrix of the weights times the gradient (N, D)."""
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)
    parts = (weights.flatten().numpy(), rows.flatten().numpy(), ends.numpy())
    matrix = csr_array(parts, shape=(len(rows), len(table)))
    return torch.from_numpy(matrix.T @ gradient.numpy())


def _row_products(table: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the weights: products of the gradient (N, D) with the rows that were summed."""
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1])
    pattern = torch.sparse_csr_tensor(
        ends, rows.flatten().long(), table.new_zeros(rows.numel()), (len(rows), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, gradient, table.T, beta=0.0).values().view(rows.shape).clone()
