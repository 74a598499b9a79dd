"""Matching of queries to nuclei."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import match, random_detections

from celldetr.config.experiment import MatchingSettings
from celldetr.runtime.errors import NonFinite
from celldetr.training.data import Targets
from celldetr.training.matching import assign, costs

SETTINGS = MatchingSettings()


def plain_cost(logits, box, true, label):
    """Cost of one query for one nucleus, in plain numbers."""
    p = 1 / (1 + np.exp(-float(logits[label])))
    focal = 0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p**2 * -np.log(1 - p)
    (ax, ay, aw, ah), (bx, by, bw, bh) = box.tolist(), true.tolist()
    wide = [min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2), max(ax + aw / 2, bx + bw / 2)]
    high = [min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2), max(ay + ah / 2, by + bh / 2)]
    inner = max(wide[0], 0) * max(high[0], 0)
    union = aw * ah + bw * bh - inner
    hull = (wide[1] - min(ax - aw / 2, bx - bw / 2)) * (high[1] - min(ay - ah / 2, by - bh / 2))
    giou = inner / union - (hull - union) / hull
    l1 = abs(ax - bx) + abs(ay - by) + abs(aw - bw) + abs(ah - bh)
    return 2 * focal + 5 * l1 - 2 * giou


@pytest.mark.parametrize("classes", [1, 3])
def test_costs_are_those_of_the_paper(classes):
    logits, boxes, targets = random_detections([3, 2], classes=classes)
    table = costs(logits, boxes, targets, SETTINGS)
    for layer, image in itertools.product(range(2), range(2)):
        for box, query in itertools.product(range(targets.counts[image]), range(7)):
            label = int(targets.labels[image, box]) if classes > 1 else 0
            one = plain_cost(logits[layer, image, query], boxes[layer, image, query], targets.boxes[image, box], label)
            assert float(table[layer, image, box, query]) == pytest.approx(one, abs=1e-4)


def test_every_image_gets_its_cheapest_assignment():
    logits, boxes, targets = random_detections([3, 0, 2], queries=4)
    found = match(logits, boxes, targets)
    table = costs(logits, boxes, targets, SETTINGS).numpy()
    for layer, image in itertools.product(range(2), range(3)):
        count = int(targets.counts[image])
        query = found[layer, image, :count].tolist()
        assert len(set(query)) == count
        assert (found[layer, image, count:] == -1).all()
        best = min(
            sum(table[layer, image, k, q] for k, q in enumerate(chosen))
            for chosen in itertools.permutations(range(4), count)
        )
        assert sum(table[layer, image, k, q] for k, q in enumerate(query)) == pytest.approx(best, abs=1e-5)


def test_an_image_is_matched_alone_as_in_a_batch():
    logits, boxes, targets = random_detections([5, 1, 0, 3])
    together = match(logits, boxes, targets)
    for image in range(4):
        alone = match(
            logits[:, image : image + 1],
            boxes[:, image : image + 1],
            Targets(*(values[image : image + 1] for values in vars(targets).values())),
        )
        assert torch.equal(together[:, image], alone[:, 0])


def test_more_nuclei_than_queries_uses_every_query_once():
    logits, boxes, targets = random_detections([6], queries=3, layers=1)
    found = match(logits, boxes, targets)
    assert sorted(found.flatten().tolist()) == [-1, -1, -1, 0, 1, 2]


def test_a_nucleus_without_a_label_takes_its_cheapest_class():
    logits, boxes, targets = random_detections([1], classes=3, layers=1)
    by_class = []
    for label in range(3):
        labelled = replace(targets, labels=torch.full_like(targets.labels, label))
        by_class.append(costs(logits, boxes, labelled, SETTINGS))
    unlabelled = replace(targets, labels=torch.full_like(targets.labels, -1))
    got = costs(logits, boxes, unlabelled, SETTINGS)
    assert torch.allclose(got, torch.stack(by_class).amin(dim=0))


def test_a_cost_that_is_no_number_is_an_error_but_not_in_padding():
    logits, boxes, targets = random_detections([2, 0])
    logits[0, 1] = float("nan")
    match(logits, boxes, targets)
    logits[0, 0, 3] = float("nan")
    with pytest.raises(NonFinite):
        match(logits, boxes, targets)


def test_assign_takes_the_rows_of_the_image_only():
    cost = np.zeros((1, 1, 2, 2), np.float32)
    cost[0, 0] = [[0, 1], [-9, -9]]
    assert assign(cost, np.array([1])).tolist() == [[[0, -1]]]
