"""Deformable attention: where it looks for points, boxes and constrained boxes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import small_settings

from celldetr.model.deformable_attention import DeformableAttention

SHAPES = ((8, 8), (4, 4))
TOKENS = 80


def make(heads, levels, points, constrained, offset_init):
    settings = small_settings("parallel", d_model=16, heads=heads, points=points, offset_init=offset_init)
    return DeformableAttention(settings, levels, constrained=constrained)


def attention(constrained=False, seed=0, scale=3.0, offset_init="authors"):
    """Return a layer whose offsets and weights depend on the query."""
    torch.manual_seed(seed)
    layer = make(4, 2, 3, constrained, offset_init)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=scale)
    torch.nn.init.normal_(layer.attention_weights.weight)
    return layer.eval()


def inputs(queries=6, seed=0, numbers=4):
    generator = torch.Generator().manual_seed(seed)
    query, memory = torch.randn(2, queries, 16, generator=generator), torch.randn(2, TOKENS, 16, generator=generator)
    return query, torch.rand(2, queries, numbers, generator=generator), memory


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 1e4]), init=st.sampled_from(["authors", "spread"]))
def test_constrained_points_stay_inside_the_box(seed, scale, init):
    layer = attention(True, seed, scale, offset_init=init)
    query, boxes, memory = inputs(seed=seed)
    boxes[:, 0, 2:] = 0  # a box without size is looked at in its centre
    _, points = layer(query, boxes, memory, SHAPES)
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    place = points.locations.detach()
    low, high = (centre - half)[:, :, None, None, None], (centre + half)[:, :, None, None, None]
    assert (place >= low - 1e-6).all()
    assert (place <= high + 1e-6).all()


def test_references_are_scaled_as_in_the_equations():
    layer = attention()
    query, boxes, memory = inputs()
    offsets = layer.sampling_offsets(query).view(2, 6, 4, 2, 3, 2)
    _, points = layer(query, boxes, memory, SHAPES)
    expected = boxes[:, :, None, None, None, :2] + offsets / 3 * 0.5 * boxes[:, :, None, None, None, 2:]
    torch.testing.assert_close(points.locations, expected)
    _, points = layer(query, boxes[..., :2], memory, SHAPES)
    size = torch.tensor([[8.0, 8.0], [4.0, 4.0]])[:, None]
    torch.testing.assert_close(points.locations, boxes[:, :, None, None, None, :2] + offsets / size)
    torch.testing.assert_close(points.weights.sum(dim=(-2, -1)), torch.ones(2, 6, 4))


@pytest.mark.parametrize(
    ("init", "distances"),
    [("authors", [math.tanh(k) for k in (1, 2, 3, 4)]), ("spread", [1 / 8, 3 / 8, 5 / 8, 7 / 8])],
)
def test_where_constrained_attention_starts(init, distances):
    layer = make(8, 1, 4, True, init)
    box = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
    _, points = layer(torch.randn(1, 1, 16), box, torch.randn(1, 64, 16), ((8, 8),))
    place = (points.locations[0, 0, :, 0] - 0.5) * 2  # (H, P, 2), in halves of the box
    torch.testing.assert_close(place[0], torch.tensor([[d, 0.0] for d in distances]), atol=1e-5, rtol=0)
    for head in range(8):
        angle = torch.atan2(place[head, :, 1], place[head, :, 0]) % (2 * math.pi)
        torch.testing.assert_close(angle, torch.full((4,), 2 * math.pi * head / 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(points.weights, torch.full_like(points.weights, 1 / 4))


def test_unconstrained_layers_start_like_deformable_detr():
    layer = make(8, 2, 4, False, "spread")
    bias = layer.sampling_offsets.bias.view(8, 2, 4, 2)
    torch.testing.assert_close(bias[0, :, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 4))


def test_queries_are_independent_and_ordered():
    layer = attention(True)
    query, boxes, memory = inputs()
    whole, _ = layer(query, boxes, memory, SHAPES)
    for order in (torch.tensor([5, 0, 3, 1, 2, 4]), torch.tensor([2])):
        some, _ = layer(query[:, order], boxes[:, order], memory, SHAPES)
        torch.testing.assert_close(some, whole[:, order])


def test_points_stay_exact_under_autocast():
    layer = attention(True)
    _, exact = layer(*inputs(), SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        result, points = layer(*inputs(), SHAPES)
    assert result.dtype == torch.bfloat16
    assert torch.equal(points.locations, exact.locations)
    assert points.weights.dtype == torch.float32
