"""Multi-scale deformable sampling (paper, eqs. 1 and 2) in forms that compute the same; `choose` takes one.

`sample_reference` says what is computed: `grid_sample` per level, then a weighted sum. `sample_portable` sees the
sampled sum of a query and head as one weighted sum over rows of the value table: 4 corners for each of the L * P
points, with attention times bilinear weight as the row's weight. The table gets a border of zeros around each level, so
that a point outside of the map needs no case of its own. `sample_kernels` are those of the optional package
`deformops`, for CUDA.

Shapes, with B images, T tokens, H heads, D channels per head, Q queries, L levels, P points:
value (B, T, H, D), levels one after another, row by row; shapes, (height, width) of the L levels;
locations (B, Q, H, L, P, 2), x then y in [0, 1] of the map, pixel i has its centre at (i + 0.5) / size;
weights (B, Q, H, L, P); result (B, Q, H * D).
"""

import functools
import importlib.util
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from celldetr.runtime.errors import ConfigError

# Only the pattern's values are used; PyTorch warns about everything else that such tensors cannot do yet.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_POINTS_AT_ONCE = 65536

Shapes = Sequence[tuple[int, int]]
Sampler = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]
Geometry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Compile = Literal["auto"] | bool

_COMPILERS = {"cpu": ("c++", "g++", "clang++"), "cuda": ("cc", "gcc", "clang")}


class Sampling(NamedTuple):
    """A form of the sampling, and what to call it in a log."""

    function: Sampler
    name: str


def choose(device: torch.device | str, *, fast: bool, compiled: Compile = "auto") -> Sampling:
    """Choose the fastest form that a device has.

    Parameters
    ----------
    device
        Where it will run.
    fast
        False takes the plain form, `sample_reference`, everywhere.
    compiled
        Whether the portable form passes through `torch.compile`. ``auto``: on CUDA, where a C compiler is found.

    Raises
    ------
    ConfigError
        `compiled` is true and there is no compiler.
    """
    if not fast:
        return Sampling(sample_reference, "plain form (grid_sample)")
    kind = torch.device(device).type
    if kind == "cuda" and importlib.util.find_spec("deformops") is not None:
        return Sampling(sample_kernels, "kernels of deformops")
    compiler = next(filter(shutil.which, _COMPILERS["cuda" if kind == "cuda" else "cpu"]), None)
    if compiled is True and compiler is None:
        raise ConfigError("training.compile: got true, but there is no C++ compiler here; install one or set it false")
    if compiled is True or (compiled == "auto" and kind == "cuda" and compiler is not None):
        compiled_core = torch.compile(_sample_lean)
        return Sampling(functools.partial(sample_portable, core=compiled_core), "portable form, compiled")
    if kind == "cuda":
        return Sampling(functools.partial(sample_portable, core=_sample_lean), "portable form")
    return Sampling(sample_portable, "portable form")


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


def sample_kernels(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample with the kernels of `deformops`, in float32; shapes at the top of this module."""
    from deformops.registry import msda

    exact = value.float(), *_level_table(tuple(shapes), value.device), locations.float(), weights.float()
    sampled: Tensor = msda(*exact)
    return sampled.to(value.dtype)


def sample_portable(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *, core: Callable[..., Tensor] | None = None
) -> Tensor:
    """Sample by weighted sums over table rows; shapes at the top of this module.

    Half precision values are sampled in float32 and returned in their own type. `core` is another form of what does
    it; the tables of the levels are made outside of it, once.
    """
    heads, points = weights.shape[2], weights.shape[4]
    geometry = _geometry(tuple(shapes), heads, points, locations.device)
    return (core or _sample_rows)(value, tuple(shapes), locations, weights, geometry)


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
    weighted_sum = _row_sum(value.device)
    sums = [
        weighted_sum(table.view(-1, channels), *_corners(*part, geometry))
        for part in zip(locations.split(size), weights.split(size), image.split(size), strict=True)
    ]
    return torch.cat(sums).view(batch, queries, heads * channels).to(value.dtype)


def _sample_lean(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, geometry: Geometry) -> Tensor:
    """Sample; of the corners of the points nothing is kept for the backward pass, they are cheap to compute again."""
    if not torch.is_grad_enabled():
        return _sample_rows(value, shapes, locations, weights, geometry)
    given = value, shapes, locations, weights, geometry
    sampled: Tensor = checkpoint(_sample_rows, *given, use_reentrant=False, preserve_rng_state=False)
    return sampled


def _queries_at_once(table: Tensor, locations: Tensor, weights: Tensor) -> int:
    """Count the queries whose corners fit a CPU core's cache together; all where a gradient or a compiler follows."""
    queries, *per_query = weights.shape
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (table, locations, weights))
    if table.device.type != "cpu" or gradient or torch.compiler.is_compiling():
        return max(1, queries)
    return max(1, _POINTS_AT_ONCE // math.prod(per_query))


def _row_sum(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Way to sum table rows: a compiler for GPUs fuses the plain product with the arithmetic that leads to it."""
    return _gathered_rows if device.type == "cuda" and torch.compiler.is_compiling() else _weighted_rows


def _gathered_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum as `_weighted_rows` does, in operations that `torch.compile` turns into one kernel."""
    return (table[rows] * weights[..., None]).sum(dim=1)


@functools.lru_cache(maxsize=32)
def _level_table(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Height and width (L, 2), and first token (L,), of each level: what the kernels ask for."""
    with torch.inference_mode(False):  # what is cached may be needed with gradients later
        sizes = torch.tensor(shapes)
        starts = sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1)
        return sizes.to(device, non_blocking=True), starts.to(device, non_blocking=True)


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
def _geometry(shapes: Shapes, heads: int, points: int, device: torch.device) -> Geometry:
    """Tables for each of the K = L * P points of a head.

    Width (K,), height (K,), row stride (K,), first row (H, K) of pixel (0, 0), and corner offsets (4, K).
    """

    def of_points(per_level: list[int]) -> Tensor:
        on_host = torch.tensor(per_level, dtype=torch.int32).repeat_interleave(points)
        return on_host.to(device, non_blocking=True)

    with torch.inference_mode(False):  # what is cached may be needed with gradients later
        stride = of_points([width + 2 for _, width in shapes])
        cells = [(height + 2) * (width + 2) for height, width in shapes]
        origin = of_points([sum(cells[:level]) + width + 3 for level, (_, width) in enumerate(shapes)])
        first = origin * heads + torch.arange(heads, dtype=torch.int32, device=device).view(-1, 1)
        corners = torch.stack([torch.zeros_like(stride), torch.ones_like(stride), stride, stride + 1]) * heads
        sizes = of_points([width for _, width in shapes]), of_points([height for height, _ in shapes])
        return *sizes, stride * heads, first, corners


def _corners(locations: Tensor, weights: Tensor, image: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Table rows and their weights, (N * H, 4 * L * P) each, of the pixels around each point.

    Of locations (N, H, L, P, 2), weights (N, H, L, P) and the first table row (N,) of each query's image. Levels and
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
    """Index of the pixel before each place in [0, 1], -1 to size, and the way from its centre to the next, 0 to 1."""
    # Beyond the border everything is zero: points farther out are moved onto it.
    places = torch.minimum((places * size - 0.5).clamp(min=-1), size)
    low = places.detach().floor()
    # A place that is not a number shows in the result; its index must be one of the table all the same.
    return low.to(torch.int32).clamp_(min=-1), places - low


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
    if len(table) < rows.shape[1]:  # PyTorch refuses patterns with more values in a row than the matrix has columns
        return (table[rows] * gradient[:, None]).sum(dim=-1)
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1])
    pattern = torch.sparse_csr_tensor(
        ends, rows.flatten().long(), table.new_zeros(rows.numel()), (len(rows), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, gradient, table.T, beta=0.0).values().view(rows.shape).clone()
