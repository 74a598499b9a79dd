"""Multi-scale deformable sampling (paper, eqs. 1 and 2) in forms that compute the same; `choose_sampler` picks one.

`sample_reference` defines the computation: `grid_sample` per level, then a weighted sum. `sample_portable` computes the
result of a query and head as one weighted sum over rows of the value table: 4 corners for each of the L * P points,
with attention times bilinear weight as the weight of a row. The table has a border of zeros around each level, so that
points outside of the map need no special case. `sample_kernels` calls the CUDA kernels of the optional package
`deformops`; `celldetr.model.sampling_triton` has kernels of our own.

Shapes, with B images, T tokens, H heads, D channels per head, Q queries, L levels, P points:
value (B, T, H, D), levels one after another, row by row; shapes, (height, width) of the L levels;
locations (B, Q, H, L, P, 2), x then y in [0, 1] of the map, pixel i has its centre at (i + 0.5) / size;
weights (B, Q, H, L, P); result (B, Q, H * D).
"""

import functools
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from celldetr.config.experiment import Kernel
from celldetr.model.compiled import Compile, compiles
from celldetr.model.device import cached_tensor, constant_table, full_precision

# PyTorch warns that most operations on sparse CSR tensors are missing; only the values of the result are used here.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_POINTS_AT_ONCE = 65536
# Largest difference of our kernels from the portable form that is rounding, as a share of the largest number.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

Shapes = tuple[tuple[int, int], ...]
"""Height and width of each level."""
Sampler = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]
Geometry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Sampling(NamedTuple):
    """A form of the sampling and its name in the log."""

    function: Sampler
    name: str


def choose_sampler(device: torch.device | str, *, kernel: Kernel = "auto", compiled: Compile = "auto") -> Sampling:
    """Choose the form of the sampling on a device.

    Parameters
    ----------
    kernel
        ``auto``: the fastest form that the device has, on CUDA the kernels of `deformops`, else ours, else the portable
        form; ``reference``: `sample_reference`.
    compiled
        Whether `torch.compile` compiles the portable form. ``auto``: on CUDA, if there is a C compiler.

    Raises
    ------
    ConfigError
        `compiled` is true and there is no compiler.
    """
    if kernel == "reference":
        return Sampling(sample_reference, "reference form (grid_sample)")
    kind = torch.device(device).type
    if kind == "cuda" and importlib.util.find_spec("deformops") is not None:
        return Sampling(sample_kernels, "kernels of deformops")
    if kind == "cuda" and importlib.util.find_spec("triton") is not None and _own_kernels_work(torch.device(device)):
        from celldetr.model.sampling_triton import sample_triton

        return Sampling(sample_triton, "kernels of our own")
    if compiles(compiled, device, "training.compile"):
        core = torch.compile(_sample_rows_again)
        return Sampling(functools.partial(sample_portable, core=core), "portable form, compiled")
    if kind == "cuda":
        return Sampling(functools.partial(sample_portable, core=_sample_rows_again), "portable form")
    return Sampling(sample_portable, "portable form")


@functools.cache
def _own_kernels_work(device: torch.device) -> bool:
    """Whether our kernels compute on a GPU what the portable form does; if not, warn and say why. Checked once."""
    try:
        from celldetr.model.sampling_triton import sample_triton

        differences = {dtype: largest_difference(sample_triton, device, dtype) for dtype in _TOLERANCE}
    except Exception as error:  # compilers and drivers raise errors of all kinds
        reason = f"fail: {type(error).__name__}: {error}"
    else:
        wrong = [str(dtype) for dtype, limit in _TOLERANCE.items() if not differences[dtype] < limit]  # also NaN
        if not wrong:
            return True
        reason = f"give other numbers in {' and '.join(wrong)}"
    warnings.warn(f"the portable form of the sampling is used: on {device} our kernels {reason}", stacklevel=3)
    return False


def largest_difference(
    form: Sampler, device: torch.device, dtype: torch.dtype, *, queries: int = 200, heads: int = 8
) -> float:
    """Compare a form with the portable form on a device, value and gradients, for random values of a type.

    Returns the largest difference, as a share of the largest number; NaN if a number is not finite.
    """
    shapes = ((18, 20), (9, 10))  # our kernels scatter gradients of the first and gather those of the second
    generator = torch.Generator().manual_seed(0)
    size = (2, queries, heads, len(shapes), 4)
    value = torch.randn(2, sum(map(math.prod, shapes)), heads, 32, generator=generator).to(dtype)
    locations = torch.rand(*size, 2, generator=generator) * 1.4 - 0.2
    inputs = [x.to(device) for x in (value, locations, torch.rand(size, generator=generator))]

    def run(sample: Sampler) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        sampled = sample(leaves[0], shapes, *leaves[1:])
        slope = torch.linspace(-1, 1, sampled.numel(), dtype=dtype, device=device).view_as(sampled)
        return [sampled, *torch.autograd.grad(sampled, leaves, slope)]

    with torch.inference_mode(False), torch.enable_grad(), full_precision(inputs[0]):
        pairs = list(zip(run(form), run(sample_portable), strict=True))
    return float(
        torch.stack([(found - portable).abs().max() / portable.abs().max() for found, portable in pairs]).max()
    )


def sample_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample with `grid_sample`; for shapes see the top of this module."""
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


def sample_kernels(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample with the kernels of `deformops`, in float32; for shapes see the top of this module."""
    from deformops.registry import msda

    first_tokens = tuple(itertools.accumulate((height * width for height, width in shapes[:-1]), initial=0))
    levels = (cached_tensor(numbers, value.device, torch.int64) for numbers in (shapes, first_tokens))
    sampled: Tensor = msda(value.float(), *levels, locations.float(), weights.float())
    return sampled.to(value.dtype)


def sample_portable(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *, core: Callable[..., Tensor] | None = None
) -> Tensor:
    """Sample by weighted sums over table rows; for shapes see the top of this module.

    Half-precision values are sampled in float32 and returned in their own type. `core` replaces `_sample_rows`; the
    tables of the levels are made outside of it, once.
    """
    geometry = _geometry(shapes, weights.shape[2], weights.shape[4], locations.device)
    return (core or _sample_rows)(value, shapes, locations, weights, geometry)


def _sample_rows(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, geometry: Geometry) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    values, locations, weights = value.to(exact), locations.to(exact), weights.to(exact)
    table = _bordered(values, shapes)
    image = torch.arange(batch, dtype=torch.int32, device=value.device) * (table.shape[1] * heads)
    image = image.view(-1, 1).expand(batch, queries).flatten()
    locations, weights = locations.flatten(0, 1), weights.flatten(0, 1)
    size = _queries_at_once(table, locations, weights)
    sum_rows = _row_sum(value.device)
    sums = [
        sum_rows(table.view(-1, channels), *_corners(*part, geometry))
        for part in zip(locations.split(size), weights.split(size), image.split(size), strict=True)
    ]
    return torch.cat(sums).view(batch, queries, heads * channels).to(value.dtype)


def _sample_rows_again(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, geometry: Geometry) -> Tensor:
    """Sample; the backward pass computes the corners of the points again instead of keeping them."""
    if not torch.is_grad_enabled():
        return _sample_rows(value, shapes, locations, weights, geometry)
    args = value, shapes, locations, weights, geometry
    sampled: Tensor = checkpoint(_sample_rows, *args, use_reentrant=False, preserve_rng_state=False)
    return sampled


def _queries_at_once(table: Tensor, locations: Tensor, weights: Tensor) -> int:
    """Count the queries whose corners together fit the cache of a CPU core; all for a GPU, gradients or a compiler."""
    queries, *per_query = weights.shape
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (table, locations, weights))
    if table.device.type != "cpu" or gradient or torch.compiler.is_compiling():
        return max(1, queries)
    return max(1, _POINTS_AT_ONCE // math.prod(per_query))


def _row_sum(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Choose how rows of a table (R, D) at indices (N, K) are summed with weights (N, K) to (N, D)."""
    if device.type == "cpu":
        return _sum_rows
    return _sum_gathered_rows if torch.compiler.is_compiling() else _sum_bags


def _sum_gathered_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum rows in operations that `torch.compile` fuses into one kernel."""
    return (table[rows] * weights[..., None]).sum(dim=1)


def _sum_bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum rows with PyTorch's own forward and backward."""
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def _bordered(value: Tensor, shapes: Shapes) -> Tensor:
    """Table (B, T', H, D) in which each level has a border of zeros, and a tail that the last corner may point to."""
    batch, _, heads, channels = value.shape
    levels = []
    for values, (height, width) in zip(value.split([h * w for h, w in shapes], dim=1), shapes, strict=True):
        maps = values.reshape(batch, height, width, heads * channels)
        levels.append(F.pad(maps, (0, 0, 1, 1, 1, 1)).flatten(1, 2))
    tail = value.new_zeros(batch, max(width for _, width in shapes) + 3, heads * channels)
    return torch.cat([*levels, tail], dim=1).view(batch, -1, heads, channels)


@constant_table
def _geometry(shapes: Shapes, heads: int, points: int, device: torch.device) -> Geometry:
    """Tables for each of the K = L * P points of a head.

    Width (K,), height (K,), row stride (K,), first row (H, K) of pixel (0, 0), and corner offsets (4, K).
    """

    def of_points(per_level: list[int]) -> Tensor:
        on_host = torch.tensor(per_level, dtype=torch.int32).repeat_interleave(points)
        return on_host.to(device, non_blocking=True)

    stride = of_points([width + 2 for _, width in shapes])
    cells = [(height + 2) * (width + 2) for height, width in shapes]
    origin = of_points([sum(cells[:level]) + width + 3 for level, (_, width) in enumerate(shapes)])
    first = origin * heads + torch.arange(heads, dtype=torch.int32, device=device).view(-1, 1)
    corners = torch.stack([torch.zeros_like(stride), torch.ones_like(stride), stride, stride + 1]) * heads
    sizes = of_points([width for _, width in shapes]), of_points([height for height, _ in shapes])
    return *sizes, stride * heads, first, corners


def _corners(locations: Tensor, weights: Tensor, image: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Table rows and their weights, (N * H, 4 * L * P) each, of the pixels around each point.

    Takes locations (N, H, L, P, 2), weights (N, H, L, P) and the first table row (N,) of each query's image. Levels and
    points are one dimension here: longer inner loops are faster.
    """
    _, heads, levels, points = weights.shape
    width, height, stride, first, corners = geometry
    across, along = locations.flatten(2, 3).unbind(-1)
    column, right = _split(across, width.to(locations.dtype))
    line, down = _split(along, height.to(locations.dtype))
    weights = weights.flatten(2)
    rows = (line * stride + column * heads + (first + image.view(-1, 1, 1))).unsqueeze(2) + corners
    below = weights * down
    above = weights - below
    above_right, below_right = above * right, below * right
    row_weights = torch.stack([above - above_right, above_right, below - below_right, below_right], dim=2)
    bags = len(image) * heads, 4 * levels * points
    return rows.view(bags), row_weights.view(bags)


def _split(places: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the pixel before each place in [0, 1], from -1 to size, and the distance from its centre, 0 to 1."""
    # Everything beyond the border is zero: points farther out are moved onto it.
    places = torch.minimum((places * size - 0.5).clamp(min=-1), size)
    low = places.detach().floor()
    # A NaN location must show in the result, but its index must still be one of the table.
    return low.to(torch.int32).clamp_(min=-1), places - low


@torch.library.custom_op("celldetr::sum_rows", mutates_args=())
def _sum_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum rows on the CPU: as `_sum_bags`, but with a backward of sparse products, which is several times faster."""
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


@torch.library.custom_op("celldetr::sum_rows_backward", mutates_args=())
def _sum_rows_backward(gradient: Tensor, table: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of table (R, D) and weights (N, K)."""
    return _transposed_product(table, rows, weights, gradient), _row_products(table, rows, gradient)


@_sum_rows.register_fake
def _(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return table.new_empty(rows.shape[0], table.shape[1])


@_sum_rows_backward.register_fake
def _(gradient: Tensor, table: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(weights)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
    of_table, of_weights = _sum_rows_backward(gradient.contiguous(), *ctx.saved_tensors)
    return of_table, None, of_weights


_sum_rows.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _transposed_product(table: Tensor, rows: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the table: the transposed sparse matrix of the weights times the gradient (N, D)."""
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)
    parts = (weights.flatten().numpy(), rows.flatten().numpy(), ends.numpy())
    matrix = csr_array(parts, shape=(len(rows), len(table)))
    return torch.from_numpy(matrix.T @ gradient.numpy())


def _row_products(table: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the weights: products of the gradient (N, D) with the rows that were summed."""
    if len(table) < rows.shape[1]:  # PyTorch refuses patterns with more values in a row than the matrix has columns
        return (table[rows] * gradient[:, None]).sum(dim=-1)
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1])
    pattern = torch.sparse_csr_tensor(
        ends, rows.flatten().long(), table.new_zeros(rows.numel()), (len(rows), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, gradient, table.T, beta=0.0).values().view(rows.shape).clone()
