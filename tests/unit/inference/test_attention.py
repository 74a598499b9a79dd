"""Nuclei that figure 3 draws, and shares of attention that were planted."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from celldetr.inference import attention
from celldetr.inference.attention import PatchAttention, choose_nuclei, measure_attention, share_inside

SIZE = 64


@dataclass(frozen=True)
class Store:
    box_ptr: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    patch_size: int = SIZE

    @property
    def n_patches(self):
        return len(self.box_ptr) - 1


def make_store(n_patches=60):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, n_patches)
    low = rng.uniform(0, SIZE - 4, (sizes.sum(), 2))
    boxes = np.concatenate([low, np.minimum(low + rng.uniform(1, 14, low.shape), SIZE)], axis=1)
    labels = rng.choice((0, 1, 2, 4), sizes.sum()).astype(np.int8)
    return Store(np.cumsum([0, *sizes]), boxes.astype(np.float32), labels)


def test_nuclei_are_of_different_classes_and_patches_and_well_inside_and_follow_the_seed():
    store = make_store()
    drawn = [choose_nuclei(store, 4, seed) for seed in range(10)]
    for chosen in drawn:
        assert store.labels[chosen].tolist() == [0, 1, 2, 4]
        assert len(set(np.searchsorted(store.box_ptr, chosen, side="right"))) == 4
        edge = attention.MARGIN * SIZE
        assert (store.boxes[chosen, :2] >= edge).all()
        assert (store.boxes[chosen, 2:] <= SIZE - edge).all()
    assert np.array_equal(choose_nuclei(store, 4, 1), drawn[1])
    assert len({tuple(chosen) for chosen in drawn}) > 5
    twelve = choose_nuclei(store, 12, 0)
    assert len(set(twelve.tolist())) == 12
    assert np.bincount(store.labels[twelve]).tolist() == [3, 3, 3, 0, 3]


def test_fewer_nuclei_than_asked_for_are_all_drawn():
    few = Store(np.array([0, 2, 2]), np.array([[0, 0, 1, 1], [60, 60, 64, 64]], np.float32), np.array([0, -1], np.int8))
    assert choose_nuclei(few, 4, 0).tolist() == [0]
    unlabelled = replace(few, labels=np.array([-1, -1], np.int8))
    assert choose_nuclei(unlabelled, 4, 0).tolist() == [0, 1]
    none = Store(np.array([0, 0]), np.empty((0, 4), np.float32), np.empty(0, np.int8))
    assert choose_nuclei(none, 4, 0).tolist() == []


def test_share_is_the_weight_of_the_points_inside():
    points = np.array([[[1, 1], [5, 5], [10, 3], [11, 3]], [[0, 0], [0, 0], [0, 0], [0, 0]]], dtype=float)
    weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    boxes = np.array([[5, 3, 10, 6], [1, 1, 2, 2]], dtype=float)
    assert share_inside(points, weights, boxes) == pytest.approx([0.5, 0.0])  # edges count
    assert share_inside(points, 7 * weights, boxes) == pytest.approx([0.5, 0.0])
    assert share_inside(points[:0], weights[:0], boxes[:0]).shape == (0,)


def planted(store, *, shift=0.0, spread=0.0):
    """Detect every nucleus of a store, `shift` px away from it.

    Three quarters of its attention lie on the centre of the true box, the rest `spread` box widths to the right.
    """
    for index in range(store.n_patches):
        true = store.read(index).boxes
        points = np.repeat((true[:, None, :2] + true[:, None, 2:]) / 2, 4, axis=1)
        points[:, 3, 0] += spread * (true[:, 2] - true[:, 0])
        yield PatchAttention(true + shift, points, np.full((len(true), 4), 0.25))


def measure(store, radius=12.0, **options):
    chosen = choose_nuclei(store, 3, 0)
    return chosen, *measure_attention(planted(store, **options), store, nuclei=chosen, radius=radius)


def test_shares_are_those_that_were_planted(store):
    chosen, drawn, share = measure(store, spread=3.0)
    assert share["share_true_box"] == share["share_predicted_box"] == pytest.approx(0.75)
    assert share["nuclei"] == share["n_truth"] == share["n_detections"] == len(store.labels)
    assert [item["nuclei"] for item in share["classes"].values()] == np.bincount(store.labels).tolist()
    assert drawn.found.all()
    assert np.array_equal(drawn.nucleus, chosen)
    assert np.array_equal(drawn.box, store.boxes[chosen])
    assert drawn.points.shape == (3, 4, 2)
    np.testing.assert_allclose(share_inside(drawn.points, drawn.weights, drawn.true_box), 0.75)
    np.testing.assert_allclose(drawn.points[:, 0], (drawn.true_box[:, :2] + drawn.true_box[:, 2:]) / 2)
    assert np.array_equal(drawn.image[:, 0, 0, 0], drawn.patch)
    assert measure(store, spread=0.2)[2]["share_true_box"] == pytest.approx(1)


def test_true_and_predicted_box_are_told_apart_and_nuclei_without_a_detection_are_missed(store):
    share = measure(store, shift=7.0)[2]
    assert share["share_true_box"] == pytest.approx(1)
    assert share["share_predicted_box"] < 0.2
    _, drawn, share = measure(store, shift=300.0)
    assert not drawn.found.any()
    assert np.isnan(drawn.box).all()
    assert (share["nuclei"], share["share_true_box"]) == (0, None)
    assert share["n_detections"] == len(store.labels)
