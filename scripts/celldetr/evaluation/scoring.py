"""Scores of one experiment on one split: predictions and truth in, one long table out."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.evaluation.intervals import intervals
from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, METRICS, count_images, row_names, scores
from celldetr.evaluation.predictions import Predictions, ScoreRule
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.store import PatchStore

MISSING = "NA"
VALUES = ("precision", "recall", "f1")


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
        All detections of the fold.
    store
        Patch store of the test fold.
    rule
        Which detections count.
    radius
        Largest distance of a pair, px.
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
    """
    rule = rule or ScoreRule()
    predictions.check_store(store.classes, store.n_patches)
    truth, predicted = truth_nuclei(store, centres), predicted_nuclei(rule.keep(predictions))
    absent = [name in predictions.metadata.get("absent", []) for name in store.classes]
    truth = replace(truth, labels=np.where(np.isin(truth.labels, np.flatnonzero(absent)), -1, truth.labels))
    pairs = pair_nuclei(truth, predicted, radius)
    settings: dict[str, Any] = {
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
        ends = intervals(counts, resamples=resamples, seed=seed)
        frames.append(_frame(counts.sum(axis=0), ends).assign(**settings))
        frames[-1].insert(0, "metric", metric)
        frames[-1].insert(1, "class", row_names(store.classes))
    return pd.concat(frames, ignore_index=True)


def _frame(counts: NDArray[np.int64], ends: NDArray[np.float64]) -> pd.DataFrame:
    """Scores with their intervals, then the counts; one line per row of `counts`."""
    values = scores(counts)
    columns: dict[str, Any] = {}
    for index, name in enumerate(VALUES):
        columns[name] = values[:, index]
        columns[f"{name}_lo"], columns[f"{name}_hi"] = ends[:, :, index]
    return pd.DataFrame(columns | {name: counts[:, index] for index, name in enumerate(COUNTS)})


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
