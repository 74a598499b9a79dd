"""Multi-scale deformable sampling in kernels of our own for GPUs, in Triton; shapes as in `celldetr.model.sampling`.

A program works on a block of queries of one image and head. All points of a level are one tile (queries, points,
channels): 4 loads fetch the corners of all of them, and the result is summed over the points once, at the end. The
heads of a block of queries are neighbours in the grid: they read and write neighbouring memory.

In the backward pass many points add to the gradient of the same pixel. Programs that add to one address at the same
time wait for each other, and the more, the more points gather on a few nuclei. So the levels of few pixels, where this
is worst, are not scattered: for a tile of pixels `_gather_kernel` computes what each query adds to each pixel, zero
for most, as a matrix, and multiplies it by the gradients. Its time does not depend on where the points are. The finer
levels are scattered by atomic additions, on GPUs of compute capability 9 four channels at once.

The operators have a fake form and gradients: `torch.compile` takes them into one graph, and CUDA graphs capture them.
The kernels take float32, bfloat16 or float16 values, and compute and add in float32. Importing this module needs
Triton; with ``TRITON_INTERPRET=1`` in the environment the kernels run on a CPU, slowly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]

DENSE_PIXELS = 256
"""Levels of up to so many pixels are gathered in the backward pass, not scattered; 0: none."""

_TILE = 1024
"""Numbers in a tile of a program."""
_MOST_GATHERED_CHANNELS = 64
_GATHERED_QUERIES = 64
_QUERIES_PER_PROGRAM = 1024
_PIXELS = 64


def sample_triton(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample with kernels of our own; the result has the type of the values."""
    exact = value if value.dtype in (torch.bfloat16, torch.float16) else value.float()
    sizes = [size for shape in shapes for size in shape]
    assert value.shape[1] == sum(height * width for height, width in shapes)
    sampled: Tensor = _sample(exact, sizes, locations.float(), weights.float())
    return sampled.to(value.dtype)


@triton.jit
def _pixel(place, SIZE: tl.constexpr):
    """Index of the pixel before each place in [0, 1], -1 to SIZE, the distance from its centre, and 1 where it moves.

    Everything beyond the border is zero: points farther out are moved onto it, where their gradient is zero. The
    distance of NaN is NaN and shows in the result.
    """
    at = place * SIZE - 0.5
    moves = (at >= -1.0) & (at <= SIZE)
    at = tl.where(at < -1.0, -1.0, at)
    at = tl.where(at > SIZE, SIZE * 1.0, at)
    low = tl.floor(at)
    return tl.where(at == at, low, -1.0).to(tl.int32), at - low, moves


@triton.jit
def _points(locations, first, in_block, LEVEL: tl.constexpr, POINTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows of the points of a level in the table of points, which of them there are, and their places x and y."""
    point = tl.arange(0, BLOCK_P)[None, :]
    there = in_block & (point < POINTS)
    row = first + (LEVEL * POINTS + point)
    across = tl.load(locations + row * 2, mask=there, other=0.0)
    along = tl.load(locations + row * 2 + 1, mask=there, other=0.0)
    return row, there, across, along


@triton.jit
def _corner(
    start,
    line,
    column,
    there,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Places (queries, points, channels) of a corner of each point in the values, and which of them are on the map."""
    channel = tl.arange(0, BLOCK_D)[None, None, :]
    inside = there & (line >= 0) & (line < HEIGHT) & (column >= 0) & (column < WIDTH)
    place = (start + line * WIDTH + column) * STRIDE
    mask = inside[:, :, None]
    if BLOCK_D != CHANNELS:
        mask = mask & (channel < CHANNELS)
    return place[:, :, None] + channel, mask


@triton.jit(do_not_specialize=["queries", "tokens"])
def _forward_kernel(
    values, locations, weights, sampled, queries, tokens,
    SIZES: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    image = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // HEADS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_block = (query < queries)[:, None]
    stride: tl.constexpr = HEADS * CHANNELS
    per_head: tl.constexpr = len(SIZES) * POINTS
    values += image * tokens * stride + head * CHANNELS
    locations += image * queries * (HEADS * per_head * 2)
    weights += image * queries * (HEADS * per_head)
    first = ((query * HEADS + head) * per_head)[:, None]
    total = tl.zeros((BLOCK_Q, BLOCK_P, BLOCK_D), tl.float32)
    start = 0
    for level in tl.static_range(len(SIZES)):
        row, there, across, along = _points(locations, first, in_block, level, POINTS, BLOCK_P)
        weight = tl.load(weights + row, mask=there, other=0.0)
        column, right, _ = _pixel(across, SIZES[level][1])
        line, down, _ = _pixel(along, SIZES[level][0])
        for corner in tl.static_range(4):
            of_line = down if corner // 2 == 1 else 1.0 - down
            of_column = right if corner % 2 == 1 else 1.0 - right
            place, mask = _corner(
                start, line + corner // 2, column + corner % 2, there,
                SIZES[level][0], SIZES[level][1], stride, CHANNELS, BLOCK_D,
            )  # fmt: skip
            value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
            total += (weight * of_line * of_column)[:, :, None] * value
        start += SIZES[level][0] * SIZES[level][1]
    channel = tl.arange(0, BLOCK_D)[None, :]
    place = (query * stride + head * CHANNELS)[:, None] + channel
    sampled += image * queries * stride
    result = tl.sum(total, axis=1).to(sampled.dtype.element_ty)
    tl.store(sampled + place, result, mask=in_block & (channel < CHANNELS))


@triton.jit(do_not_specialize=["queries", "tokens"])
def _backward_kernel(
    gradient, values, locations, weights, of_values, of_locations, of_weights, queries, tokens,
    SIZES: tl.constexpr, DENSE_PIXELS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    POINTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of locations and weights, and of the values of levels of more than DENSE_PIXELS pixels."""
    head = tl.program_id(0) % HEADS
    image = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // HEADS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_block = (query < queries)[:, None]
    stride: tl.constexpr = HEADS * CHANNELS
    per_head: tl.constexpr = len(SIZES) * POINTS
    values += image * tokens * stride + head * CHANNELS
    of_values += image * tokens * stride + head * CHANNELS
    locations += image * queries * (HEADS * per_head * 2)
    of_locations += image * queries * (HEADS * per_head * 2)
    weights += image * queries * (HEADS * per_head)
    of_weights += image * queries * (HEADS * per_head)
    first = ((query * HEADS + head) * per_head)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    gradient += image * queries * stride + head * CHANNELS
    in_gradient = in_block & (channel < CHANNELS)
    slope = tl.load(gradient + (query * stride)[:, None] + channel, mask=in_gradient, other=0.0).to(tl.float32)
    slope = slope[:, None, :]
    start = 0
    for level in tl.static_range(len(SIZES)):
        row, there, across, along = _points(locations, first, in_block, level, POINTS, BLOCK_P)
        weight = tl.load(weights + row, mask=there, other=0.0)
        column, right, moves_across = _pixel(across, SIZES[level][1])
        line, down, moves_along = _pixel(along, SIZES[level][0])
        of_weight = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        to_right = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        to_below = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        for corner in tl.static_range(4):
            of_line = down if corner // 2 == 1 else 1.0 - down
            of_column = right if corner % 2 == 1 else 1.0 - right
            place, mask = _corner(
                start, line + corner // 2, column + corner % 2, there,
                SIZES[level][0], SIZES[level][1], stride, CHANNELS, BLOCK_D,
            )  # fmt: skip
            value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
            product = tl.sum(value * slope, axis=2)
            of_weight += of_line * of_column * product
            to_right += of_line * product if corner % 2 == 1 else -of_line * product
            to_below += of_column * product if corner // 2 == 1 else -of_column * product
            if SIZES[level][0] * SIZES[level][1] > DENSE_PIXELS:
                added = (weight * of_line * of_column)[:, :, None] * slope
                tl.atomic_add(of_values + place, added, mask=mask, sem="relaxed")
        to_right = tl.where(moves_across, to_right * weight * SIZES[level][1], 0.0)
        to_below = tl.where(moves_along, to_below * weight * SIZES[level][0], 0.0)
        tl.store(of_weights + row, of_weight, mask=there)
        tl.store(of_locations + row * 2, to_right, mask=there)
        tl.store(of_locations + row * 2 + 1, to_below, mask=there)
        start += SIZES[level][0] * SIZES[level][1]


@triton.jit(do_not_specialize=["queries", "tokens", "start"])
def _gather_kernel(
    gradient, locations, weights, of_values, queries, tokens, start,
    LEVEL: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    POINTS: tl.constexpr, PER_HEAD: tl.constexpr, PER_PROGRAM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the values of one level, for a tile of its pixels, from some of the queries."""
    head = tl.program_id(0) % HEADS
    image = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // HEADS * BLOCK_T + tl.arange(0, BLOCK_T)
    line = (tile // WIDTH).to(tl.float32)[:, None]
    column = (tile % WIDTH).to(tl.float32)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    stride: tl.constexpr = HEADS * CHANNELS
    gradient += image * queries * stride + head * CHANNELS
    locations += image * queries * (HEADS * PER_HEAD * 2)
    weights += image * queries * (HEADS * PER_HEAD)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    begin = tl.program_id(2) * PER_PROGRAM
    for block in range(begin, min(begin + PER_PROGRAM, queries), BLOCK_Q):
        query = block + tl.arange(0, BLOCK_Q)
        there = query < queries
        row = (query * HEADS + head) * PER_HEAD + LEVEL * POINTS
        shares = tl.zeros((BLOCK_T, BLOCK_Q), tl.float32)
        for point in tl.static_range(POINTS):
            weight = tl.load(weights + row + point, mask=there, other=0.0)
            across = tl.load(locations + (row + point) * 2, mask=there, other=0.0) * WIDTH - 0.5
            along = tl.load(locations + (row + point) * 2 + 1, mask=there, other=0.0) * HEIGHT - 0.5
            of_column = tl.maximum(1.0 - tl.abs(column - across[None, :]), 0.0)
            of_line = tl.maximum(1.0 - tl.abs(line - along[None, :]), 0.0)
            shares += weight[None, :] * of_line * of_column
        in_gradient = there[:, None] & (channel < CHANNELS)
        slope = tl.load(gradient + (query * stride)[:, None] + channel, mask=in_gradient, other=0.0).to(tl.float32)
        total = tl.dot(shares, slope, total, input_precision="tf32x3")
    of_values += image * tokens * stride + head * CHANNELS
    place = ((start + tile) * stride)[:, None] + channel
    tl.atomic_add(of_values + place, total, mask=(tile < HEIGHT * WIDTH)[:, None] & (channel < CHANNELS), sem="relaxed")


@torch.library.custom_op("celldetr::sample_points", mutates_args=())
def _sample(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample; `sizes` are heights and widths of the levels in turn, locations and weights are float32."""
    sampled = _result_like(value, sizes, locations, weights)
    batch, tokens, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    if 0 in (sampled.numel(), tokens):
        return sampled.zero_()
    blocks = _blocks(points, channels)
    grid = (heads * triton.cdiv(queries, blocks["BLOCK_Q"]), batch)
    with torch.cuda.device_of(value):
        _forward_kernel[grid](
            *(x.contiguous() for x in (value, locations, weights)), sampled, queries, tokens,
            SIZES=_pairs(sizes), HEADS=heads, CHANNELS=channels, POINTS=points, num_warps=4, **blocks,
        )  # fmt: skip
    return sampled


@torch.library.custom_op("celldetr::sample_points_backward", mutates_args=())
def _sample_backward(
    gradient: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, dense_pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, all in float32."""
    of_value = value.new_zeros(value.shape, dtype=torch.float32)
    of_locations, of_weights = (x.new_empty(x.shape) for x in (locations, weights))
    batch, tokens, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    if 0 in (gradient.numel(), tokens):
        return of_value, of_locations.zero_(), of_weights.zero_()
    gradient, value, locations, weights = (x.contiguous() for x in (gradient, value, locations, weights))
    shapes, per_head, blocks = _pairs(sizes), len(sizes) // 2 * points, _blocks(points, channels)
    dense_pixels = dense_pixels if channels <= _MOST_GATHERED_CHANNELS else 0
    shared = {"HEADS": heads, "CHANNELS": channels, "POINTS": points, "num_warps": 4}
    parts = triton.cdiv(queries, _QUERIES_PER_PROGRAM)
    with torch.cuda.device_of(value):
        _backward_kernel[(heads * triton.cdiv(queries, blocks["BLOCK_Q"]), batch)](
            gradient, value, locations, weights, of_value, of_locations, of_weights, queries, tokens,
            SIZES=shapes, DENSE_PIXELS=dense_pixels, **blocks, **shared,
        )  # fmt: skip
        start = 0
        for level, (height, width) in enumerate(shapes):
            if height * width <= dense_pixels:
                pixels = min(_PIXELS, max(16, _power(height * width)))
                _gather_kernel[(heads * triton.cdiv(height * width, pixels), batch, parts)](
                    gradient, locations, weights, of_value, queries, tokens, start,
                    LEVEL=level, HEIGHT=height, WIDTH=width, PER_HEAD=per_head, PER_PROGRAM=_QUERIES_PER_PROGRAM,
                    BLOCK_T=pixels, BLOCK_Q=_GATHERED_QUERIES, BLOCK_D=max(16, _power(channels)), **shared,
                )  # fmt: skip
            start += height * width
    return of_value, of_locations, of_weights


def _blocks(points: int, channels: int) -> dict[str, int]:
    """Return the queries, points and channels of a tile, powers of two: it stays in the registers of 4 warps."""
    of_points, of_channels = _power(points), _power(channels)
    return {"BLOCK_Q": max(1, _TILE // (of_points * of_channels)), "BLOCK_P": of_points, "BLOCK_D": of_channels}


def _power(number: int) -> int:
    return int(triton.next_power_of_2(number))


def _pairs(sizes: Sequence[int]) -> Shapes:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


@_sample.register_fake
def _result_like(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@_sample_backward.register_fake
def _(
    gradient: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, dense_pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    of_value = value.new_empty(value.shape, dtype=torch.float32)
    return of_value, locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    of_value, *others = _sample_backward(gradient, value, ctx.sizes, locations, weights, DENSE_PIXELS)
    return of_value.to(value.dtype), None, others[0], others[1]


_sample.register_autograd(_backward, setup_context=_keep)
