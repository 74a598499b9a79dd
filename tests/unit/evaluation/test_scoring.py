"""Scores of a fold: planted truths, score rules, and speed."""

import time
from dataclasses import replace

import numpy as np
import pytest
from planted_folds import CLASSES, Fold, detections

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.counting import Evaluator
from celldetr.evaluation.matching import NucleusCentres
from celldetr.evaluation.scoring import score_fold, truth_nuclei
from celldetr.runtime.errors import ConfigError, InputError

VALUES = ["precision", "recall", "f1"]
SETTINGS = ScoringSettings()


def make_fold(seed=0, n_patches=8, most=4, labels=(0, 1, 2), size=60):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, n_patches)
    count = int(sizes.sum())
    low = rng.uniform(0, size, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 20, low.shape)], axis=1).astype(np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return Fold(np.cumsum([0, *sizes]), boxes, rng.choice(labels, count).astype(np.int8), centres)


def perfect(fold, **options):
    return detections(fold.patch, fold.boxes, np.maximum(fold.labels, 0), fold.n_patches, **options)


def nothing(fold):
    return detections([], [], [], fold.n_patches)


def noisy(fold, seed=1):
    """Make detections near most of the nuclei, half of them with a random class, and six of nothing."""
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.uniform(size=len(fold.boxes)) < 0.7)
    low = rng.uniform(0, 60, (6, 2))
    boxes = np.concatenate([fold.boxes[kept] + rng.normal(0, 4, (len(kept), 1)), np.hstack([low, low + 9])])
    patch = np.concatenate([fold.patch[kept], rng.integers(0, fold.n_patches, 6)])
    labels = rng.integers(0, 3, len(patch))
    labels[: len(kept) // 2] = np.maximum(fold.labels[kept[: len(kept) // 2]], 0)
    order = np.argsort(patch, kind="stable")
    return detections(patch[order], boxes[order], labels[order], fold.n_patches)


def score(found, fold, settings=SETTINGS, **options):
    frame = score_fold(found, fold, settings, **{"resamples": 20, **options})
    assert list(frame["metric"].unique()) == ["strict", "hovernet_compat"]
    return frame[frame["metric"] == "strict"].set_index("class")


def test_perfect_predictions_score_one_and_none_score_zero():
    fold = make_fold(most=6)
    frame = score(perfect(fold), fold)
    assert (frame[[*VALUES, *(f"{name}_lo" for name in VALUES)]] == 1).all(axis=None)
    assert list(frame.index) == ["Detection", "Neoplastic", "Inflammatory", "Connective"]
    frame = score(nothing(fold), fold)
    assert (frame[VALUES] == 0).all(axis=None)
    assert frame.loc["Detection", "fn_unpaired"] == len(fold.boxes)


def test_a_class_or_fold_without_truth_is_undefined():
    fold = make_fold(labels=(0, 2))
    frame = score(noisy(fold), fold)
    assert frame.loc["Inflammatory", [*VALUES, "f1_lo", "f1_hi"]].isna().all()
    assert frame.loc["Inflammatory", "n_predicted"] > 0
    assert frame.drop("Inflammatory")[VALUES].notna().all(axis=None)
    for n_patches in (3, 0):
        fold = make_fold(n_patches=n_patches, most=0)
        assert score(nothing(fold), fold)[VALUES].isna().all(axis=None)


def test_classes_that_the_model_lacks_count_as_unlabelled():
    fold = make_fold(most=6)
    found = perfect(fold, absent=[CLASSES[1]])
    frame = score(found.select(fold.labels != 1), fold, resamples=0)
    assert frame["absent"].tolist() == [False, False, True, False]
    assert frame.loc["Inflammatory", VALUES].isna().all()
    assert frame.loc["Detection", "n_truth"] == len(fold.boxes)
    assert frame.loc["Detection", "fn_unpaired"] == (fold.labels == 1).sum()


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel"])
def test_the_score_rule_decides_what_counts_in_every_mode(mode):
    rng = np.random.default_rng(0)
    classes = rng.uniform(size=(200, 3)).astype(np.float32)
    best = classes.max(axis=1)
    nucleus = best if mode == "baseline" else rng.uniform(size=200).astype(np.float32)
    product = best if mode == "baseline" else nucleus * best  # its nucleus score is its class score: no square
    expected = {
        "both_thresholds": (nucleus >= 0.6) & (best >= 0.7),
        "class": best >= 0.7,
        "product": product >= 0.7,
    }
    for rule, keep in expected.items():
        settings = ScoringSettings(score=rule, nucleus_threshold=0.6, class_threshold=0.7)
        evaluator = Evaluator(settings, 0.25, mode)
        assert 0 < keep.sum() < len(keep)
        assert np.array_equal(evaluator.keep(nucleus, classes), keep)
        assert np.array_equal(evaluator.keep(nucleus, classes[:, :0]), nucleus >= 0.6)
        fold = Fold(np.array([0, 1]), np.array([[0, 0, 8, 8]]), np.zeros(1, int), np.full((1, 2), 4))
        for nucleus_score, class_score in ((0.75, 0.75), (0.9, 0.9), (0.9, 0.65)):
            found = perfect(fold, nucleus=nucleus_score, best=class_score, mode=mode)
            counted = score(found, fold, settings).loc["Detection", "n_predicted"]
            assert counted == evaluator.keep(found.nucleus_score, found.class_scores).sum()


def test_scores_at_a_threshold_are_kept():
    settings = ScoringSettings(nucleus_threshold=0.7, class_threshold=0.7)
    scores = np.array([[0.7, 0.1]], dtype=np.float32)
    assert Evaluator(settings, 0.25, "parallel").keep(scores[:, 0], scores).all()


def test_the_radius_is_in_um():
    truth, found = (NucleusCentres(np.array([0, 1]), np.array([[x, 20.0]]), np.zeros(1, int)) for x in (20, 32))
    for mpp, pairs in ((0.25, 1), (0.26, 0)):
        counts = Evaluator(SETTINGS, mpp, "parallel").count(truth, found, 1)
        assert counts[0, 0, 2] == pairs


def test_mask_centres_are_used_when_asked_for():
    fold = make_fold()
    moved = replace(fold, centroids=fold.centroids + np.float32(30))
    assert score(perfect(fold), moved).loc["Detection", "f1"] == 1
    assert score(perfect(fold), moved, centres="mask").loc["Detection", "f1"] < 0.5
    assert np.array_equal(truth_nuclei(moved, "mask").centres, moved.centroids)


def test_predictions_of_another_store_or_threshold_and_missing_centroids_are_refused():
    fold = make_fold()
    unknown = replace(fold, centroids=np.full_like(fold.centroids, np.nan))
    with pytest.raises(InputError, match="have no mask centroid; use centres: box"):
        score(perfect(fold), unknown, centres="mask")
    with pytest.raises(InputError, match="got those of store fold2 with digest d1, expected fold2.zarr with d2"):
        score(perfect(fold), replace(fold, digest="d2"))
    with pytest.raises(ConfigError, match="got 0.3, but the predictions hold only .* 0.4; lower inference"):
        score(perfect(fold), fold, ScoringSettings(nucleus_threshold=0.3))


@pytest.mark.timeout(60)
def test_a_fold_with_900_predictions_per_patch_is_scored_in_seconds():
    """A quarter of a PanNuke fold, as if nothing were thresholded."""
    n_patches, queries = 675, 900
    rng = np.random.default_rng(0)
    sizes = rng.poisson(24, n_patches)
    low = rng.uniform(0, 230, (sizes.sum(), 2)).astype(np.float32)
    boxes = np.concatenate([low, low + 20], axis=1)
    fold = Fold(np.cumsum([0, *sizes]), boxes, rng.integers(0, 3, len(boxes)).astype(np.int8), low + 10)
    low = rng.uniform(0, 230, (n_patches * queries, 2)).astype(np.float32)
    patch, labels = np.repeat(np.arange(n_patches), queries), rng.integers(0, 3, len(low))
    found = detections(patch, np.concatenate([low, low + 20], axis=1), labels, n_patches)
    start = time.perf_counter()
    frame = score(found, fold, resamples=1000)
    seconds = time.perf_counter() - start
    assert frame.loc["Detection", "n_predicted"] == n_patches * queries
    assert seconds < 10, f"{seconds:.1f} s"  # 0.5 s on an idle core
