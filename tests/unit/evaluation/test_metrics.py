"""Counts and scores of detection and classes."""

import itertools

import numpy as np
import pytest

from celldetr.evaluation.matching import NucleusCentres, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, METRICS, count_images, row_names, scores

K = 3
RADIUS = 12.0


def fold(images):
    """Make nuclei from lists of (x, y, label), one list per image."""
    rows = np.array(list(itertools.chain(*images)), dtype=float).reshape(-1, 3)
    return NucleusCentres(np.cumsum([0, *map(len, images)]), rows[:, :2], rows[:, 2].astype(np.int8))


def count(true_images, predicted_images, metric="strict"):
    truth, predicted = fold(true_images), fold(predicted_images)
    pairs = pair_nuclei(truth, predicted, RADIUS)
    return count_images(truth, predicted, pairs, K, metric=metric, radius=RADIUS)


def total(counts, row):
    return dict(zip(COUNTS, counts.sum(axis=0)[row].tolist(), strict=True))


def random_images(seed, n_images=8, most=4, lowest=0, size=40):
    rng = np.random.default_rng(seed)
    return [
        [(*rng.uniform(0, size, 2), rng.integers(lowest, K)) for _ in range(rng.integers(0, most + 1))]
        for _ in range(n_images)
    ]


# ---- brute force: HoVer-Net's lists, all assignments, one nucleus at a time


def cheapest_pairs(true, found):
    """Pairs (i, j) of the assignment with the smallest sum of distances that are near, by trying all of them."""

    def apart(pair):
        return float(np.hypot(*np.subtract(true[pair[0]][:2], found[pair[1]][:2])))

    k = min(len(true), len(found))
    options = (
        list(zip(some, chosen, strict=True))
        for some in itertools.combinations(range(len(true)), k)
        for chosen in itertools.permutations(range(len(found)), k)
    )
    return [pair for pair in min(options, key=lambda option: sum(map(apart, option))) if apart(pair) <= RADIUS]


def brute_force(true_images, predicted_images, metric):
    """P, R and F (1 + K, 3), and the counts of the formulas: TP, FP, FN, FPd, FNd (1 + K, 5)."""
    paired, lone_true, lone_found = [], [], []
    for true, found in zip(true_images, predicted_images, strict=True):
        if metric == "hovernet_compat":
            true, found = true or [(0.0, 0.0, "background")], found or [(0.0, 0.0, "background")]
        pairs = cheapest_pairs(true, found)
        paired += [(true[i][2], found[j][2]) for i, j in pairs]
        lone_true += [t[2] for i, t in enumerate(true) if i not in [i for i, _ in pairs]]
        lone_found += [p[2] for j, p in enumerate(found) if j not in [j for _, j in pairs]]
    counts, values = [(len(paired), 0, 0, len(lone_found), len(lone_true))], []
    for c in range(K):
        tp = sum((t, p) == (c, c) for t, p in paired)
        fp = sum(t not in (c, -1) and p == c for t, p in paired)
        fn = sum(t == c and p != c for t, p in paired)
        counts.append((tp, fp, fn, lone_found.count(c), lone_true.count(c)))
    labels = [t[2] for image in true_images for t in image]
    exists = [bool(labels), *(c in labels for c in range(K))]
    for there, (tp, fp, fn, fpd, fnd) in zip(exists, counts, strict=True):
        bottoms = (tp + 2 * fp + fpd, tp + 2 * fn + fnd, 2 * tp + 2 * fp + 2 * fn + fpd + fnd)
        tops = (tp, tp, 2 * tp)
        undefined = 0.0 if metric == "strict" else np.nan
        score = [top / bottom if bottom else undefined for top, bottom in zip(tops, bottoms, strict=True)]
        values.append(score if there or metric != "strict" else [np.nan] * 3)
    return np.array(values), np.array(counts)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(40))  # random places, so that no two assignments are equally good
def test_counts_and_scores_are_those_of_the_definition(metric, seed):
    true = random_images(seed, n_images=seed % 5, lowest=-1)
    found = random_images(1000 + seed, n_images=seed % 5)
    got = count(true, found, metric)
    values, counts = brute_force(true, found, metric)
    fields = [COUNTS.index(name) for name in ("tp", "fp_paired", "fn_paired", "fp_unpaired", "fn_unpaired")]
    assert got.sum(axis=0)[:, fields].tolist() == counts.tolist()
    np.testing.assert_allclose(scores(got.sum(axis=0), metric), values, rtol=1e-12)


# ---- planted truths


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_predictions_score_one(metric):
    truth = [image for image in random_images(3, n_images=40) if image]
    assert (scores(count(truth, truth, metric).sum(axis=0), metric) == 1).all()


def test_planted_counts():
    truth = [[(50, 50, 0), (80, 80, 0), (120, 120, 1), (30, 220, 0), (200, 200, -1)]]
    predicted = [[(51, 50, 0), (80, 83, 1), (120, 121, 0), (20, 180, 0), (201, 200, 0)]]
    counts = count(truth, predicted)
    assert total(counts, 0) == dict.fromkeys(COUNTS, 0) | {
        "n_truth": 5, "n_predicted": 5, "n_paired": 4, "tp": 4, "fp_unpaired": 1, "fn_unpaired": 1,
    }  # fmt: skip
    assert total(counts, 1) == dict.fromkeys(COUNTS, 0) | {
        "n_truth": 3, "n_predicted": 4, "n_paired": 2, "tp": 1, "fp_paired": 1, "fn_paired": 1,
        "fp_unpaired": 1, "fn_unpaired": 1, "n_ignored": 1,
    }  # fmt: skip
    precision, recall, f1 = scores(counts.sum(axis=0))[1]
    assert (precision, recall, f1) == (1 / 4, 1 / 4, 2 / 8)


def test_compat_differs_from_strict_by_exactly_the_points_on_empty_sides():
    cases = {
        "both empty": ([], [], {(0, "tp"): 1, (0, "n_inserted"): 2}),
        "lone prediction near the corner": ([], [(3, 4, 1), (30, 30, 0)], {
            (0, "tp"): 1, (0, "fp_unpaired"): -1, (0, "n_inserted"): 1, (2, "fp_paired"): 1, (2, "fp_unpaired"): -1,
        }),
        "lone prediction far away": ([], [(100, 100, 1)], {(0, "fn_unpaired"): 1, (0, "n_inserted"): 1}),
        "lone truth near the corner": ([(12, 0, 2)], [], {
            (0, "tp"): 1, (0, "fn_unpaired"): -1, (0, "n_inserted"): 1, (3, "fn_paired"): 1, (3, "fn_unpaired"): -1,
        }),
        "unlabelled lone truth near the corner": ([(1, 1, -1)], [], {
            (0, "tp"): 1, (0, "fn_unpaired"): -1, (0, "n_inserted"): 1,
        }),
        "lone truth far away": ([(100, 100, 2)], [], {(0, "fp_unpaired"): 1, (0, "n_inserted"): 1}),
        "both sides": ([(3, 3, 0)], [(100, 100, 1)], {}),
    }  # fmt: skip
    truth, predicted, expected = [list(side) for side in zip(*cases.values(), strict=True)]
    difference = count(truth, predicted, "hovernet_compat") - count(truth, predicted)
    for index, name in enumerate(cases):
        changed = {
            (int(row), COUNTS[field]): int(difference[index, row, field])
            for row, field in zip(*np.nonzero(difference[index]), strict=True)
        }
        assert changed == expected[index], name


def test_strict_scores_are_undefined_without_truth_and_zero_without_predictions():
    got = scores(count([[(50, 50, 0)]], [[(50, 50, 0), (90, 90, 2)]]).sum(axis=0))
    assert not np.isnan(got[:2]).any()
    assert np.isnan(got[2:]).all()
    assert (scores(count([[(50, 50, 0)]], [[]]).sum(axis=0))[:2] == 0).all()
    for n_images in (0, 2):
        assert np.isnan(scores(count([[]] * n_images, [[]] * n_images).sum(axis=0))).all()


def test_compat_scores_are_the_published_formula_wherever_it_gives_a_number():
    """Images without truth: a far detection of class 0, one near the corner of class 1, and none at all."""
    counts = count([[], [], []], [[(90, 90, 0)], [(3, 4, 1)], []], "hovernet_compat").sum(axis=0)
    assert total(counts[None], 0)["tp"] == 2
    values = scores(counts, "hovernet_compat")
    assert values[0].tolist() == [2 / 3, 2 / 3, 2 / 3]  # detection: TP 2, FPd 1, FNd 1
    np.testing.assert_array_equal(values[1], [0, np.nan, 0])  # FPd 1: R is 0/0
    np.testing.assert_array_equal(values[2], [0, np.nan, 0])  # FP 1, paired with the background
    assert np.isnan(values[3]).all()
    assert np.isnan(scores(counts)).all()


def test_row_names_keep_the_rest_of_a_name():
    assert row_names(("neoplastic", "NK", "B")) == ("Detection", "Neoplastic", "NK", "B")
