"""Scores of one experiment on one split: predictions and truth in, one long table out."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.evaluation import intervals as bootstrap
from celldetr.evaluation.matching import Nuclei, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, METRICS, count_images, row_names, scores
from celldetr.evaluation.predictions import Predictions, ScoreRule
from celldetr.evaluation.truth import TruthStore
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic

CENTRES = ("box", "mask")
MISSING = "NA"
VALUES = ("precision", "recall", "f1")


def truth_nuclei(store: TruthStore, centres: str = "box") -> Nuclei:
    """All true nuclei of a store; none is rounded, shifted or dropped.

    Parameters
    ----------
    store
        Patch store of the test fold.
    centres
        ``box``: centre of the box; ``mask``: centroid of the annotated mask.

    Raises
    ------
    ConfigError
        Unknown kind of centre.
    InputError
        Mask centres are asked for and the store does not know all of them.
    """
    if centres not in CENTRES:
        raise ConfigError(f"evaluation.centres: got {centres!r}, expected one of {', '.join(CENTRES)}")
    if centres == "box":
        boxes = np.asarray(store.boxes, dtype=np.float64)
        points = (boxes[:, :2] + boxes[:, 2:]) / 2
    else:
        points = np.asarray(store.centroids, dtype=np.float64)
        unknown = int((~np.isfinite(points)).any(axis=1).sum())
        if unknown:
            raise InputError(
                f"evaluation.centres: mask, but {unknown} of {len(points)} nuclei of the test store have no "
                "mask centroid; use centres: box or convert the data with masks"
            )
    return Nuclei(np.asarray(store.box_ptr, dtype=np.int64), points, np.asarray(store.labels))


def predicted_nuclei(predictions: Predictions) -> Nuclei:
    """Centres and labels of detections, image after image."""
    return Nuclei(predictions.ptr, predictions.centres, predictions.labels)


def score_fold(
    predictions: Predictions,
    store: TruthStore,
    *,
    rule: ScoreRule | None = None,
    radius: float = 12.0,
    centres: str = "box",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score the predictions of a test fold with both metrics.

    Parameters
    ----------
    predictions
        All detections of the fold's file.
    store
        Patch store of the test fold.
    rule
        Which detections count.
    radius
        Largest distance of a pair, px.
    centres
        Centres of the truth, see `truth_nuclei`. Predictions are boxes: their centres are those of the boxes.
    resamples, seed
        Bootstrap, see `celldetr.evaluation.intervals.intervals`.

    Returns
    -------
    DataFrame
        One row per metric and class: ``metric``, ``class``, each of `VALUES` with ``_lo`` and ``_hi``, the
        counts of `celldetr.evaluation.metrics.COUNTS`, ``absent`` (the model has no such class), ``images``, and the
        settings it was scored with. True nuclei of an absent class count for Detection alone, as those without a label
        do: the model cannot find them (paper, 4.4).

    Raises
    ------
    InputError
        Predictions and store do not belong together.
    """
    rule = rule or ScoreRule()
    if predictions.classes != tuple(store.classes):
        raise InputError(f"predictions have classes {predictions.classes}, the test store {tuple(store.classes)}")
    if predictions.n_patches != store.n_patches:
        raise InputError(
            f"predictions are for {predictions.n_patches} patches, the test store has {store.n_patches}: "
            "they were made on another store; predict this split again"
        )
    if radius <= 0:
        raise ConfigError(f"evaluation.radius: got {radius}, expected a distance in px above 0")
    truth, predicted = truth_nuclei(store, centres), predicted_nuclei(rule.keep(predictions))
    absent = [name in predictions.metadata.get("absent", []) for name in store.classes]
    truth = replace(truth, labels=np.where(np.isin(truth.labels, np.flatnonzero(absent)), -1, truth.labels))
    pairs = pair_nuclei(truth, predicted, radius)
    settings = {
        "absent": [False, *absent],
        "images": store.n_patches,
        "score_rule": rule.rule,
        "nucleus_threshold": rule.nucleus_threshold,
        "class_threshold": rule.class_threshold,
        "radius": float(radius),
        "centres": centres,
        "resamples": resamples,
    }
    frames = []
    for metric in METRICS:
        counts = count_images(truth, predicted, pairs, len(store.classes), metric=metric, radius=radius)
        ends = bootstrap.intervals(counts, resamples=resamples, seed=seed)
        frames.append(_frame(metric, row_names(store.classes), counts.sum(axis=0), ends, settings))
    return pd.concat(frames, ignore_index=True)


def _frame(
    metric: str,
    names: tuple[str, ...],
    counts: NDArray[np.int64],
    ends: NDArray[np.float64],
    settings: dict[str, Any],
) -> pd.DataFrame:
    values = scores(counts)
    columns: dict[str, Any] = {"metric": metric, "class": list(names)}
    for index, name in enumerate(VALUES):
        columns[name] = values[:, index]
        columns[f"{name}_lo"], columns[f"{name}_hi"] = ends[:, :, index]
    columns |= {name: counts[:, index] for index, name in enumerate(COUNTS)}
    return pd.DataFrame(columns | settings)


def write_scores(
    path: str | os.PathLike[str], scores: pd.DataFrame, *, experiment: str, split: int, test_store: str
) -> None:
    """Write the scores of an experiment on a split as TSV; undefined values are NA."""
    origin: dict[str, Any] = {"experiment": experiment, "split": split, "test_store": test_store}
    frame = scores.assign(**origin)[[*origin, *scores.columns]]
    with atomic(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False, na_rep=MISSING, float_format="%.6g")
