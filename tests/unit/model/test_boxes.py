"""Boxes: formats, overlap also of boxes without area, and the noise of the paper's appendix."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.model import boxes

PAPER = {"low": 0.1, "high": 0.4, "enlarge": 0.5}


def draw(count=200, seed=0, least=1e-3):
    """Return boxes (count, 4) cxcywh that lie in the image."""
    numbers = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    size = least + (1 - least) * numbers[:, 2:] ** 3
    return torch.cat([size / 2 + numbers[:, :2] * (1 - size), size], dim=1)


def noised(original, seed=0, **options):
    uniforms = torch.rand(len(original), boxes.NOISE_DRAWS, generator=torch.Generator().manual_seed(seed))
    return boxes.noise(original, uniforms, **(PAPER | options))


def test_formats_are_inverse_to_each_other_and_at_least_float32():
    corners = torch.tensor([[0.1, 0.2, 0.5, 0.4]])
    torch.testing.assert_close(boxes.xyxy_to_cxcywh(corners), torch.tensor([[0.3, 0.3, 0.4, 0.2]]))
    many = draw()
    torch.testing.assert_close(boxes.xyxy_to_cxcywh(boxes.cxcywh_to_xyxy(many)), many, atol=1e-6, rtol=0)
    half = many.bfloat16()
    for converted in (boxes.cxcywh_to_xyxy(half), boxes.xyxy_to_cxcywh(half), boxes.giou(half, half)):
        assert converted.dtype == torch.float32
    assert boxes.cxcywh_to_xyxy(half.double()).dtype == torch.float64


def test_pairs_are_all_single_comparisons():
    first, second = (boxes.cxcywh_to_xyxy(draw(n, seed=n)) for n in (5, 7))
    table = boxes.pairwise_giou(first, second)
    for i in range(5):
        assert torch.equal(table[i], boxes.giou(first[i].expand(7, 4), second))
    assert boxes.pairwise_giou(first, second[:0]).shape == (5, 0)


CORNERS = st.lists(st.integers(0, 8), min_size=4, max_size=4)


@settings(max_examples=100, deadline=None)
@given(first=CORNERS, second=CORNERS)
def test_overlap_is_that_of_counted_pixels(first, second):
    drawn = [[min(x, z), min(y, t), max(x, z), max(y, t)] for x, y, z, t in (first, second)]
    pixels = np.zeros((3, 8, 8), bool)
    for grid, (x, y, z, t) in zip(pixels, drawn, strict=False):
        grid[y:t, x:z] = True
    low, high = np.minimum(*drawn)[:2], np.maximum(*drawn)[2:]
    pixels[2, low[1] : high[1], low[0] : high[0]] = True
    both, union, hull = (pixels[0] & pixels[1]).sum(), (pixels[0] | pixels[1]).sum(), pixels[2].sum()
    expected = both / max(union, 1) - (hull - union) / max(hull, 1)
    a, b = torch.tensor(drawn, dtype=torch.float32)
    assert float(boxes.giou(a, b)) == float(boxes.giou(b, a)) == pytest.approx(expected, abs=1e-6)


POINT, OTHER, LINE, SQUARE = [0.5] * 4, [0.7] * 4, [0.2, 0.5, 0.8, 0.5], [0.4, 0.4, 0.6, 0.6]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(POINT, POINT, 0), (POINT, OTHER, -1), (LINE, LINE, 0), (POINT, LINE, 0), (POINT, SQUARE, 0), (SQUARE, SQUARE, 1)],
)
def test_boxes_without_area_have_finite_overlap_and_gradient(first, second, expected):
    leaf = torch.tensor([first], requires_grad=True)
    value = boxes.giou(leaf, torch.tensor([second]))
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(expected)
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() < 1e3
    broken = torch.tensor([[*first[:3], float("nan")]])
    assert boxes.giou(broken, torch.tensor([second])).isnan().all()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    limits=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
    enlarge=st.floats(0, 1),
    least=st.sampled_from([1e-5, 1e-3, 0.3]),
)
def test_noised_boxes_lie_in_the_image_with_their_centre_in_the_original_box(seed, limits, enlarge, least):
    original = draw(200, seed, least=least)
    result = noised(original, seed, low=limits[0], high=limits[1], enlarge=enlarge)
    corners = boxes.cxcywh_to_xyxy(result)
    assert (result[:, 2:] > 0).all()
    assert ((corners >= -1e-5) & (corners <= 1 + 1e-5)).all()
    assert ((result[:, :2] - original[:, :2]).abs() <= original[:, 2:] / 2 + 1e-6).all()


def test_sizes_and_shifts_follow_the_equations():
    original = torch.tensor([[0.5, 0.5, 0.1, 0.2]]).expand(20_000, 4)
    result = noised(original, enlarge=0.3)
    ratio = result[:, 2:] / original[:, 2:] - 1
    shift = (result[:, :2] - original[:, :2]) / (original[:, 2:] / 2)
    for change in (*ratio.unbind(1), *shift.unbind(1)):
        assert change.abs().min() > 0.1 - 1e-4
        assert change.abs().max() < 0.4 + 1e-4
        assert change.abs().mean().item() == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close((ratio > 0).float().mean(0), torch.tensor([0.3, 0.3]), atol=0.015, rtol=0)
    torch.testing.assert_close((shift > 0).float().mean(0), torch.tensor([0.5, 0.5]), atol=0.015, rtol=0)
    together = torch.corrcoef(torch.cat([ratio, shift], dim=1).T) - torch.eye(4)
    assert together.abs().max() < 4 / math.sqrt(20_000)


def test_share_is_the_part_of_boxes_that_change():
    original = draw(5000, least=0.05)
    changed = (noised(original, share=0.6) != original).any(dim=1).float().mean().item()
    assert changed == pytest.approx(0.6, abs=0.03)
    assert torch.equal(noised(original, share=0.0), original)


def test_noise_of_a_batch_is_the_noise_of_its_parts():
    original = draw(100)
    uniforms = torch.rand(100, boxes.NOISE_DRAWS, generator=torch.Generator().manual_seed(3))
    whole = boxes.noise(original.view(4, 25, 4), uniforms.view(4, 25, -1), **PAPER)
    parts = [boxes.noise(original[part], uniforms[part], **PAPER) for part in (slice(0, 30), slice(30, 100))]
    assert torch.equal(whole.view(100, 4), torch.cat(parts))
    assert noised(torch.zeros(0, 4)).shape == (0, 4)
