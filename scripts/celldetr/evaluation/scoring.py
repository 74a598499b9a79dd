"""Scores of one experiment on one split: predictions and truth in, one long table out."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.counting import Evaluator
from celldetr.evaluation.intervals import intervals
from celldetr.evaluation.matching import NucleusCentres
from celldetr.evaluation.metrics import COUNTS, METRICS, VALUES, row_names, scores
from celldetr.evaluation.panoptic import ALL_TISSUES, MULTI_CLASS, PANOPTIC, QUALITIES
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


def predicted_nuclei(predictions: Predictions, centres: str = "box") -> NucleusCentres:
    """Return centres and labels of detections, image by image; mask centres only of those that have masks."""
    points = predictions.mask_centres if centres == "mask" else predictions.centres
    return NucleusCentres(predictions.ptr, points, predictions.labels)


def score_fold(
    predictions: Predictions,
    store: PatchStore,
    settings: ScoringSettings,
    *,
    centres: str = "box",
    resamples: int = 1000,
    seed: int = 0,
    panoptic: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Score the predictions of a test fold with both metrics.

    Parameters
    ----------
    centres
        Of the true nuclei, and of predictions that have masks: ``box`` or ``mask``, see `truth_nuclei`. The centre of a
        prediction without a mask is that of its box.
    resamples, seed
        Of the bootstrap, see `celldetr.evaluation.intervals`.
    panoptic
        Panoptic quality of the same predictions, see `celldetr.evaluation.panoptic.panoptic_quality`.

    Returns
    -------
    DataFrame
        One row per metric and class: ``metric``, ``class``, each of `VALUES` with ``_lo`` and ``_hi``, the counts of
        `celldetr.evaluation.metrics.COUNTS`, `PANOPTIC` over all tissues (NaN without masks; of no metric, so equal for
        both), ``absent`` (the model has no such class), ``images``, ``mode`` of the model, and the settings of the
        scoring. True nuclei of an absent class count as unlabelled: the model cannot find the class (paper, 4.4).

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
    predicted = predicted_nuclei(kept, centres)
    truth = replace(truth_nuclei(store, centres), labels=predictions.known_labels(store))
    common: dict[str, Any] = {
        **_overall(panoptic, row_names(store.classes)),
        "absent": [False, *(name in metadata.get("absent", []) for name in store.classes)],
        "images": store.n_patches,
        "mode": evaluator.mode,
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


def _overall(panoptic: pd.DataFrame | None, names: Sequence[str]) -> dict[str, Any]:
    """`PANOPTIC` of the rows of Detection and the classes; NaN if there is none."""
    if panoptic is None or panoptic.empty:
        return dict.fromkeys(PANOPTIC, np.nan)
    overall = panoptic[panoptic["tissue"] == ALL_TISSUES].set_index("class")
    columns: dict[str, Any] = {name: overall.loc[list(names), name].to_numpy() for name in QUALITIES}
    return columns | {"mpq": [overall.loc[MULTI_CLASS, "pq"], *[np.nan] * (len(names) - 1)]}


def write_scores(
    path: str | os.PathLike[str], scores: pd.DataFrame, *, experiment: str, split: int, test_store: str
) -> None:
    """Write the scores of an experiment on a split as TSV; undefined values are NA."""
    origin: dict[str, Any] = {"experiment": experiment, "split": split, "test_store": test_store}
    write_tsv(path, scores.assign(**origin)[[*origin, *scores.columns]], float_format="%.6g")
