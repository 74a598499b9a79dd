"""What evaluation reads of a patch store."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TruthStore(Protocol):
    """What evaluation reads of a patch store (`celldetr.store.PatchStore`)."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in order."""

    @property
    def n_patches(self) -> int:
        """Number of patches N."""

    @property
    def box_ptr(self) -> NDArray[np.int64]:
        """Offsets (N + 1,)."""

    @property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes (M, 4), xyxy px, half-open."""

    @property
    def labels(self) -> NDArray[np.int8]:
        """Labels (M,), -1 = unlabelled."""

    @property
    def centroids(self) -> NDArray[np.float32]:
        """Mask centroids (M, 2), x then y, px; NaN = unknown."""
