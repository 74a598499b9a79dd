"""A test fold without images, and detections with planted scores, for the tests of evaluation and report."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from celldetr.evaluation.predictions import Predictions

CLASSES = ("neoplastic", "inflammatory", "connective")


@dataclass(frozen=True)
class Fold:
    """What scoring reads of a patch store; 12 px are 3 um."""

    box_ptr: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    centroids: np.ndarray
    classes: tuple = CLASSES
    mpp: float = 0.25
    digest: str = "d1"
    path: Path = Path("fold2.zarr")
    maps: np.ndarray | None = None
    tissues: tuple = ()

    @property
    def n_patches(self):
        return len(self.box_ptr) - 1

    @property
    def has_instances(self):
        """Whether it has instance maps."""
        return self.maps is not None

    @property
    def patch_size(self):
        """Side of a patch."""
        return self.maps.shape[1]

    def instances(self, indices):
        """Instance maps of patches."""
        return self.maps[indices]

    @property
    def patches(self):
        """Tissue of each patch."""
        return pd.DataFrame({"tissue": np.array(self.tissues, dtype=object)})

    @property
    def patch(self):
        """Patch of each nucleus."""
        return np.repeat(np.arange(self.n_patches), np.diff(self.box_ptr))


def detections(patch, boxes, labels, n_patches, *, nucleus=0.9, best=0.8, classes=CLASSES, **metadata):
    """Make detections with a score of `best` for their label and 0.1 for the other classes."""
    scores = np.full((len(patch), len(classes)), 0.1, dtype=np.float32)
    scores[np.arange(len(patch)), np.asarray(labels, dtype=int)] = best
    return Predictions(
        patch=np.asarray(patch, dtype=np.int32),
        query=np.arange(len(patch), dtype=np.int16),
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        nucleus_score=np.broadcast_to(np.float32(nucleus), (len(patch),)),
        class_scores=scores,
        classes=classes,
        n_patches=n_patches,
        metadata={"nucleus_threshold": 0.4, "mode": "parallel", "store_digest": "d1", "test_store": "fold2"} | metadata,
    )
