"""Moving average of the weights: what validates and is kept, while the weights themselves train."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of what trains in a model (Polyak averaging; Tarvainen and Valpola, NeurIPS 2017).

    Parameters
    ----------
    model
        Model on its device.
    decay
        Share of the average that a step keeps; less in the first steps, so that the average leaves the initial weights.
    weights
        Average to go on from; none: the weights as they are.
    """

    def __init__(self, model: nn.Module, decay: float, weights: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self._training = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights = {name: weight.detach().clone() for name, weight in self._training.items()}
        for name, weight in (weights or {}).items():
            self.weights[name].copy_(weight)

    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, step / (step + 9))
        training = [weight.detach() for weight in self._training.values()]
        torch._foreach_lerp_(list(self.weights.values()), training, 1 - decay)

    def swap(self) -> None:
        """Exchange the average and the weights that train."""
        with torch.no_grad():
            for name, weight in self._training.items():
                kept = weight.detach().clone()
                weight.copy_(self.weights[name])
                self.weights[name].copy_(kept)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
