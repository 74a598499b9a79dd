"""Scores of one experiment on one split: predictions and truth in, one long table out."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.counting import Evaluator
from celldetr.evaluation.intervals import intervals
from celldetr.evaluation.matching import NucleusCentres
from celldetr.evaluation.metrics import COUNTS, METRICS, VALUES, row_names, scores
from celldetr.evaluation.predictions import Predictions
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import write_tsv
from celldetr.store import PatchStore


def truth_nuclei(store: PatchStore, centres: str = "box") -> NucleusCentres:
    """Return all true nuclei of a store; none is rounded, shifted or dropped.

    `centres` are those of the ``box``, or the centroids of the annotated ``mask``.

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

    `centres` of the true nuclei: see `truth_nuclei`; the centre of a prediction is always that of its box. `resamples`
    and `seed` of the bootstrap: see `celldetr.evaluation.intervals`.

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
    predictions.check_store(store)
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
