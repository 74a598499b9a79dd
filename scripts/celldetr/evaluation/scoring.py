"""The evaluator of validation and test, and the scores of one experiment on one split as one long table."""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.intervals import intervals
from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, METRICS, count_images, row_names, scores
from celldetr.evaluation.predictions import Predictions
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic
from celldetr.store import PatchStore

MISSING = "NA"
VALUES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Evaluator:
    """Which detections count, and how they pair with the truth: one for validation and test.

    Attributes
    ----------
    settings
        Score rule, thresholds and radius.
    mpp
        Resolution of the patches, um per px.
    mode
        Mode of the model. In mode ``baseline`` the detection decoder classifies, so that the nucleus score is the
        largest class score: it does not enter a product again.
    """

    settings: ScoringSettings
    mpp: float
    mode: str

    @property
    def radius(self) -> float:
        """Largest distance of a pair, px."""
        return self.settings.radius_um / self.mpp

    def keep(self, nucleus_score: NDArray[np.floating], class_scores: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Return which detections (D,) count, by nucleus scores (D,) and class scores (D, K).

        Without classes (K = 0) the nucleus score alone decides.
        """
        settings = self.settings
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


def truth_nuclei(store: PatchStore, centres: str = "box") -> NucleusCentres:
    """Return all true nuclei of a store; none is rounded, shifted or dropped.

    Parameters
    ----------
    store
        Patch store of the test fold.
    centres
        ``box``: centre of the box; ``mask``: centroid of the annotated mask.

    Raises
    ------
    InputError
        Mask centres are asked for and the store lacks some of them.
    """
    if centres == "box":
        boxes = np.asarray(store.boxes, dtype=np.float64)
        points = (boxes[:, :2] + boxes[:, 2:]) / 2
    else:
        points = np.asarray(store.centroids, dtype=np.float64)
        unknown = int((~np.isfinite(points)).any(axis=1).sum())
        if unknown:
            raise InputError(
                f"evaluation.centres: got mask, but {unknown} of {len(points)} nuclei of the test store have no mask "
                "centroid; use centres: box, or convert the data with masks"
            )
    return NucleusCentres(np.asarray(store.box_ptr, dtype=np.int64), points, np.asarray(store.labels))


def predicted_nuclei(predictions: Predictions) -> NucleusCentres:
    """Return centres and labels of detections, image by image."""
    return NucleusCentres(predictions.ptr, predictions.centres, predictions.labels)


def score_fold(
    predictions: Predictions,
    store: PatchStore,
    settings: ScoringSettings,
    *,
    centres: str = "box",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score the predictions of a test fold with both metrics.

    Parameters
    ----------
    predictions
        All detections of the fold.
    store
        Patch store of the test fold.
    settings
        Which detections count, and the largest distance of a pair.
    centres
        Centres of the true nuclei, see `truth_nuclei`. The centre of a prediction is always that of its box.
    resamples, seed
        Bootstrap, see `celldetr.evaluation.intervals.intervals`.

    Returns
    -------
    DataFrame
        One row per metric and class: ``metric``, ``class``, each of `VALUES` with ``_lo`` and ``_hi``, the counts of
        `celldetr.evaluation.metrics.COUNTS`, ``absent`` (the model has no such class), ``images``, and the settings of
        the scoring. True nuclei of an absent class count as unlabelled: the model cannot find the class (paper, 4.4).

    Raises
    ------
    InputError
        The predictions were made on another store.
    ConfigError
        Detections that would count were not written.
    """
    predictions.check_store(store.classes, store.n_patches)
    metadata = predictions.metadata
    if settings.nucleus_threshold < metadata["nucleus_threshold"]:
        raise ConfigError(
            f"nucleus_threshold: got {settings.nucleus_threshold}, but the predictions hold only nucleus scores of at "
            f"least {metadata['nucleus_threshold']}; lower inference.nucleus_threshold and predict again"
        )
    evaluator = Evaluator(settings, store.mpp, metadata["mode"])
    kept = predictions.select(evaluator.keep(predictions.nucleus_score, predictions.class_scores))
    truth, predicted = truth_nuclei(store, centres), predicted_nuclei(kept)
    absent = [name in metadata.get("absent", []) for name in store.classes]
    truth = replace(truth, labels=np.where(np.isin(truth.labels, np.flatnonzero(absent)), -1, truth.labels))
    common: dict[str, Any] = {
        "absent": [False, *absent],
        "images": store.n_patches,
        "score_rule": settings.score,
        "nucleus_threshold": settings.nucleus_threshold,
        "class_threshold": settings.class_threshold,
        "radius": evaluator.radius,
        "centres": centres,
        "resamples": resamples,
    }
    frames = []
    for metric in METRICS:
        counts = evaluator.count(truth, predicted, len(store.classes), metric)
        ends = intervals(counts, metric, resamples=resamples, seed=seed)
        total = counts.sum(axis=0)
        columns: dict[str, Any] = {"metric": metric, "class": row_names(store.classes)}
        for name, value, low, high in zip(VALUES, scores(total, metric).T, *np.moveaxis(ends, 2, 1), strict=True):
            columns |= {name: value, f"{name}_lo": low, f"{name}_hi": high}
        columns |= dict(zip(COUNTS, total.T, strict=True))
        frames.append(pd.DataFrame(columns | common))
    return pd.concat(frames, ignore_index=True)


def write_scores(
    path: str | os.PathLike[str], scores: pd.DataFrame, *, experiment: str, split: int, test_store: str
) -> None:
    """Write the scores of an experiment on a split as TSV; undefined values are NA."""
    origin: dict[str, Any] = {"experiment": experiment, "split": split, "test_store": test_store}
    write_tsv(path, scores.assign(**origin)[[*origin, *scores.columns]], float_format="%.6g")


def write_tsv(path: str | os.PathLike[str], frame: pd.DataFrame, *, float_format: str | None = None) -> None:
    """Write a table as TSV without its index; undefined values are NA."""
    with atomic(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False, na_rep=MISSING, float_format=float_format)
