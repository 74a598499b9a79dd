"""Matching and scores against a reference that tries everything; boxes and their noise against counted pixels."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import tries

from celldetr.evaluation.matching import Nuclei, pair_nuclei
from celldetr.evaluation.metrics import COUNTS, METRICS, count_images, scores
from celldetr.model.boxes import cxcywh_to_xyxy, giou, noise, xyxy_to_cxcywh

CLASSES = 3
RADIUS = 5.0
POINTS = st.tuples(st.floats(0, 20), st.floats(0, 20))


def images(lowest):
    """Images with up to four labelled points each."""
    return st.lists(st.tuples(POINTS, st.integers(lowest, CLASSES - 1)), max_size=4)


FOLDS = st.lists(st.tuples(images(-1), images(0)), max_size=4)


def nuclei(fold):
    """Nuclei of a list of images."""
    points = [point for image in fold for point, _ in image]
    return Nuclei(
        np.cumsum([0, *map(len, fold)]),
        np.array(points, dtype=np.float64).reshape(-1, 2),
        np.array([label for image in fold for _, label in image], dtype=np.int64),
    )


def cheapest(true, predicted):
    """Pairs (i, j) of the assignment with the smallest sum of distances, and this sum, by trying all of them."""
    if len(true) > len(predicted):
        pairs, total = cheapest(predicted, true)
        return [(i, j) for j, i in pairs], total
    orders = itertools.permutations(range(len(predicted)), len(true))
    found = [
        (sum(np.hypot(*np.subtract(true[i], predicted[j])) for i, j in enumerate(order)), order) for order in orders
    ]
    total, order = min(found)
    return list(enumerate(order)), total


@tries(400)
@given(fold=FOLDS)
def test_pairs_are_those_of_the_cheapest_assignment(fold):
    truth, predicted = nuclei([true for true, _ in fold]), nuclei([found for _, found in fold])
    everything = pair_nuclei(truth, predicted, np.inf)
    near = pair_nuclei(truth, predicted, RADIUS)
    for image, (true, found) in enumerate(fold):
        here = truth.image[everything.truth] == image
        i, j = everything.truth[here] - truth.ptr[image], everything.predicted[here] - predicted.ptr[image]
        assert len(set(i)) == len(set(j)) == len(i) == min(len(true), len(found))
        total = sum(np.hypot(*np.subtract(true[a][0], found[b][0])) for a, b in zip(i, j, strict=True))
        _, best = cheapest([point for point, _ in true], [point for point, _ in found])
        assert total == pytest.approx(best, abs=1e-9)
    distance = np.linalg.norm(truth.centres[everything.truth] - predicted.centres[everything.predicted], axis=1)
    keep = distance <= RADIUS
    assert np.array_equal(near.truth, everything.truth[keep])
    assert np.array_equal(near.predicted, everything.predicted[keep])


def count_plainly(fold, pairs, metric):
    """Count one nucleus after another, as the paper describes it: row -> count -> number, of one image."""
    true, found = fold
    rows = [dict.fromkeys(COUNTS, 0) for _ in range(1 + CLASSES)]
    true, found = list(true), list(found)
    inserted = 0
    if metric == "hovernet_compat":
        lacks = [side for side in (true, found) if not side]
        inserted = len(lacks)
        real_true, real_found = len(true), len(found)
        for side in lacks:
            side.append(((0.0, 0.0), None))
        if lacks:
            near = min(
                (float(np.hypot(*np.subtract(a, b))), i, j)
                for i, (a, _) in enumerate(true)
                for j, (b, _) in enumerate(found)
            )
            pairs = [near[1:]] if near[0] <= RADIUS else []
    else:
        real_true, real_found = len(true), len(found)
    partner = dict(pairs)
    rows[0] |= {"n_truth": real_true, "n_predicted": real_found, "tp": len(pairs), "n_inserted": inserted}
    rows[0]["fn_unpaired"] = len(true) - len(pairs)
    rows[0]["fp_unpaired"] = len(found) - len(pairs)
    rows[0]["n_paired"] = sum(i < real_true and j < real_found for i, j in pairs)
    for i, (_, label) in enumerate(true):
        if label is None or label < 0:
            continue
        row = rows[1 + label]
        row["n_truth"] += 1
        if i not in partner:
            row["fn_unpaired"] += 1
            continue
        other = found[partner[i]][1]
        row["n_paired"] += other is not None
        row["tp" if other == label else "fn_paired"] += 1
    back = {j: i for i, j in pairs}
    for j, (_, label) in enumerate(found):
        if label is None:
            continue
        row = rows[1 + label]
        row["n_predicted"] += 1
        if j not in back:
            row["fp_unpaired"] += 1
        elif true[back[j]][1] == -1:
            row["n_ignored"] += 1
        elif true[back[j]][1] != label:
            row["fp_paired"] += 1
    rows[0]["n_ignored"] = 0
    return [[row[name] for name in COUNTS] for row in rows]


@tries(400)
@given(fold=FOLDS, metric=st.sampled_from(METRICS))
def test_counts_and_scores_are_those_of_the_definition(fold, metric):
    truth, predicted = nuclei([true for true, _ in fold]), nuclei([found for _, found in fold])
    pairs = pair_nuclei(truth, predicted, RADIUS)
    got = count_images(truth, predicted, pairs, CLASSES, metric=metric, radius=RADIUS)
    for image, content in enumerate(fold):
        here = truth.image[pairs.truth] == image
        own = zip(pairs.truth[here] - truth.ptr[image], pairs.predicted[here] - predicted.ptr[image], strict=True)
        want = count_plainly(content, [(int(i), int(j)) for i, j in own], metric)
        columns = [index for index, name in enumerate(COUNTS) if (name, metric) != ("n_ignored", "hovernet_compat")]
        assert got[image][1:, columns].tolist() == np.array(want)[1:, columns].tolist()
        detection = [index for index, name in enumerate(COUNTS) if name != "n_ignored"]
        assert got[image][0, detection].tolist() == np.array(want)[0, detection].tolist()
    total = got.sum(axis=0)
    for row, (precision, recall, f) in zip(total.tolist(), scores(total).tolist(), strict=True):
        value = dict(zip(COUNTS, row, strict=True))
        if not value["n_truth"]:
            assert np.isnan([precision, recall, f]).all()
            continue
        tp, over = value["tp"], 2 * value["fp_paired"] + value["fp_unpaired"]
        under = 2 * value["fn_paired"] + value["fn_unpaired"]
        assert precision == pytest.approx(tp / (tp + over) if tp + over else 0)
        assert recall == pytest.approx(tp / (tp + under) if tp + under else 0)
        mean = 2 * precision * recall / (precision + recall) if precision + recall else 0
        assert f == pytest.approx(mean)


CORNERS = st.lists(st.integers(0, 12), min_size=4, max_size=4)


@tries(400)
@given(first=CORNERS, second=CORNERS)
def test_overlap_is_that_of_counted_pixels(first, second):
    pixels = []
    boxes = []
    for x0, y0, x1, y1 in (first, second):
        box = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
        grid = np.zeros((12, 12), bool)
        grid[box[1] : box[3], box[0] : box[2]] = True
        boxes.append(box)
        pixels.append(grid)
    union, both = (pixels[0] | pixels[1]).sum(), (pixels[0] & pixels[1]).sum()
    a, b = torch.tensor(boxes, dtype=torch.float32)
    want = both / union if union else 0.0
    low, high = torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:])
    hull = float((high - low).prod())
    assert float(giou(a, b)) == pytest.approx(want - ((hull - union) / hull if hull else 0), abs=1e-5)
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(a)), a, atol=1e-5)


@tries(300)
@given(
    box=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(1e-3, 1), st.floats(1e-3, 1)),
    draws=st.lists(st.floats(0, 0.999), min_size=9, max_size=9),
    magnitudes=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
    enlarge=st.floats(0, 1),
)
def test_noised_boxes_stay_in_the_image_and_on_their_nucleus(box, draws, magnitudes, enlarge):
    x, y, width, height = box
    corners = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2]).clamp(0, 1)
    given_box = xyxy_to_cxcywh(corners)
    low, high = magnitudes
    found = noise(given_box, torch.tensor(draws), low=low, high=high, enlarge=enlarge)
    assert torch.isfinite(found).all()
    assert (found[2:] > 0).all()
    after = cxcywh_to_xyxy(found)
    assert (after >= -1e-5).all()
    assert (after <= 1 + 1e-5).all()
    assert (found[:2] >= corners[:2] - 1e-5).all()
    assert (found[:2] <= corners[2:] + 1e-5).all()
    assert (found[2:] <= given_box[2:] * (1 + high) + 1e-5).all()
