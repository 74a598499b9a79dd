"""What every segmentation system is: a network, its loss, and the way from its outputs to nuclei."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from celldetr.config.segmentation import SystemSettings


class Truth(NamedTuple):
    """The nuclei of B images, on the device of the network."""

    instances: Tensor
    """(B, S, S) int64: 0 background, k the k-th nucleus of the image."""
    labels: Tensor
    """(B, R) int64: class of each nucleus; -1 at padding."""
    tissues: Tensor
    """(B,) int64: index into the tissues of the settings; -1 unknown."""

    @property
    def classes(self) -> Tensor:
        """Class of each pixel (B, S, S) int64: 0 background, 1 + class."""
        by_instance = nn.functional.pad(self.labels + 1, (1, 0))
        return by_instance.gather(1, self.instances.flatten(1)).view_as(self.instances)


class SegmentedNuclei(NamedTuple):
    """The n nuclei that a system finds in one image."""

    boxes: NDArray[np.float32]
    """Of the masks, (n, 4) xyxy px, half-open."""
    masks: Sequence[NDArray[np.bool_]]
    """Pixels of each nucleus in its box (h, w)."""
    nucleus_score: NDArray[np.float32]
    """How certain the system is of the nucleus, (n,) in [0, 1]."""
    class_scores: NDArray[np.float32]
    """(n, K) in [0, 1]; the class of a nucleus is the largest."""


class System(nn.Module, ABC):
    """A network that segments and classifies nuclei."""

    encoder: ClassVar[str]
    """Name of the submodule that may start from pretrained weights, and be frozen in the first epochs; "": none."""

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__()
        self.settings = settings
        self.epoch = 1
        """Epoch of the training, from 1, which the training sets; weights of losses may change with it."""

    @abstractmethod
    def losses(self, images: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Weighted losses, whose sum trains the system; images (B, 3, S, S) in [0, 1], in training mode."""

    @abstractmethod
    def segment(self, images: Tensor) -> list[SegmentedNuclei]:
        """Nuclei of images (B, 3, S, S) in [0, 1], in evaluation mode, without gradients."""

    @abstractmethod
    def load_pretrained(self, path: Path) -> list[str]:
        """Take over published weights; return the names of the tensors that keep their random values.

        Raises
        ------
        InputError
            The file does not fit.
        """
