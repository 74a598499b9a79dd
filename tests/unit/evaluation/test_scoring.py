"""Scores of a fold: planted truths, score rules, and speed."""

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from celldetr.evaluation.predictions import Predictions, ScoreRule
from celldetr.evaluation.scoring import score_fold, truth_nuclei
from celldetr.runtime.errors import InputError

CLASSES = ("neoplastic", "inflammatory", "connective")
VALUES = ["precision", "recall", "f1"]


@dataclass(frozen=True)
class Store:
    """What scoring reads of a patch store."""

    box_ptr: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    centroids: np.ndarray
    classes: tuple = CLASSES

    @property
    def n_patches(self):
        return len(self.box_ptr) - 1


def make_store(seed=0, n_patches=8, most=4, labels=(0, 1, 2), size=60):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, n_patches)
    count = int(sizes.sum())
    low = rng.uniform(0, size, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 20, low.shape)], axis=1).astype(np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return Store(np.cumsum([0, *sizes]), boxes, rng.choice(labels, count).astype(np.int8), centres)


def predictions_of(patch, boxes, labels, n_patches, *, nucleus=0.9, best=0.8, classes=CLASSES):
    """Make detections with a score of `best` for their label and 0.1 for the other classes."""
    scores = np.full((len(patch), len(classes)), 0.1, dtype=np.float32)
    scores[np.arange(len(patch)), labels] = best
    return Predictions(
        patch=np.asarray(patch, dtype=np.int32),
        query=np.arange(len(patch), dtype=np.int16),
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        nucleus_score=np.broadcast_to(np.float32(nucleus), (len(patch),)),
        class_scores=scores,
        labels=np.asarray(labels, dtype=np.int8),
        classes=classes,
        n_patches=n_patches,
        metadata={"nucleus_threshold": 0.4},
    )


def patch_of(store):
    return np.repeat(np.arange(store.n_patches), np.diff(store.box_ptr))


def perfect(store):
    return predictions_of(patch_of(store), store.boxes, np.maximum(store.labels, 0), store.n_patches)


def noisy(store, seed=1):
    """Make detections near most of the nuclei, half of them with a random class, and six of nothing."""
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.uniform(size=len(store.boxes)) < 0.7)
    low = rng.uniform(0, 60, (6, 2))
    boxes = np.concatenate([store.boxes[kept] + rng.normal(0, 4, (len(kept), 1)), np.hstack([low, low + 9])])
    patch = np.concatenate([patch_of(store)[kept], rng.integers(0, store.n_patches, 6)])
    labels = rng.integers(0, 3, len(patch))
    labels[: len(kept) // 2] = np.maximum(store.labels[kept[: len(kept) // 2]], 0)
    order = np.argsort(patch, kind="stable")
    return predictions_of(patch[order], boxes[order], labels[order], store.n_patches)


def rows(frame, metric="strict"):
    return frame[frame["metric"] == metric].set_index("class")


def test_perfect_predictions_score_one():
    store = make_store(most=6)
    frame = rows(score_fold(perfect(store), store, resamples=20))
    assert (frame[VALUES] == 1).all(axis=None)
    assert (frame[[f"{name}_lo" for name in VALUES]] == 1).all(axis=None)
    assert list(frame.index) == ["Detection", "Neoplastic", "Inflammatory", "Connective"]


def test_no_predictions_score_zero():
    store = make_store()
    frame = rows(score_fold(predictions_of([], [], [], store.n_patches), store, resamples=20))
    assert (frame[VALUES] == 0).all(axis=None)
    assert frame.loc["Detection", "fn_unpaired"] == len(store.boxes)


def test_a_class_without_truth_is_undefined():
    store = make_store(labels=(0, 2))
    frame = rows(score_fold(noisy(store), store, resamples=20))
    assert frame.loc["Inflammatory", [*VALUES, "f1_lo", "f1_hi"]].isna().all()
    assert frame.loc["Inflammatory", "n_predicted"] > 0
    assert frame.drop("Inflammatory")[VALUES].notna().all(axis=None)


def test_a_fold_without_nuclei_or_patches_is_undefined_not_an_error():
    for n_patches in (3, 0):
        store = make_store(n_patches=n_patches, most=0)
        frame = score_fold(predictions_of([], [], [], n_patches), store, resamples=5)
        assert frame[VALUES].isna().all(axis=None)


def test_intervals_hold_the_estimate_and_both_metrics_are_there():
    store = make_store(most=6, n_patches=40)
    frame = score_fold(noisy(store), store, resamples=200)
    assert list(frame["metric"].unique()) == ["strict", "hovernet_compat"]
    for name in VALUES:
        assert (frame[f"{name}_lo"] <= frame[name]).all()
        assert (frame[name] <= frame[f"{name}_hi"]).all()
    assert (frame["images"] == 40).all()


def test_classes_that_the_model_lacks_count_as_unlabelled():
    store = make_store(most=6)
    found = perfect(store)
    found = replace(found.select(store.labels != 1), metadata={"nucleus_threshold": 0.4, "absent": [CLASSES[1]]})
    frame = rows(score_fold(found, store, resamples=0))
    assert frame["absent"].tolist() == [False, False, True, False]
    assert frame.loc["Inflammatory", VALUES].isna().all()
    assert frame.loc["Detection", "n_truth"] == len(store.boxes)
    assert frame.loc["Detection", "fn_unpaired"] == (store.labels == 1).sum()


def test_the_score_rule_decides_what_counts():
    store = make_store()
    found = replace(perfect(store), nucleus_score=np.full(len(store.boxes), 0.5, dtype=np.float32))
    assert rows(score_fold(found, store)).loc["Detection", "f1"] == 1
    for rule in (ScoreRule("both_thresholds", 0.6), ScoreRule("product", 0.4, 0.5), ScoreRule("class", 0.4, 0.9)):
        assert rows(score_fold(found, store, rule=rule)).loc["Detection", "n_predicted"] == 0
    assert rows(score_fold(found, store, rule=ScoreRule("product", 0.4, 0.3))).loc["Detection", "f1"] == 1


def test_mask_centres_are_used_when_asked_for():
    store = make_store()
    moved = replace(store, centroids=store.centroids + np.float32(30))
    assert rows(score_fold(perfect(store), moved)).loc["Detection", "f1"] == 1
    assert rows(score_fold(perfect(store), moved, centres="mask")).loc["Detection", "f1"] < 0.5
    assert np.array_equal(truth_nuclei(moved, "mask").centres, moved.centroids)


def test_predictions_of_another_store_and_missing_centroids_are_refused():
    store = make_store()
    unknown = replace(store, centroids=np.full_like(store.centroids, np.nan))
    with pytest.raises(InputError, match="have no mask centroid; use centres: box"):
        score_fold(perfect(store), unknown, centres="mask")
    with pytest.raises(InputError, match="got 9 patches .*, expected those of the test store: 8 patches"):
        score_fold(replace(perfect(store), n_patches=9), store)
    with pytest.raises(InputError, match="predict this split again"):
        score_fold(perfect(store), replace(store, classes=CLASSES[::-1]))


@pytest.mark.timeout(60)
def test_a_fold_with_900_predictions_per_patch_is_scored_in_seconds():
    """A quarter of a PanNuke fold, as if nothing were thresholded."""
    n_patches, queries = 675, 900
    rng = np.random.default_rng(0)
    sizes = rng.poisson(24, n_patches)
    low = rng.uniform(0, 230, (sizes.sum(), 2)).astype(np.float32)
    boxes = np.concatenate([low, low + 20], axis=1)
    store = Store(np.cumsum([0, *sizes]), boxes, rng.integers(0, 3, len(boxes)).astype(np.int8), low + 10)
    low = rng.uniform(0, 230, (n_patches * queries, 2)).astype(np.float32)
    patch, labels = np.repeat(np.arange(n_patches), queries), rng.integers(0, 3, len(low))
    found = predictions_of(patch, np.concatenate([low, low + 20], axis=1), labels, n_patches)
    start = time.perf_counter()
    frame = score_fold(found, store)
    seconds = time.perf_counter() - start
    assert rows(frame).loc["Detection", "n_predicted"] == n_patches * queries
    assert seconds < 10, f"{seconds:.1f} s"  # 0.5 s on an idle core
