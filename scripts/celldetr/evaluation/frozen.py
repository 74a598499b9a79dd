"""How well frozen embeddings tell classes apart: simple classifiers on the true boxes of PanNuke.

Nuclei are given by their true boxes: these scores say nothing about detection and are not to be compared with those of
systems that must find the nuclei first. No choice is made on validation or test patches. A vote of the nearest training
nuclei and a logistic regression with fixed settings are fitted to training nuclei, and every labelled nucleus of the
test fold is classified.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import exceptions, linear_model, neighbors, preprocessing

from celldetr.config.evaluation import ReadoutSettings
from celldetr.evaluation.metrics import row_names
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic

READOUTS = ("knn", "logistic", "majority")
"""Vote of the k nearest training nuclei by cosine; logistic regression on standardised features; always the most
frequent training class, what the others are to be compared with."""
COLUMNS = ("readout", "class", "precision", "recall", "f1", "n")
WHAT = "classes of true boxes told from frozen embeddings; no detection score"
_C, _ITERATIONS = 1.0, 2000  # inverse strength of the L2 penalty, and most steps of the logistic regression
log = logging.getLogger(__name__)


class LabelledStore(Protocol):
    """What is read of a patch store (`celldetr.store.PatchStore`)."""

    path: Path
    classes: tuple[str, ...]
    labels: NDArray[np.int8]
    box_ptr: NDArray[np.int64]


Embed = Callable[[Any, NDArray[np.int64]], Iterable[tuple[int, NDArray[np.float32]]]]
"""Embed patches (P,) of a store: yields the index of each and the embeddings (n, C) of its nuclei."""


@dataclass(frozen=True)
class Readout:
    """Scores of all readouts.

    Attributes
    ----------
    table
        Columns `COLUMNS`. For each readout a row ``Accuracy`` (the share of right classes, which is precision, recall
        and F1 over all nuclei alike), a row ``Macro`` (means over the classes that the test fold has), and one for each
        class; NaN for a class without nuclei in the test fold. ``n``: nuclei of the test fold.
    summary
        What was trained on and how, as JSON values.
    """

    table: pd.DataFrame
    summary: dict[str, Any]


def measure_readout(
    embed: Embed,
    train: Sequence[LabelledStore],
    test: LabelledStore,
    split: pd.DataFrame,
    *,
    settings: ReadoutSettings,
    seed: int,
) -> Readout:
    """Fit readouts to the training nuclei of a split and classify the nuclei of its test patches.

    Nuclei without a label are left out. Neither the order of the split's rows nor that of the stores matters.

    Parameters
    ----------
    embed
        Embeds patches of a store with the frozen model, see `celldetr.inference.embedding.embed_patches`.
    train
        Stores of the training patches.
    test
        Store of the test patches.
    split
        Columns ``store``, ``patch``, ``part``, as `celldetr.store.splits.read_split` returns it.
    settings
        How many neighbours vote, and how many nuclei train.
    seed
        Seed of the draw of training nuclei.

    Raises
    ------
    InputError
        Stores do not belong to the split or have other classes, or there are no nuclei to train or test on.
    ConfigError
        There are fewer training nuclei than neighbours, or fewer are allowed than there are classes.
    """
    stores = _named(train)
    _check_stores(stores, test, split)
    available = {name: _labelled(store, _patches(split, name, "train")) for name, store in stores.items()}
    nuclei = draw_nuclei(available, {name: store.labels for name, store in stores.items()}, settings.max_nuclei, seed)
    known = [stores[name].labels[chosen] for name, chosen in nuclei.items()]
    labels = np.concatenate([np.empty(0, np.int8), *known])
    tested = _labelled(test, _patches(split, test.path.stem, "test"))
    _check_labels(labels, test.labels[tested], settings.k)
    features = np.concatenate([_embedded(embed, stores[name], chosen) for name, chosen in nuclei.items()])
    predicted, fit = classify(features, labels, _embedded(embed, test, tested), settings.k, seed)
    tables = [score(test.labels[tested], found, test.classes).assign(readout=name) for name, found in predicted.items()]
    summary = {
        "what": WHAT,
        "train": _counts(labels, test.classes),
        "train_available": sum(map(len, available.values())),
        "test": _counts(test.labels[tested], test.classes),
        "logistic": fit,
    }
    return Readout(pd.concat(tables, ignore_index=True)[list(COLUMNS)], summary)


def draw_nuclei(
    available: dict[str, NDArray[np.int64]], labels: dict[str, NDArray[np.int8]], limit: int, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Draw at most `limit` nuclei in the proportions of their classes, at least one of each.

    Parameters
    ----------
    available
        Store -> ascending indices of nuclei that may be drawn.
    labels
        Store -> labels of all its nuclei.
    limit
        Nuclei that are drawn, when there are more.
    seed
        Seed of the draw.

    Returns
    -------
    dict
        Store -> ascending indices.

    Raises
    ------
    ConfigError
        The limit is below the number of classes.
    """
    names = sorted(available)
    label = np.concatenate([np.empty(0, np.int8), *(labels[name][available[name]] for name in names)])
    classes, counts = np.unique(label, return_counts=True)
    if len(label) <= limit:
        return {name: available[name] for name in names}
    if limit < len(classes):
        raise ConfigError(f"readout.max_nuclei: got {limit}, expected at least {len(classes)}: one of each class")
    exact = limit * counts / len(label)
    quota = np.maximum(np.floor(exact).astype(np.int64), 1)
    while quota.sum() != limit:
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
    """Fit each readout and classify.

    Parameters
    ----------
    train, labels
        Embeddings (N, C) and classes (N,) to fit to; at least two classes.
    test
        Embeddings (T, C).
    k
        Neighbours, at most N.
    seed
        Of the logistic regression.

    Returns
    -------
    dict
        Readout -> classes (T,).
    dict
        ``converged`` (whether the logistic regression did) and ``iterations``.
    """
    # vectors of length 1 are as near to each other as their cosine is large
    nearest = neighbors.KNeighborsClassifier(k, metric="euclidean", algorithm="brute")
    nearest.fit(preprocessing.normalize(train), labels)
    scaler = preprocessing.StandardScaler().fit(train.astype(np.float64))
    logistic = linear_model.LogisticRegression(C=_C, max_iter=_ITERATIONS, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=exceptions.ConvergenceWarning)
        logistic.fit(scaler.transform(train.astype(np.float64)), labels)
    converged = not any(issubclass(item.category, exceptions.ConvergenceWarning) for item in caught)
    iterations = int(logistic.n_iter_.max())
    if not converged:
        log.warning(
            "the logistic regression has not converged in %d iterations; its scores are of an unfinished fit",
            iterations,
        )
    predicted = {
        "knn": nearest.predict(preprocessing.normalize(test)),
        "logistic": logistic.predict(scaler.transform(test.astype(np.float64))),
        "majority": np.full(len(test), np.bincount(labels).argmax()),
    }
    found = {name: predicted[name].astype(np.int64) for name in READOUTS}
    return found, {"converged": converged, "iterations": iterations}


def score(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: Sequence[str]) -> pd.DataFrame:
    """Score the classes (T,) of nuclei: the rows of one readout, see `Readout`.

    Precision, recall and F1 are NaN where there is no truth, and 0 where there is truth and nothing was predicted.
    """
    count = len(classes)
    confusion = np.bincount(truth.astype(np.int64) * count + predicted, minlength=count**2).reshape(count, count)
    right, true, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    top = np.stack([right, right, 2 * right], axis=1).astype(float)
    bottom = np.stack([guessed, true, guessed + true], axis=1)
    values = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    values[true == 0] = np.nan
    accuracy = np.full(3, right.sum() / true.sum())
    rows = np.vstack([accuracy, values[true > 0].mean(axis=0), values])
    names = ["Accuracy", "Macro", *row_names(classes)[1:]]
    table = pd.DataFrame(rows, columns=["precision", "recall", "f1"])
    return table.assign(**{"class": names, "n": [true.sum(), true.sum(), *true]})


def write_readout(path: str | os.PathLike[str], readout: Readout, *, experiment: str, split: int) -> None:
    """Write scores as TSV: ``experiment``, ``split`` and `COLUMNS`; undefined values are NA."""
    frame = readout.table.copy()
    frame.insert(0, "experiment", experiment)
    frame.insert(1, "split", split)
    with atomic(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False, na_rep="NA", float_format="%.6g")


def _named(stores: Sequence[LabelledStore]) -> dict[str, LabelledStore]:
    names = [store.path.stem for store in stores]
    if len(set(names)) < len(names):
        raise InputError(f"readout: got training stores named {sorted(names)}, expected each name once")
    return {name: store for name, store in sorted(zip(names, stores, strict=True), key=lambda item: item[0])}


def _check_stores(stores: dict[str, LabelledStore], test: LabelledStore, split: pd.DataFrame) -> None:
    wanted = set(split.loc[split["part"] == "train", "store"])
    if wanted != set(stores):
        raise InputError(f"readout: got training stores {sorted(stores)}, the split has {sorted(wanted)}; give these")
    tested = set(split.loc[split["part"] == "test", "store"])
    if tested != {test.path.stem}:
        raise InputError(
            f"readout: got the test store {test.path.stem}, the split tests on {sorted(tested)}; give that"
        )
    for store in stores.values():
        if tuple(store.classes) != tuple(test.classes):
            raise InputError(
                f"{store.path}: got classes {store.classes}, {test.path} has {test.classes}; give the same"
            )


def _check_labels(train: NDArray[np.int8], test: NDArray[np.int8], k: int) -> None:
    if len(np.unique(train)) < 2 or not len(test):
        raise InputError(
            f"readout: got {len(np.unique(train))} classes with nuclei to train on and {len(test)} nuclei to test on, "
            "expected two classes or more and some nuclei; use larger folds"
        )
    if k > len(train):
        raise ConfigError(f"readout.k: got {k}, expected at most the {len(train)} nuclei that train")


def _patches(split: pd.DataFrame, store: str, part: str) -> NDArray[np.int64]:
    chosen = split.loc[(split["store"] == store) & (split["part"] == part), "patch"]
    return np.sort(chosen.to_numpy(dtype=np.int64))


def _labelled(store: LabelledStore, patches: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending indices of the nuclei with a label in patches."""
    if patches.size and patches[-1] >= len(store.box_ptr) - 1:
        raise InputError(
            f"{store.path}: the split has patch {patches[-1]}, the store {len(store.box_ptr) - 1} patches; make the "
            "split again"
        )
    inside = np.zeros(len(store.box_ptr) - 1, dtype=bool)
    inside[patches] = True
    return np.flatnonzero(np.repeat(inside, np.diff(store.box_ptr)) & (store.labels >= 0))


def _embedded(embed: Embed, store: LabelledStore, nuclei: NDArray[np.int64]) -> NDArray[np.float32]:
    """Embeddings (N, C) of nuclei; their patches are embedded one after the other, and no other nucleus is kept."""
    return np.concatenate(list(_rows(embed, store, nuclei)) or [np.empty((0, 0), np.float32)])


def _rows(embed: Embed, store: LabelledStore, nuclei: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    owner = np.searchsorted(store.box_ptr, nuclei, side="right") - 1
    for patch, embeddings in embed(store, np.unique(owner)):
        first, stop = np.searchsorted(owner, [patch, patch + 1])
        yield embeddings[nuclei[first:stop] - store.box_ptr[patch]]


def _counts(labels: NDArray[np.int8], classes: Sequence[str]) -> dict[str, int]:
    return {name: int((labels == index).sum()) for index, name in enumerate(classes)}
