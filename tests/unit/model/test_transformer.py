"""Position code, reference points, and the activation of the feed-forward layers."""

import math

import pytest
import torch

from celldetr.model.device import call_cast
from celldetr.model.transformer import FeedForward, reference_grid, relu_dropout, sine_code


def test_position_code_follows_its_formula():
    code = sine_code((3, 5), 16, 0.5, torch.device("cpu")).view(3, 5, 16)
    row, column = 2, 1
    for half, index, size in ((0, row, 3), (8, column, 5)):
        angle = 2 * math.pi * (index + 1 - 0.5) / (size + 1e-6)
        for feature in range(8):
            function = math.sin if feature % 2 == 0 else math.cos
            expected = function(angle / 10_000 ** (2 * (feature // 2) / 8))
            assert code[row, column, half + feature].item() == pytest.approx(expected, abs=1e-6)


def test_reference_grid_holds_pixel_centres_rows_first():
    grid = reference_grid(((2, 4), (1, 1)), torch.device("cpu"))
    torch.testing.assert_close(
        grid[:5], torch.tensor([[0.125, 0.25], [0.375, 0.25], [0.625, 0.25], [0.875, 0.25], [0.125, 0.75]])
    )
    torch.testing.assert_close(grid[-1], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_relu_and_dropout_together_are_relu_then_dropout(p):
    x = torch.randn(7, 50, dtype=torch.float64)
    first, second = (x.clone().requires_grad_() for _ in range(2))
    torch.manual_seed(2)
    together = relu_dropout(first * 1, p)
    torch.manual_seed(2)
    apart = torch.nn.functional.dropout(torch.relu(second * 1), p)
    torch.testing.assert_close(together, apart)
    weights = torch.randn_like(x)
    (together * weights).sum().backward()
    (apart * weights).sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("half", [False, True])
def test_the_feed_forward_layer_predicts_what_it_computes_in_training(half):
    layer, x = FeedForward(8, 16, dropout=0.3).eval(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = call_cast(layer, x)
        with torch.no_grad():
            predicted = call_cast(layer, x)
    assert expected.requires_grad
    torch.testing.assert_close(predicted, expected.detach(), rtol=0, atol=0)
    assert (layer.linear1(x) < 0).any()
