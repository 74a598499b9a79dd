"""Figure 5: composition and confusion of cell types, on planted predictions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_folds import Fold, detections

from celldetr.report.figure5 import MISSED, composition, confusion, figure5a, figure5b
from celldetr.report.style import save
from celldetr.runtime.errors import InputError

CLASSES = ("T", "B", "Mast")


def fold(labels):
    """Make one patch with nuclei 20 px apart."""
    centres = 10 + 20 * np.arange(len(labels))
    boxes = np.stack([centres - 4, centres - 4, centres + 4, centres + 4], axis=1).astype(np.float32)
    return Fold(np.array([0, len(labels)]), boxes, np.array(labels), np.full((len(labels), 2), np.nan), CLASSES)


def predict(truth, nuclei, labels, best=0.9):
    return detections(
        np.zeros(len(nuclei)), truth.boxes[nuclei] + 1, labels, 1, nucleus=0.8, best=best, classes=CLASSES
    )


def test_confusion_counts_pairs_and_the_missed_and_leaves_out_the_unlabelled():
    truth = fold([0, 0, 1, 2, -1, 1])
    table = confusion(predict(truth, [0, 1, 2, 4, 5], [0, 1, 1, 2, 0]), truth, 0.4, radius_um=1.5)
    assert table.loc["T"].tolist() == [1, 1, 0, 0]
    assert table.loc["B"].tolist() == [1, 1, 0, 0]
    assert table.loc["Mast"].tolist() == [0, 0, 0, 1]
    assert table.to_numpy().sum() == 5


def test_confusion_follows_the_nucleus_threshold_and_the_radius_but_no_class_score():
    truth = fold([0, 1])
    weak = predict(truth, [0, 1], [0, 1], best=0.15)
    assert confusion(weak, truth, 0.4, radius_um=1.5)[MISSED].sum() == 0
    assert confusion(weak, truth, 0.9, radius_um=1.5)[MISSED].sum() == 2
    assert confusion(weak, truth, 0.4, radius_um=0.25)[MISSED].sum() == 2


def test_confusion_refuses_predictions_of_other_patches():
    truth = fold([0, 1])
    found = predict(truth, [0], [0])
    with pytest.raises(InputError, match="predict this split again"):
        confusion(found, replace(truth, digest="d2"), 0.4, radius_um=1.5)


def test_composition_and_pictures(tmp_path):
    counts = {f"s{k}": {"T": 5 * k, "B": 2, "unlabelled": 3} for k in range(6)}
    table = composition(counts)
    assert table.loc["s2"].tolist() == [10, 2, 3]
    save(figure5a(table, {name: name.upper() for name in counts}), tmp_path / "a.png")
    confused = pd.DataFrame([[3, 1, 0], [0, 0, 0]], index=["T", "B"], columns=["T", "B", MISSED])
    save(figure5b(confused, "test"), tmp_path / "b.svg")
    text = (tmp_path / "b.svg").read_text()
    assert "0.75" in text
    assert "T (4)" in text
    assert "B (0)" in text
