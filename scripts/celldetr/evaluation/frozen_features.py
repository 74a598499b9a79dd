"""Frozen-feature evaluation: how well simple classifiers tell classes apart from the embeddings of a frozen model.

The nuclei are given by the true boxes of PanNuke, so these scores say nothing about detection and must not be compared
with those of systems that have to find the nuclei. Nothing is selected on validation or test patches: a vote of the
nearest training nuclei and a logistic regression with fixed settings are fitted to training nuclei, and every labelled
nucleus of the test fold is classified.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import exceptions, linear_model, metrics, neighbors, preprocessing

from celldetr.config.evaluation import FrozenFeatureSettings
from celldetr.evaluation.metrics import row_names
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic
from celldetr.store import PatchStore

CLASSIFIERS = ("knn", "linear", "majority")
"""Vote of the k nearest training nuclei by cosine similarity; logistic regression on standardised features; always the
most frequent training class, as the baseline of the others."""
COLUMNS = ("classifier", "class", "precision", "recall", "f1", "n")
WHAT = "classes of true boxes from frozen embeddings; not a detection score"
_C, _ITERATIONS = 1.0, 2000  # inverse strength of the L2 penalty, and iteration limit of the logistic regression
log = logging.getLogger(__name__)

Embed = Callable[[PatchStore, NDArray[np.int64]], Iterable[tuple[int, NDArray[np.float32]]]]
"""Embed patches (P,) of a store: yields the index of each patch and the embeddings (n, C) of its nuclei."""


@dataclass(frozen=True)
class FrozenFeatureScores:
    """Scores of all classifiers."""

    table: pd.DataFrame
    """Columns `COLUMNS`. For each classifier a row ``Accuracy`` (the share of right classes, which is precision, recall
    and F1 over all nuclei alike), a row ``Macro`` (means over the classes of the test fold), and one for each class;
    NaN for a class without nuclei in the test fold. ``n``: nuclei of the test fold."""
    summary: dict[str, Any]
    """Numbers of nuclei and convergence of the fit, as JSON values."""


def evaluate_frozen_features(
    embed: Embed,
    train: Sequence[PatchStore],
    test: PatchStore,
    split: pd.DataFrame,
    *,
    settings: FrozenFeatureSettings,
    seed: int,
) -> FrozenFeatureScores:
    """Fit classifiers to the training nuclei of a split and classify the nuclei of its test patches.

    Unlabelled nuclei are left out. The order of the split's rows and of the stores does not matter.

    Parameters
    ----------
    embed
        Embeds patches of a store with the frozen model, see `celldetr.inference.embedding.embed_patches`.
    train, test
        Stores of the training patches, and store of the test patches.
    split
        Columns ``store``, ``patch``, ``part``, as `celldetr.store.splits.read_split` returns it.
    settings
        Number of neighbours, and most training nuclei.
    seed
        Seed of the draw of training nuclei and of the logistic regression.

    Raises
    ------
    InputError
        The stores have different classes, or there are no nuclei to train or test on.
    ConfigError
        There are fewer training nuclei than neighbours, or fewer are allowed than there are classes.
    """
    stores = {store.path.stem: store for store in sorted(train, key=lambda store: store.path.stem)}
    for store in stores.values():
        if tuple(store.classes) != tuple(test.classes):
            raise InputError(
                f"{store.path}: got classes {store.classes}, {test.path} has {test.classes}; give the same"
            )
    available = {name: _labelled(store, split, "train") for name, store in stores.items()}
    nuclei = draw_nuclei(available, {name: store.labels for name, store in stores.items()}, settings.max_nuclei, seed)
    labels = np.concatenate([stores[name].labels[chosen] for name, chosen in nuclei.items()])
    tested = _labelled(test, split, "test")
    _check_numbers(labels, len(tested), settings.k)
    features = [rows for name, chosen in nuclei.items() for rows in _embeddings(embed, stores[name], chosen)]
    to_classify = np.concatenate(list(_embeddings(embed, test, tested)))
    predicted, fit = classify(np.concatenate(features), labels, to_classify, settings.k, seed)
    truth = test.labels[tested]
    tables = [score(truth, found, test.classes).assign(classifier=name) for name, found in predicted.items()]
    summary = {
        "what": WHAT,
        "train": _counts(labels, test.classes),
        "train_available": sum(map(len, available.values())),
        "test": _counts(truth, test.classes),
        "linear": fit,
    }
    return FrozenFeatureScores(pd.concat(tables, ignore_index=True)[list(COLUMNS)], summary)


def draw_nuclei(
    available: dict[str, NDArray[np.int64]], labels: dict[str, NDArray[np.int8]], limit: int, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Draw at most `limit` nuclei in the proportions of their classes, at least one of each class.

    `available` and the result are ascending indices of nuclei by store; `labels` are those of all nuclei by store.

    Raises
    ------
    ConfigError
        The limit is below the number of classes.
    """
    names = sorted(available)
    label = np.concatenate([labels[name][available[name]] for name in names])
    classes, counts = np.unique(label, return_counts=True)
    if len(label) <= limit:
        return {name: available[name] for name in names}
    if limit < len(classes):
        raise ConfigError(
            f"frozen_features.max_nuclei: got {limit}, expected at least {len(classes)}: one of each class"
        )
    exact = limit * counts / len(label)
    quota = np.maximum(np.floor(exact).astype(np.int64), 1)
    while quota.sum() != limit:  # the class farthest from its exact share gains or loses one
        step = 1 if quota.sum() < limit else -1
        gain = np.where((quota > 1) | (step > 0), step * (exact - quota), -np.inf)
        quota[np.argmax(gain)] += step
    kept = np.zeros(len(label), dtype=bool)
    for index, count in zip(classes.tolist(), quota.tolist(), strict=True):
        rng = np.random.default_rng([seed, index])
        kept[rng.choice(np.flatnonzero(label == index), count, replace=False)] = True
    parts = np.split(kept, np.cumsum([len(available[name]) for name in names])[:-1])
    return {name: available[name][part] for name, part in zip(names, parts, strict=True)}


def classify(
    train: NDArray[np.floating], labels: NDArray[np.integer], test: NDArray[np.floating], k: int, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, Any]]:
    """Fit each classifier to embeddings (N, C) with classes (N,), at least two, and predict those of others (T, C).

    At most N neighbours `k` vote. Returns classes (T,) by classifier, and ``converged`` and ``iterations`` of the
    logistic regression.
    """
    # the Euclidean order of unit vectors is the order of their cosines
    nearest = neighbors.KNeighborsClassifier(k, metric="euclidean", algorithm="brute")
    nearest.fit(preprocessing.normalize(train), labels)
    scaler = preprocessing.StandardScaler().fit(train.astype(np.float64))
    linear = linear_model.LogisticRegression(C=_C, max_iter=_ITERATIONS, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=exceptions.ConvergenceWarning)
        linear.fit(scaler.transform(train.astype(np.float64)), labels)
    converged = not any(issubclass(item.category, exceptions.ConvergenceWarning) for item in caught)
    iterations = int(linear.n_iter_.max())
    if not converged:
        log.warning("the logistic regression did not converge in %d iterations; its scores are unreliable", iterations)
    predicted = {
        "knn": nearest.predict(preprocessing.normalize(test)),
        "linear": linear.predict(scaler.transform(test.astype(np.float64))),
        "majority": np.full(len(test), np.bincount(labels).argmax()),
    }
    found = {name: predicted[name].astype(np.int64) for name in CLASSIFIERS}
    return found, {"converged": converged, "iterations": iterations}


def score(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: Sequence[str]) -> pd.DataFrame:
    """Score the classes (T,) of nuclei: the rows of one classifier, see `FrozenFeatureScores`.

    Precision, recall and F1 are NaN without truth, and 0 with truth and no predictions.
    """
    *found, true = metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(len(classes)), zero_division=0
    )
    values = np.stack(found, axis=1)
    values[true == 0] = np.nan
    accuracy = np.full(3, (truth == predicted).mean())
    rows = np.vstack([accuracy, np.nanmean(values, axis=0), values])
    names = ["Accuracy", "Macro", *row_names(classes)[1:]]
    table = pd.DataFrame(rows, columns=["precision", "recall", "f1"])
    return table.assign(**{"class": names, "n": [true.sum(), true.sum(), *true]})


def write_frozen_features(
    path: str | os.PathLike[str], scores: FrozenFeatureScores, *, experiment: str, split: int
) -> None:
    """Write scores as TSV: ``experiment``, ``split`` and `COLUMNS`; undefined values are NA."""
    frame = scores.table.assign(experiment=experiment, split=split)[["experiment", "split", *COLUMNS]]
    with atomic(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False, na_rep="NA", float_format="%.6g")


def _labelled(store: PatchStore, split: pd.DataFrame, part: str) -> NDArray[np.int64]:
    """Ascending indices of the labelled nuclei in the patches of a part of the split."""
    chosen = split.loc[(split["store"] == store.path.stem) & (split["part"] == part), "patch"]
    inside = np.zeros(len(store.box_ptr) - 1, dtype=bool)
    inside[chosen.to_numpy(dtype=np.int64)] = True
    return np.flatnonzero(np.repeat(inside, np.diff(store.box_ptr)) & (store.labels >= 0))


def _check_numbers(train: NDArray[np.int8], n_test: int, k: int) -> None:
    classes = len(np.unique(train))
    if classes < 2 or not n_test:
        raise InputError(
            f"frozen features: got {classes} classes with training nuclei and {n_test} test nuclei, expected at least "
            "two classes and one nucleus; use larger folds"
        )
    if k > len(train):
        raise ConfigError(f"frozen_features.k: got {k}, expected at most {len(train)}, the number of training nuclei")


def _embeddings(embed: Embed, store: PatchStore, nuclei: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """Yield the embeddings (n, C) of the given nuclei, patch by patch."""
    owner = np.searchsorted(store.box_ptr, nuclei, side="right") - 1
    for patch, embeddings in embed(store, np.unique(owner)):
        first, stop = np.searchsorted(owner, [patch, patch + 1])
        yield embeddings[nuclei[first:stop] - store.box_ptr[patch]]


def _counts(labels: NDArray[np.int8], classes: Sequence[str]) -> dict[str, int]:
    return {name: int((labels == index).sum()) for index, name in enumerate(classes)}
