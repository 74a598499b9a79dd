"""Layers whose insides are computed again in the backward pass instead of being kept for it."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A part of the model that can keep only what enters each of its layers.

    Attributes
    ----------
    recompute
        Whether it does: the same gradients with less memory and more time.
    """

    recompute = False

    def run(self, layer: nn.Module, *given: Any, **named: Any) -> Any:
        """Call a layer."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *given, use_reentrant=False, **named)
        return layer(*given, **named)


def use_recompute(model: nn.Module, recompute: bool) -> None:
    """Let all parts of a model that can recompute their layers do so, or not."""
    for part in model.modules():
        if isinstance(part, Recomputing):
            part.recompute = recompute
