"""Classes weighed by their frequency in the class loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from celldetr.training.losses import class_loss, class_weights


@given(st.lists(st.integers(-1, 4), max_size=60), st.sampled_from([0.0, 0.5, 1.0]))
def test_class_weights_keep_the_sum_and_favour_the_rare(labels, exponent):
    labels = np.array(labels, dtype=np.int8)
    weights = np.array(class_weights(labels, 5, exponent))
    known = labels[labels >= 0]
    if len(known):
        assert weights[known].mean() == pytest.approx(1)
        counts = np.bincount(known, minlength=5)
        present = counts > 0
        assert (np.diff(weights[present][np.argsort(counts[present], kind="stable")]) <= 1e-9).all()
        if exponent == 1:
            assert np.ptp((weights * counts)[present]) == pytest.approx(0, abs=1e-9)


def test_class_loss_takes_the_weights():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, -1, 1, 0])
    one = [float(class_loss(logits[[i]], labels[[i]], 1.0)) for i in range(6)]
    weighted = float(class_loss(logits, labels, 2.0, torch.tensor([2.0, 0.5, 1.0])))
    expected = (2 * one[0] + 0.5 * one[1] + one[2] + 0.5 * one[4] + 2 * one[5]) / 2
    assert weighted == pytest.approx(expected, rel=1e-5)
