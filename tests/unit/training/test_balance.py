"""Weights of patches with planted frequencies of classes and tissues."""

import numpy as np
import pytest

from celldetr.training.balance import sampling_weights

# class 0 in 90 patches, class 1 in 10, which are the only ones of tissue 7
PRESENT = np.zeros((100, 3), dtype=bool)
PRESENT[:90, 0] = PRESENT[90:, 1] = True
TISSUES = np.where(np.arange(100) < 90, 3, 7)


def test_without_balance_all_patches_are_equal():
    assert np.ptp(sampling_weights(PRESENT, TISSUES, 0)) == 0


def test_full_balance_draws_single_classes_and_tissues_equally_often():
    weights = sampling_weights(PRESENT, TISSUES, 1)
    assert weights[:90].sum() == pytest.approx(weights[90:].sum())
    assert weights[90:] == pytest.approx(2)


@pytest.mark.parametrize("balance", [0.2, 0.85])
def test_weights_follow_the_published_formula(balance):
    # 100 class-patch pairs: shares .9 and .1, and the same of tissues
    cell = [1 - balance + balance / (balance * share + 1 - balance) for share in (0.9, 0.1)]
    tissue = [1 / (balance * share + 1 - balance) for share in (0.9, 0.1)]
    weights = sampling_weights(PRESENT, TISSUES, balance)
    assert weights[90:] == pytest.approx(2)
    assert weights[:90] == pytest.approx(cell[0] / cell[1] + tissue[0] / tissue[1])


def test_a_patch_with_a_rare_class_beside_a_frequent_one_comes_more_often():
    both = PRESENT.copy()
    both[0, 2] = True
    weights = sampling_weights(both, np.zeros(100, int), 0.85)
    assert weights[0] == weights.max() > weights[95] > weights[1]


def test_patches_without_nuclei_are_drawn_as_the_most_frequent_ones():
    empty = PRESENT.copy()
    empty[[5, 95]] = False
    weights = sampling_weights(empty, np.zeros(100, int), 0.85)
    assert weights[5] == weights[95] == weights[1] < weights[96]


@pytest.mark.parametrize("balance", [0, 0.85, 1])
def test_patches_without_any_nucleus_differ_by_tissue_alone(balance):
    weights = sampling_weights(np.zeros((100, 3), dtype=bool), TISSUES, balance)
    assert np.isfinite(weights).all()
    assert len(np.unique(weights)) == 1 + (balance > 0)


def test_order_and_numbers_of_tissues_do_not_matter():
    order = np.random.default_rng(0).permutation(100)
    weights = sampling_weights(PRESENT, TISSUES, 0.85)
    assert np.array_equal(sampling_weights(PRESENT[order], -TISSUES[order], 0.85), weights[order])
