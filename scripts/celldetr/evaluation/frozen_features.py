"""Frozen-feature evaluation: how well simple classifiers tell classes apart from the embeddings of a frozen model.

The nuclei are given by the true boxes of PanNuke, so these scores say nothing about detection and must not be compared
with those of systems that have to find the nuclei. Nothing is selected on validation or test patches: a vote of the
nearest training nuclei and a logistic regression with fixed settings are fitted to training nuclei, and every labelled
nucleus of the test fold is classified.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import exceptions, linear_model, metrics, neighbors, preprocessing

from celldetr.config.evaluation import FrozenFeatureSettings
from celldetr.evaluation.metrics import VALUES, row_names
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import write_tsv
from celldetr.store import PatchStore

COLUMNS = ("experiment", "split", "weights", "classifier", "class", *VALUES, "n")
WHAT = "classes of true boxes from frozen embeddings; not a detection score"
_C, _ITERATIONS = 1.0, 2000  # inverse strength of the L2 penalty, and iteration limit of the logistic regression
log = logging.getLogger(__name__)

Embed = Callable[..., Iterable[tuple[int, NDArray[np.float32]]]]
"""``embed(store, patches=(P,))`` yields the index of each patch and the embeddings (n, C) of its nuclei."""


def evaluate_frozen_features(
    embed: Embed,
    train: Sequence[PatchStore],
    test: PatchStore,
    split: pd.DataFrame,
    *,
    settings: FrozenFeatureSettings,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Fit classifiers to the training nuclei of a split and classify the nuclei of its test patches.

    Unlabelled nuclei are left out. The order of the split's rows and of the stores does not matter.

    Parameters
    ----------
    embed
        Embeds patches of a store with the frozen model, see `celldetr.inference.embedding.embed_patches`.
    train, test
        Stores of the training and of the test patches.
    split
        Columns ``store``, ``patch``, ``part``, as `celldetr.store.splits.read_split` returns it.
    settings
        Number of neighbours, and most training nuclei.
    seed
        Seed of the draw of training nuclei and of the logistic regression.

    Returns
    -------
    DataFrame
        Rows of `score` for each ``classifier`` of `classify`.
    dict
        Numbers of nuclei and convergence of the fit, as JSON values.

    Raises
    ------
    InputError
        The stores have different classes, or there are no nuclei to train or test on.
    ConfigError
        There are fewer training nuclei than neighbours.
    """
    stores = {store.path.stem: store for store in sorted(train, key=lambda store: store.path.stem)}
    for store in stores.values():
        if tuple(store.classes) != tuple(test.classes):
            raise InputError(
                f"{store.path}: got classes {store.classes}, {test.path} has {test.classes}; give the same"
            )
    available = pd.concat([_labelled(store, split, "train") for store in stores.values()], ignore_index=True)
    tested = _labelled(test, split, "test")
    drawn = draw_nuclei(available, settings.max_nuclei, seed)
    labels, truth = drawn["label"].to_numpy(), tested["label"].to_numpy()
    _check_numbers(labels, len(tested), settings.k)
    features = [part for name, rows in drawn.groupby("store") for part in _embeddings(embed, stores[str(name)], rows)]
    to_classify = np.concatenate(list(_embeddings(embed, test, tested)))
    predicted, fit = classify(np.concatenate(features), labels, to_classify, settings.k, seed)
    tables = [score(truth, found, test.classes).assign(classifier=name) for name, found in predicted.items()]
    summary = {
        "train": _counts(labels, test.classes),
        "train_available": len(available),
        "test": _counts(truth, test.classes),
        "linear": fit,
    }
    return pd.concat(tables, ignore_index=True), summary


def draw_nuclei(available: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Draw at most `limit` rows in the proportions of their ``label``, at least one of each."""
    counts = available["label"].value_counts().sort_index()
    if len(available) <= limit:
        return available
    assert limit >= len(counts)
    exact = limit * counts.to_numpy() / len(available)
    quota = np.maximum(np.floor(exact).astype(np.int64), 1)
    while quota.sum() != limit:  # the class farthest from its exact share gains or loses one
        step = 1 if quota.sum() < limit else -1
        gain = np.where((quota > 1) | (step > 0), step * (exact - quota), -np.inf)
        quota[np.argmax(gain)] += step
    kept = []
    for label, count in zip(counts.index.tolist(), quota.tolist(), strict=True):
        rng = np.random.default_rng([seed, label])
        kept.append(rng.choice(np.flatnonzero(available["label"] == label), count, replace=False))
    return available.iloc[np.sort(np.concatenate(kept))]


def classify(
    train: NDArray[np.floating], labels: NDArray[np.integer], test: NDArray[np.floating], k: int, seed: int
) -> tuple[dict[str, NDArray[np.integer]], dict[str, Any]]:
    """Fit classifiers to embeddings (N, C) with classes (N,), at least two, and predict those of embeddings (T, C).

    Returns
    -------
    dict
        Classes (T,) by ``knn`` (vote of the `k` <= N nearest by cosine similarity), ``linear`` (logistic regression on
        standardised features) and ``majority`` (the most frequent class, as the baseline of the others).
    dict
        ``converged`` and ``iterations`` of the logistic regression.
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
    return predicted, {"converged": converged, "iterations": iterations}


def score(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: Sequence[str]) -> pd.DataFrame:
    """Score the classes (T,) of nuclei.

    Returns
    -------
    DataFrame
        ``class``, `VALUES`, ``n`` (nuclei of the test fold): a row ``Accuracy`` (the share of right classes, which is
        precision, recall and F1 over all nuclei alike), a row ``Macro`` (means over the classes with truth), and one
        for each class; NaN for a class without truth, 0 with truth and no predictions.
    """
    *values, true = metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(len(classes)), zero_division=0.0
    )
    by_class = np.where(true[:, None] > 0, np.stack(values, axis=1), np.nan)
    rows = np.vstack([np.full(3, np.mean(truth == predicted)), by_class[true > 0].mean(axis=0), by_class])
    names = ["Accuracy", "Macro", *row_names(classes)[1:]]
    return pd.DataFrame(rows, columns=list(VALUES)).assign(**{"class": names, "n": [true.sum(), true.sum(), *true]})


def write_frozen_features(
    path: str | os.PathLike[str], tables: Mapping[str, pd.DataFrame], *, experiment: str, split: int
) -> None:
    """Write the scores of models, by their weights, as TSV with `COLUMNS`; undefined values are NA."""
    frames = [table.assign(experiment=experiment, split=split, weights=name) for name, table in tables.items()]
    write_tsv(path, pd.concat(frames)[list(COLUMNS)], float_format="%.6g")


def _labelled(store: PatchStore, split: pd.DataFrame, part: str) -> pd.DataFrame:
    """Labelled nuclei in the patches of a part of the split: ``store``, ``nucleus`` (ascending index), ``label``."""
    chosen = split.loc[(split["store"] == store.path.stem) & (split["part"] == part), "patch"]
    inside = np.zeros(len(store.box_ptr) - 1, dtype=bool)
    inside[chosen.to_numpy(dtype=np.int64)] = True
    nuclei = np.flatnonzero(np.repeat(inside, np.diff(store.box_ptr)) & (store.labels >= 0))
    return pd.DataFrame({"store": store.path.stem, "nucleus": nuclei, "label": store.labels[nuclei]})


def _check_numbers(train: NDArray[np.integer], n_test: int, k: int) -> None:
    classes = len(np.unique(train))
    if classes < 2 or not n_test:
        raise InputError(
            f"frozen features: got {classes} classes with training nuclei and {n_test} test nuclei, expected at least "
            "two classes and one nucleus; use larger folds"
        )
    if k > len(train):
        raise ConfigError(f"frozen_features.k: got {k}, expected at most {len(train)}, the number of training nuclei")


def _embeddings(embed: Embed, store: PatchStore, labelled: pd.DataFrame) -> Iterator[NDArray[np.float32]]:
    """Yield the embeddings (n, C) of the given nuclei of a store, patch by patch."""
    nuclei = labelled["nucleus"].to_numpy()
    owner = np.searchsorted(store.box_ptr, nuclei, side="right") - 1
    for patch, embeddings in embed(store, patches=np.unique(owner)):
        first, stop = np.searchsorted(owner, [patch, patch + 1])
        yield embeddings[nuclei[first:stop] - store.box_ptr[patch]]


def _counts(labels: NDArray[np.integer], classes: Sequence[str]) -> dict[str, int]:
    return {name: int((labels == index).sum()) for index, name in enumerate(classes)}
