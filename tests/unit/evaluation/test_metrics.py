"""Counts and scores of detection and classes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.evaluation.matching import Nuclei, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, METRICS, count_images, row_names, scores

K = 3
RADIUS = 12.0


def fold(images):
    """Build `Nuclei` from lists of (x, y, label), one list per image."""
    rows = np.array(list(itertools.chain(*images)), dtype=float).reshape(-1, 3)
    return Nuclei(np.cumsum([0, *map(len, images)]), rows[:, :2], rows[:, 2].astype(np.int8))


def count(true_images, predicted_images, metric="strict", n_classes=K):
    truth, predicted = fold(true_images), fold(predicted_images)
    pairs = pair_nuclei(truth, predicted, RADIUS)
    return count_images(truth, predicted, pairs, n_classes, metric=metric, radius=RADIUS)


def total(counts, row):
    return dict(zip(COUNTS, counts.sum(axis=0)[row].tolist(), strict=True))


def random_images(seed, n_images=8, most=4, lowest=0, size=40):
    rng = np.random.default_rng(seed)
    return [
        [(*rng.uniform(0, size, 2), rng.integers(lowest, K)) for _ in range(rng.integers(0, most + 1))]
        for _ in range(n_images)
    ]


def brute_force(true_images, predicted_images, metric):
    """Independent form: HoVer-Net's lists, exhaustive assignment, one nucleus at a time. Returns (1 + K, 3)."""
    paired, lone_true, lone_predicted = [], [], []
    for true, found in zip(true_images, predicted_images, strict=True):
        true, found = [tuple(t) for t in true], [tuple(p) for p in found]
        if metric == "hovernet_compat":
            true = true or [(0.0, 0.0, "background")]
            found = found or [(0.0, 0.0, "background")]

        def distance(t, p):
            return ((t[0] - p[0]) ** 2 + (t[1] - p[1]) ** 2) ** 0.5

        k = min(len(true), len(found))
        best = min(
            (
                list(zip(some, chosen, strict=True))
                for some in itertools.combinations(range(len(true)), k)
                for chosen in itertools.permutations(range(len(found)), k)
            ),
            key=lambda option: sum(distance(true[i], found[j]) for i, j in option),
        )
        near = [(i, j) for i, j in best if distance(true[i], found[j]) <= RADIUS]
        paired += [(true[i][2], found[j][2]) for i, j in near]
        lone_true += [t[2] for i, t in enumerate(true) if i not in {i for i, _ in near}]
        lone_predicted += [p[2] for j, p in enumerate(found) if j not in {j for _, j in near}]

    def prf(tp, fp, fn, fpd, fnd, exists):
        if not exists:
            return [np.nan] * 3
        bottoms = (tp + 2 * fp + fpd, tp + 2 * fn + fnd, 2 * tp + 2 * fp + 2 * fn + fpd + fnd)
        return [top / bottom if bottom else 0.0 for top, bottom in zip((tp, tp, 2 * tp), bottoms, strict=True)]

    rows = [prf(len(paired), 0, 0, len(lone_predicted), len(lone_true), any(true_images))]
    for c in range(K):
        tp = sum(t == c and p == c for t, p in paired)
        fp = sum(t != c and t != -1 and p == c for t, p in paired)
        fn = sum(t == c and p != c for t, p in paired)
        exists = any(t[2] == c for image in true_images for t in image)
        rows.append(prf(tp, fp, fn, lone_predicted.count(c), lone_true.count(c), exists))
    return np.array(rows)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(15))
def test_agrees_with_an_independent_form(metric, seed):
    truth, predicted = random_images(seed, lowest=-1), random_images(1000 + seed)
    got = scores(count(truth, predicted, metric).sum(axis=0))
    np.testing.assert_allclose(got, brute_force(truth, predicted, metric), rtol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_predictions_score_one(metric):
    truth = [image for image in random_images(3, n_images=40) if image]
    assert (scores(count(truth, truth, metric).sum(axis=0)) == 1).all()


def test_right_places_with_wrong_classes_detect_all_and_classify_none():
    truth = [[(50, 50, 0), (90, 90, 1)]]
    got = scores(count(truth, [[(50, 50, 1), (90, 90, 0)]]).sum(axis=0))
    assert got[0].tolist() == [1, 1, 1]
    assert got[1:3].tolist() == [[0, 0, 0], [0, 0, 0]]


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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(1, 50))
def test_f_is_the_harmonic_mean(errors, n_truth):
    values = dict.fromkeys(COUNTS, 0) | dict(
        zip(("tp", "fp_paired", "fn_paired", "fp_unpaired", "fn_unpaired"), errors, strict=True)
    )
    values["n_truth"] = n_truth
    precision, recall, f1 = scores(np.array([values[name] for name in COUNTS]))
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert f1 == pytest.approx(expected, abs=1e-12)
    assert 0 <= f1 <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_order_of_nuclei_does_not_matter(metric):
    truth, predicted = random_images(5, lowest=-1, size=256), random_images(6, most=8, size=256)
    rng = np.random.default_rng(0)
    shuffled = [[image[i] for i in rng.permutation(len(image))] for image in predicted]
    turned = [image[::-1] for image in truth]
    assert np.array_equal(count(truth, predicted, metric), count(turned, shuffled, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_counts_add_up(metric):
    counts = count(random_images(7, 60, lowest=-1), random_images(8, 60), metric)
    for row in range(1 + K):
        n = total(counts, row)
        inserted = n["n_inserted"] if row == 0 else 0
        known = (
            n["tp"] + n["fn_paired"] + n["fn_unpaired"],
            n["tp"] + n["fp_paired"] + n["fp_unpaired"] + n["n_ignored"],
        )
        assert known[0] + known[1] == n["n_truth"] + n["n_predicted"] + inserted
        if row:
            assert known == (n["n_truth"], n["n_predicted"])


def test_compat_differs_from_strict_by_exactly_the_points_on_empty_sides():
    images = {
        "both empty": ([], []),
        "lone prediction near the corner": ([], [(3, 4, 1), (30, 30, 0)]),
        "lone prediction far away": ([], [(100, 100, 1)]),
        "lone truth near the corner": ([(12, 0, 2)], []),
        "lone truth without a label near the corner": ([(1, 1, -1)], []),
        "lone truth far away": ([(100, 100, 2)], []),
        "both sides": ([(3, 3, 0)], [(100, 100, 1)]),
    }
    truth, predicted = [list(side) for side in zip(*images.values(), strict=True)]
    difference = count(truth, predicted, "hovernet_compat") - count(truth, predicted)
    expected = {
        "both empty": {(0, "tp"): 1, (0, "n_inserted"): 2},
        "lone prediction near the corner": {
            (0, "tp"): 1, (0, "fp_unpaired"): -1, (0, "n_inserted"): 1, (2, "fp_paired"): 1, (2, "fp_unpaired"): -1,
        },
        "lone prediction far away": {(0, "fn_unpaired"): 1, (0, "n_inserted"): 1},
        "lone truth near the corner": {
            (0, "tp"): 1, (0, "fn_unpaired"): -1, (0, "n_inserted"): 1, (3, "fn_paired"): 1, (3, "fn_unpaired"): -1,
        },
        "lone truth without a label near the corner": {(0, "tp"): 1, (0, "fn_unpaired"): -1, (0, "n_inserted"): 1},
        "lone truth far away": {(0, "fp_unpaired"): 1, (0, "n_inserted"): 1},
        "both sides": {},
    }  # fmt: skip
    for index, name in enumerate(images):
        changed = {
            (int(row), COUNTS[field]): int(difference[index, row, field])
            for row, field in zip(*np.nonzero(difference[index]), strict=True)
        }
        assert changed == expected[name], name


def test_compat_adds_no_class_true_positive():
    truth, predicted = random_images(11, 80), random_images(12, 80)
    strict, compat = count(truth, predicted), count(truth, predicted, "hovernet_compat")
    tp = COUNTS.index("tp")
    assert np.array_equal(strict[:, 1:, tp], compat[:, 1:, tp])


def test_nuclei_without_a_label_count_for_detection_only():
    truth = [[(50, 50, -1), (90, 90, -1)]]
    counts = count(truth, [[(50, 50, 0), (150, 150, 1)]])
    assert total(counts, 0)["tp"] == 1
    assert total(counts, 0)["fn_unpaired"] == 1
    assert total(counts, 1) == dict.fromkeys(COUNTS, 0) | {"n_predicted": 1, "n_ignored": 1}
    assert total(counts, 2)["fp_unpaired"] == 1


@pytest.mark.parametrize("metric", METRICS)
def test_class_without_truth_is_undefined_not_zero(metric):
    got = scores(count([[(50, 50, 0)]], [[(50, 50, 0), (90, 90, 2)]], metric).sum(axis=0))
    assert not np.isnan(got[:2]).any()
    assert np.isnan(got[2:]).all()


def test_truth_without_predictions_scores_zero_and_nothing_at_all_is_undefined():
    assert (scores(count([[(50, 50, 0)]], [[]]).sum(axis=0))[:2] == 0).all()
    for metric in METRICS:
        assert np.isnan(scores(count([[], []], [[], []], metric).sum(axis=0))).all()
        assert np.isnan(scores(count([], [], metric).sum(axis=0))).all()


def test_refuses_unknown_metric_and_labels_out_of_range():
    with pytest.raises(ValueError, match="metric"):
        count([[]], [[]], "dice")
    with pytest.raises(ValueError, match="truth labels: got 0 to 7, expected -1 to 2"):
        count([[(1, 1, 7), (9, 9, 0)]], [[]])
    with pytest.raises(ValueError, match="predicted labels"):
        count([[]], [[(1, 1, -1)]])


def test_row_names_keep_the_rest_of_a_name():
    assert row_names(("neoplastic", "NK", "B")) == ("Detection", "Neoplastic", "NK", "B")
