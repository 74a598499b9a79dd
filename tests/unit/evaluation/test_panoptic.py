"""Panoptic quality: planted cases worked out by hand, a slow count after the definition, and time."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_folds import CLASSES, Fold

from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.panoptic import image_quality, panoptic_quality, write_panoptic
from celldetr.evaluation.predictions import Predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.runtime.errors import InputError

SIZE = 24


def blocks(*corners, size=SIZE):
    """Instance map of rectangles (x0, y0, x1, y1); later ones lie on top."""
    found = np.zeros((size, size), np.uint16)
    for index, (x0, y0, x1, y1) in enumerate(corners):
        found[y0:y1, x0:x1] = index + 1
    return found


def fold_of(maps, labels, tissues=None):
    """Make a fold of instance maps (N, S, S) with the labels of the nuclei of each."""
    count = [len(each) for each in labels]
    boxes = [box_of(image == index + 1) for image, n in zip(maps, count, strict=True) for index in range(n)]
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    labels = np.concatenate([np.empty(0, np.int8), *labels]).astype(np.int8)
    tissues = tuple(tissues or ["Breast"] * len(maps))
    return Fold(np.cumsum([0, *count]), boxes, labels, boxes[:, :2], maps=np.array(maps), tissues=tissues)


def box_of(pixels):
    rows, columns = np.nonzero(pixels)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def segmented(maps, labels, **metadata):
    """Make what a system finds whose masks give these instance maps: (N, S, S), labels of the nuclei of each."""
    patch, query, boxes, masks = [], [], [], []
    for index, (image, of_image) in enumerate(zip(maps, labels, strict=True)):
        for number in range(len(of_image)):
            x0, y0, x1, y1 = box_of(image == number + 1)
            patch.append(index)
            query.append(number)
            boxes.append((x0, y0, x1, y1))
            masks.append((image == number + 1)[y0:y1, x0:x1])
    flat = np.concatenate([np.empty(0, int), *labels]).astype(int)
    return Predictions(
        patch=np.array(patch, dtype=np.int32),
        query=np.array(query, dtype=np.int16),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        nucleus_score=np.full(len(flat), np.float32(0.01)),  # no threshold of CellDETR is for them
        class_scores=np.eye(len(CLASSES), dtype=np.float32)[flat] / 4,
        classes=CLASSES,
        n_patches=len(maps),
        metadata={"nucleus_threshold": 0.0, "mode": "segmentation", "store_digest": "d1", "test_store": "x"} | metadata,
        masks=masks,
    )


def quality(fold, found, tissue="All"):
    """Rows of a tissue by class."""
    table = panoptic_quality(found, fold)
    return table[table["tissue"] == tissue].set_index("class")


SQUARES = blocks((0, 0, 8, 8), (8, 0, 16, 8), (2, 12, 10, 20), (14, 14, 20, 20))  # the first two touch
LABELS = [0, 0, 1, 2]
PLANTED = {
    "perfect": (SQUARES, LABELS, 1, 1),
    "numbered otherwise": ((5 - SQUARES) * (SQUARES > 0), LABELS[::-1], 1, 1),
    "shifted by 2": (np.roll(SQUARES, 2, axis=1), LABELS, 6 / 8, 48 / 80),  # 24 / 48 of the last is not above 0.5
    "shifted by 3": (np.roll(SQUARES, 3, axis=1), LABELS, 0, 0),  # 40 / 88, and 18 / 54 of the last
    "merged": (blocks((0, 0, 16, 8), (2, 12, 10, 20), (14, 14, 20, 20)), [0, 1, 2], 4 / 7, 1),  # 64 / 128 twice
    "split": (
        blocks((0, 0, 8, 8), (8, 0, 16, 8), (2, 12, 10, 18), (2, 18, 10, 20), (14, 14, 20, 20)),
        [0, 0, 1, 1, 2],
        8 / 9,
        (3 + 48 / 64) / 4,
    ),
    "two missed": (blocks((0, 0, 8, 8), (8, 0, 16, 8)), [0, 0], 4 / 6, 1),
    "nothing": (blocks(), [], 0, 0),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_cases(name):
    predicted, labels, dq, sq = PLANTED[name]
    found = quality(fold_of([SQUARES], [LABELS]), segmented([predicted], [labels]))
    assert found.loc["Detection", ["pq", "dq", "sq"]].tolist() == pytest.approx([dq * sq, dq, sq])


def test_classes_are_counted_apart_and_a_class_without_truth_is_left_out():
    """Of two nuclei of class 0 one is found, the other is taken for class 1, which has one nucleus that is missed."""
    truth = blocks((0, 0, 8, 8), (8, 0, 16, 8), (2, 12, 10, 20))
    predicted = blocks((0, 0, 8, 8), (8, 0, 16, 8), (16, 16, 20, 20))
    found = quality(fold_of([truth], [[0, 0, 1]]), segmented([predicted], [[0, 1, 2]]))
    expected = {"Detection": 4 / 6, "Neoplastic": 2 / 3, "Inflammatory": 0, "Connective": np.nan, "mPQ": 1 / 3}
    assert found["pq"].to_dict() == pytest.approx(expected, nan_ok=True)
    assert found["images"].to_dict() == {name: int(name != "Connective") for name in expected}
    assert found.loc["Connective", ["dq", "sq"]].isna().all()


def test_swapped_classes_lower_the_classes_alone():
    fold = fold_of([SQUARES], [LABELS])
    found = quality(fold, segmented([SQUARES], [[1, 1, 0, 2]]))
    assert found["pq"].to_dict() == pytest.approx(
        {"Detection": 1, "Neoplastic": 0, "Inflammatory": 0, "Connective": 1, "mPQ": 1 / 3}
    )


def test_means_are_over_images_then_tissues():
    """Three images of one tissue, of which one is empty, and one of another; halves are found, or all."""
    half = blocks((0, 0, 8, 8), (8, 0, 16, 8))
    maps, labels = [SQUARES, SQUARES, blocks(), half], [LABELS, LABELS, [], [0, 0]]
    fold = fold_of(maps, labels, ["Skin", "Skin", "Skin", "Lung"])
    found = segmented([SQUARES, half, half, blocks()], [LABELS, [0, 0], [0, 0], []])
    skin, lung, overall = (quality(fold, found, tissue) for tissue in ("Skin", "Lung", "All"))
    first, second = (1, 1, 1, 1, 1), (4 / 6, 1, 0, 0, 1 / 3)
    assert skin["pq"].tolist() == pytest.approx(np.mean([first, second], axis=0))  # nothing for the false nuclei
    assert skin["images"].tolist() == [2] * 5
    assert lung["pq"].tolist() == pytest.approx([0, 0, np.nan, np.nan, 0], nan_ok=True)
    by_tissue = (np.mean([first, second], axis=0) + 0) / 2
    assert overall["pq"].tolist() == pytest.approx([by_tissue[0], 2 / 3, 1 / 2, 1 / 2, by_tissue[4]])
    assert overall["images"].tolist() == [3, 3, 2, 2, 3]
    assert list(panoptic_quality(found, fold)["tissue"].unique()) == ["All", "Lung", "Skin"]


def test_of_masks_that_overlap_the_more_certain_one_has_the_pixels():
    truth = blocks((0, 0, 8, 8))
    for scores, expected in (((0.9, 0.8), 1.0), ((0.8, 0.9), 2 / 3 * 40 / 64)):
        both = segmented([truth, blocks((0, 0, 3, 8))], [[0], [0]])
        found = replace(
            both,
            patch=np.zeros(2, np.int32),
            query=np.arange(2, dtype=np.int16),
            n_patches=1,
            nucleus_score=np.array(scores, dtype=np.float32),
        )
        # under the certain one, the other has no pixel left; on top of it, it leaves 40 of 64 px
        assert quality(fold_of([truth], [[0]]), found).loc["Detection", "pq"] == pytest.approx(expected)


def test_unlabelled_nuclei_are_true_for_detection_and_cost_no_class():
    fold = fold_of([SQUARES], [[0, 0, -1, 2]])
    found = quality(fold, segmented([SQUARES], [[0, 0, 0, 2]]))
    assert found["pq"].tolist() == pytest.approx([1, 1, np.nan, 1, 1], nan_ok=True)
    absent = quality(fold_of([SQUARES], [LABELS]), segmented([SQUARES], [[0, 0, 0, 2]], absent=[CLASSES[1]]))
    assert absent["pq"].tolist() == pytest.approx([1, 1, np.nan, 1, 1], nan_ok=True)


def random_map(rng, most=9):
    """Overlapping ellipses, of which some hide others, and the number of those."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    found = np.zeros((SIZE, SIZE), np.int64)
    count = int(rng.integers(0, most))
    for index in range(count):
        x, y, a, b = *rng.uniform(0, SIZE, 2), *rng.uniform(2, 6, 2)
        found[((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 < 1] = index + 1
    return found, count


def slow_quality(truth, predicted):
    """PQ, DQ, SQ of lists of sets of pixels, by the definition."""
    if not truth:
        return [np.nan] * 3
    ious = [len(t & p) / len(t | p) for t in truth for p in predicted]
    pairs = [iou for iou in ious if iou > 0.5]
    dq = len(pairs) / (len(pairs) + (len(predicted) - len(pairs)) / 2 + (len(truth) - len(pairs)) / 2)
    sq = sum(pairs) / len(pairs) if pairs else 0
    return [dq * sq, dq, sq]


def sets(image, labels, label=None):
    pixels = [set(np.flatnonzero(image == index + 1)) for index in range(len(labels)) if label in (None, labels[index])]
    return [each for each in pixels if each]


def test_a_slow_count_agrees():
    rng = np.random.default_rng(0)
    paired = 0
    for _ in range(150):
        truth, n_true = random_map(rng)
        predicted, n_predicted = random_map(rng)
        if rng.uniform() < 0.7:  # much alike: a part of the nuclei, shifted and numbered anew
            order = rng.permutation(n_true + 1)
            order = np.where(order == order[0], 0, order + (order == 0) * order[0])
            predicted, n_predicted = np.roll(order[truth], 1, axis=rng.integers(2)), n_true
        labels = rng.integers(0, 3, n_true), rng.integers(0, 3, n_predicted)
        found = image_quality(truth, labels[0], predicted, labels[1], 3)
        for row, label in enumerate((None, 0, 1, 2)):
            expected = slow_quality(sets(truth, labels[0], label), sets(predicted, labels[1], label))
            assert found[row] == pytest.approx(expected, nan_ok=True)
            paired += 0 < expected[2] < 1
    assert paired > 100


def test_boxes_and_stores_without_instances_have_none(tmp_path):
    fold, found = fold_of([SQUARES], [LABELS]), segmented([SQUARES], [LABELS])
    for left, right in ((replace(found, masks=None), fold), (found, replace(fold, maps=None))):
        write_panoptic(tmp_path / "a.tsv", panoptic_quality(left, right), experiment="x", split=2)
        header = "experiment\tsplit\ttissue\tclass\tpq\tdq\tsq\timages\n"
        assert (tmp_path / "a.tsv").read_text() == header
    with pytest.raises(InputError, match="expected fold2.zarr with d2; predict this split again"):
        panoptic_quality(found, replace(fold, digest="d2"))
    empty = panoptic_quality(segmented([], []), replace(fold_of([], []), maps=np.zeros((0, SIZE, SIZE), np.uint16)))
    assert empty["pq"].isna().all()


def test_scores_of_a_system_count_every_detection_and_hold_its_panoptic_quality(tmp_path):
    fold = fold_of([SQUARES, blocks()], [LABELS, []], ["Skin", "Lung"])
    found = segmented([SQUARES, blocks()], [[0, 1, 1, 2], []])
    table = panoptic_quality(found, fold)
    frame = score_fold(found, fold, ScoringSettings(), resamples=0, panoptic=table)
    frame = frame[frame["metric"] == "strict"].set_index("class")
    assert frame.loc["Detection", ["f1", "n_predicted", "mode"]].tolist() == [1, 4, "segmentation"]
    overall = table[table["tissue"] == "All"].set_index("class")
    assert frame[["pq", "dq", "sq"]].equals(overall.loc[frame.index, ["pq", "dq", "sq"]])
    assert frame["mpq"].tolist() == pytest.approx([overall.loc["mPQ", "pq"], *[np.nan] * 3], nan_ok=True)
    assert 0 < overall.loc["mPQ", "pq"] < 1
    without = score_fold(found, fold, ScoringSettings(), resamples=0)
    assert without[["pq", "dq", "sq", "mpq"]].isna().all(axis=None)
    write_panoptic(tmp_path / "a.tsv", table, experiment="x", split=2)
    back = pd.read_csv(tmp_path / "a.tsv", sep="\t", dtype={"tissue": str})
    assert back[["tissue", "class", "images"]].equals(table[["tissue", "class", "images"]])
    assert np.allclose(back[["pq", "dq", "sq"]], table[["pq", "dq", "sq"]], rtol=1e-5, equal_nan=True)


def test_mask_centres_of_a_system_are_scored_when_asked_for():
    """An L of 11 px in a box of 40 px, whose centres are 0.5 um apart."""
    corner = np.zeros((SIZE, SIZE), np.uint16)
    corner[4:12, 4], corner[11, 4:9] = 1, 1
    rows, columns = np.nonzero(corner)
    fold = replace(fold_of([corner], [[0]]), centroids=np.array([[columns.mean() + 0.5, rows.mean() + 0.5]]))
    settings = ScoringSettings(radius_um=0.25)
    found = segmented([corner], [[0]])
    for given, centres, pairs in ((found, "mask", 1), (found, "box", 1), (replace(found, masks=None), "mask", 0)):
        frame = score_fold(given, fold, settings, centres=centres, resamples=0)
        assert frame.loc[0, "tp"] == pairs


def test_a_hundred_images_are_counted_in_a_second():
    """As large and as full as those of PanNuke."""
    corners = [(x, y, x + 14, y + 14) for x in range(0, 240, 48) for y in range(0, 240, 48)]
    truth, labels = blocks(*corners, size=256), np.arange(len(corners)) % 3
    found = segmented([truth], [labels])
    start = time.perf_counter()
    for _ in range(100):
        values = image_quality(truth, labels, found.instances(0, 256), found.labels, 3)
    seconds = time.perf_counter() - start
    assert (values == 1).all()
    assert seconds < 2, f"{seconds:.1f} s"  # 0.02 s here
