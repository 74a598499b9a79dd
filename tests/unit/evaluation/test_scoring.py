"""Scores of a fold: planted truths, an independent form, and speed."""

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from celldetr.evaluation.predictions import Predictions, PredictionsWriter, ScoreRule, read_predictions
from celldetr.evaluation.scoring import score_fold, truth_nuclei
from celldetr.runtime.errors import ConfigError, InputError

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
    """Make detections near most of the nuclei, some of another class, and some where there is nothing."""
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.uniform(size=len(store.boxes)) < 0.7)
    extra = rng.integers(0, store.n_patches, 6)
    low = rng.uniform(0, 60, (6, 2))
    boxes = np.concatenate([store.boxes[kept] + rng.normal(0, 4, (len(kept), 1)), np.hstack([low, low + 9])])
    patch = np.concatenate([patch_of(store)[kept], extra])
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


def brute_force(store, found, radius):
    """Exhaustive assignment and counts of one patch after the other; returns class -> P, R, F."""
    paired, lone_true, lone_found = [], [], []
    patch = patch_of(store)
    for index in range(store.n_patches):
        true = [(tuple((b[:2] + b[2:]) / 2), int(k)) for b, k in zip(store.boxes, store.labels, strict=True)]
        true = [item for item, where in zip(true, patch, strict=True) if where == index]
        here = [
            (tuple((b[:2] + b[2:]) / 2), int(k))
            for b, k, where in zip(found.boxes, found.labels, found.patch, strict=True)
            if where == index
        ]

        def distance(i, j, true=true, here=here):
            return np.hypot(true[i][0][0] - here[j][0][0], true[i][0][1] - here[j][0][1])

        k = min(len(true), len(here))
        options = (
            list(zip(some, chosen, strict=True))
            for some in itertools.combinations(range(len(true)), k)
            for chosen in itertools.permutations(range(len(here)), k)
        )
        best = min(options, key=lambda option: sum(distance(i, j) for i, j in option))
        near = [(i, j) for i, j in best if distance(i, j) <= radius]
        paired += [(true[i][1], here[j][1]) for i, j in near]
        lone_true += [item[1] for i, item in enumerate(true) if i not in [i for i, _ in near]]
        lone_found += [item[1] for j, item in enumerate(here) if j not in [j for _, j in near]]
    result = {"Detection": (len(paired), 0, 0, len(lone_found), len(lone_true))}
    for c, name in enumerate(CLASSES):
        result[name.capitalize()] = (
            sum(pair == (c, c) for pair in paired),
            sum(t not in (c, -1) and p == c for t, p in paired),
            sum(t == c and p != c for t, p in paired),
            lone_found.count(c),
            lone_true.count(c),
        )
    return {
        name: (
            tp / (tp + 2 * fp + fpd) if tp else 0.0,
            tp / (tp + 2 * fn + fnd) if tp else 0.0,
            2 * tp / (2 * tp + 2 * fp + 2 * fn + fpd + fnd),
        )
        for name, (tp, fp, fn, fpd, fnd) in result.items()
    }


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_an_independent_form(seed):
    store = make_store(seed, labels=(0, 0, 1, 1, 2, 2, -1))
    found = noisy(store, seed)
    for radius in (3.0, 12.0):
        frame = rows(score_fold(found, store, radius=radius, resamples=0))
        for name, expected in brute_force(store, found, radius).items():
            assert tuple(frame.loc[name, VALUES]) == pytest.approx(expected), name


def test_intervals_hold_the_estimate_and_both_metrics_are_there():
    store = make_store(most=6, n_patches=40)
    frame = score_fold(noisy(store), store, resamples=200)
    assert list(frame["metric"].unique()) == ["strict", "hovernet_compat"]
    for name in VALUES:
        assert (frame[f"{name}_lo"] <= frame[name]).all()
        assert (frame[name] <= frame[f"{name}_hi"]).all()
    assert (frame["images"] == 40).all()


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


def test_refuses_what_does_not_belong_together():
    store = make_store()
    unknown = replace(store, centroids=np.full_like(store.centroids, np.nan))
    with pytest.raises(InputError, match="have no mask centroid; use centres: box"):
        score_fold(perfect(store), unknown, centres="mask")
    with pytest.raises(InputError, match="9 patches, the test store has 8"):
        score_fold(replace(perfect(store), n_patches=9), store)
    with pytest.raises(InputError, match="predictions have classes"):
        score_fold(perfect(store), replace(store, classes=CLASSES[::-1]))
    with pytest.raises(ConfigError, match=r"evaluation.radius: got 0.0"):
        score_fold(perfect(store), store, radius=0.0)
    with pytest.raises(ConfigError, match=r"evaluation.centres: got 'nucleus'"):
        score_fold(perfect(store), store, centres="nucleus")


@pytest.mark.timeout(120)
def test_a_fold_with_900_predictions_per_patch_is_scored_in_seconds(tmp_path):
    """2.4 million detections, those of a PanNuke fold at its official size if nothing were thresholded."""
    n_patches, queries = 2700, 900
    rng = np.random.default_rng(0)
    sizes = rng.poisson(24, n_patches)
    low = rng.uniform(0, 230, (sizes.sum(), 2)).astype(np.float32)
    boxes = np.concatenate([low, low + 20], axis=1)
    store = Store(np.cumsum([0, *sizes]), boxes, rng.integers(0, 3, len(boxes)).astype(np.int8), low + 10)
    low = rng.uniform(0, 230, (n_patches * queries, 2)).astype(np.float32)
    path = tmp_path / "fold.parquet"
    with PredictionsWriter(path, classes=CLASSES, n_patches=n_patches, nucleus_threshold=0.0) as writer:
        writer.append(
            np.repeat(np.arange(n_patches), queries),
            np.tile(np.arange(queries), n_patches),
            np.concatenate([low, low + 20], axis=1),
            rng.uniform(0.4, 1, n_patches * queries),
            rng.uniform(0.4, 1, (n_patches * queries, 3)),
        )
    start = time.perf_counter()
    frame = score_fold(read_predictions(path), store)
    seconds = time.perf_counter() - start
    assert rows(frame).loc["Detection", "n_predicted"] == n_patches * queries
    assert seconds < 20, f"{seconds:.1f} s"  # 2 s on an idle core
