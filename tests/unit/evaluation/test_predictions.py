"""The predictions file: what is written comes back, other files are refused, and which detections count."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.evaluation.predictions import PredictionsWriter, ScoreRule, read_predictions
from celldetr.runtime.errors import ConfigError, InputError

N = 6
CLASSES = ("neoplastic", "inflammatory", "connective")


def detections(seed, most=5):
    """Patch, query, boxes, nucleus score and class scores of a fold in order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, N)
    patch = np.repeat(np.arange(N), sizes)
    query = np.concatenate([np.empty(0, int), *(np.sort(rng.permutation(900)[:n]) for n in sizes)])
    low = rng.uniform(0, 200, (len(patch), 2))
    boxes = np.concatenate([low, low + rng.uniform(0, 56, low.shape)], axis=1)
    return patch, query, boxes, rng.uniform(0.4, 1, len(patch)), rng.uniform(0, 1, (len(patch), len(CLASSES)))


def write(path, columns, *, step=2, threshold=0.4, **metadata):
    options = {"classes": CLASSES, "n_patches": N, "nucleus_threshold": threshold, "metadata": metadata}
    with PredictionsWriter(path, **options) as writer:
        for start in range(0, N, step):
            chosen = (columns[0] >= start) & (columns[0] < start + step)
            writer.append(*(column[chosen] for column in columns))
    return path


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_what_is_written_comes_back(tmp_path_factory, seed, step):
    columns = detections(seed)
    path = write(tmp_path_factory.mktemp("p") / "a.parquet", columns, step=step, experiment="x", split=2)
    found = read_predictions(path)
    assert np.array_equal(found.patch, columns[0])
    assert np.array_equal(found.query, columns[1])
    for got, want in zip((found.boxes, found.nucleus_score, found.class_scores), columns[2:], strict=True):
        assert np.array_equal(got, want.astype(np.float32))
    assert np.array_equal(found.labels, columns[4].astype(np.float32).argmax(axis=1))
    assert found.classes == CLASSES
    assert (found.metadata["experiment"], found.metadata["split"]) == ("x", 2)
    for patch in range(N):
        assert (found.patch[found.ptr[patch] : found.ptr[patch + 1]] == patch).all()
    assert found.ptr[-1] == len(found)


def test_a_fold_without_detections_is_a_file_without_rows(tmp_path):
    found = read_predictions(write(tmp_path / "none.parquet", tuple(column[:0] for column in detections(0))))
    assert found.class_scores.shape == (0, len(CLASSES))
    assert found.ptr.tolist() == [0] * 7
    assert len(ScoreRule().keep(found)) == 0


def test_rows_in_another_order_are_sorted(tmp_path):
    columns = detections(1)
    turned = tuple(column[::-1] for column in columns)
    found = read_predictions(write(tmp_path / "a.parquet", turned, step=6))
    assert np.array_equal(found.boxes, columns[2].astype(np.float32))


def test_nothing_is_left_when_writing_fails(tmp_path):
    columns = list(detections(2))
    columns[4] = columns[4][:, :2]
    with pytest.raises(ValueError, match="shorter"):
        write(tmp_path / "a.parquet", columns, step=6)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_other_files_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", detections(3))
    content = path.read_bytes()
    for damaged in (b"not parquet", content[:-20], content[:60] + bytes([content[60] ^ 255]) + content[61:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: got .*predict this split again"):
            read_predictions(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: .*expected a Parquet file of the predict rule"):
        read_predictions(path)


def test_score_rules_keep_what_they_say(tmp_path):
    found = read_predictions(write(tmp_path / "a.parquet", detections(4, most=40)))
    nucleus, best = found.nucleus_score, found.class_scores.max(axis=1)
    expected = {
        "both_thresholds": (nucleus >= 0.6) & (best >= 0.5),
        "class": best >= 0.5,
        "product": nucleus * best >= 0.5,
    }
    for rule, keep in expected.items():
        kept = ScoreRule(rule, 0.6, 0.5).keep(found)
        assert 0 < len(kept) < len(found)
        assert np.array_equal(kept.boxes, found.boxes[keep])
        assert np.array_equal(kept.labels, found.labels[keep])


def test_scores_at_a_threshold_are_kept(tmp_path):
    columns = ([0], [0], [[0, 0, 5, 5]], [np.float32(0.7)], [[0.7, 0.1, 0.1]])
    path = write(tmp_path / "a.parquet", tuple(map(np.asarray, columns)), threshold=0.7)
    assert len(ScoreRule("both_thresholds", 0.7, 0.7).keep(read_predictions(path))) == 1


def test_a_threshold_below_that_of_the_file_is_refused(tmp_path):
    found = read_predictions(write(tmp_path / "a.parquet", detections(4)))
    with pytest.raises(ConfigError, match="lower inference.nucleus_threshold"):
        ScoreRule("both_thresholds", 0.3).keep(found)
