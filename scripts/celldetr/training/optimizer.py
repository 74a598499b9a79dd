"""Optimiser and learning rates of a run."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from celldetr.config.experiment import TrainingSettings


def make_optimizer(model: nn.Module, settings: TrainingSettings, encoder: str = "backbone") -> Optimizer:
    """AdamW over the parameters that train; the encoder, a part of the model, has its own learning rate."""
    groups = parameter_groups(model, settings, encoder)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def parameter_groups(model: nn.Module, settings: TrainingSettings, encoder: str) -> list[dict[str, Any]]:
    """Return the parameters that train with their learning rates: the encoder's apart from the others'."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    slow = [parameter for name, parameter in named if name.startswith(f"{encoder}.")]
    rest = [parameter for name, parameter in named if not name.startswith(f"{encoder}.")]
    rates = ((rest, settings.lr), (slow, settings.backbone_lr))
    return [{"params": parameters, "lr": rate, "base_lr": rate} for parameters, rate in rates if parameters]


def learning_rate_factor(step: int, total: int, settings: TrainingSettings) -> float:
    """Factor of the learning rates at a step: linear warm-up, then cosine to 0 at step `total`."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.warmup_from + (1 - settings.warmup_from) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
