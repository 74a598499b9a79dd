"""The evaluator of validation and test: which detections count, and how they pair with the truth.

Training depends on this module, not on `celldetr.evaluation.scoring`: the look of the scores retrains nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.metrics import count_images

SEGMENTATION = "segmentation"
"""Mode of a system that segments nuclei."""


@dataclass(frozen=True)
class Evaluator:
    """Counts the detections of a model against the truth.

    In mode ``baseline`` the detection decoder classifies, so that the nucleus score is the largest class score: it does
    not enter a product again. In mode ``segmentation`` every detection counts: the post-processing of such a system has
    decided already, and its scores are no probabilities that the thresholds of CellDETR would fit.
    """

    settings: ScoringSettings
    mpp: float  # of the patches, um per px
    mode: str  # of the model

    @property
    def radius(self) -> float:
        """Largest distance of a pair, px."""
        return self.settings.radius_um / self.mpp

    def keep(self, nucleus_score: NDArray[np.floating], class_scores: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Return which detections (D,) count, by nucleus scores (D,) and class scores (D, K).

        Without classes (K = 0) the nucleus score alone decides.
        """
        settings = self.settings
        if self.mode == SEGMENTATION:
            return np.ones(len(nucleus_score), dtype=np.bool_)
        if not class_scores.shape[1]:
            return nucleus_score >= settings.nucleus_threshold
        best = class_scores.max(axis=1)
        if settings.score == "class" or (settings.score == "product" and self.mode == "baseline"):
            return best >= settings.class_threshold
        if settings.score == "product":
            return nucleus_score * best >= settings.class_threshold
        return (nucleus_score >= settings.nucleus_threshold) & (best >= settings.class_threshold)

    def count(
        self, truth: NucleusCentres, predicted: NucleusCentres, n_classes: int, metric: str = "strict"
    ) -> NDArray[np.int64]:
        """Pair the nuclei and count them per image (N, 1 + n_classes, len(COUNTS)), see `count_images`."""
        pairs = pair_nuclei(truth, predicted, self.radius)
        return count_images(truth, predicted, pairs, n_classes, metric=metric, radius=self.radius)
