"""The predictions file: what is written comes back, what is broken is refused, and which detections count."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.evaluation.predictions import METADATA_KEY, PredictionsWriter, ScoreRule, read_predictions
from celldetr.runtime.errors import ConfigError, InputError

N = 6
CLASSES = ("neoplastic", "inflammatory", "connective")


def detections(seed, n_patches=N, most=5):
    """Return patch, query, boxes, nucleus score and class scores of a fold in order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, n_patches)
    patch = np.repeat(np.arange(n_patches), sizes)
    query = np.concatenate([np.empty(0, int), *(np.sort(rng.permutation(900)[:n]) for n in sizes)])
    low = rng.uniform(0, 200, (len(patch), 2))
    boxes = np.concatenate([low, low + rng.uniform(0, 56, low.shape)], axis=1)
    return patch, query, boxes, rng.uniform(0.4, 1, len(patch)), rng.uniform(0, 1, (len(patch), len(CLASSES)))


def write(path, columns, *, step=2, n_patches=N, threshold=0.4, **metadata):
    options = {"classes": CLASSES, "n_patches": n_patches, "nucleus_threshold": threshold, "metadata": metadata}
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
    assert found.n_patches == 6
    assert (found.metadata["experiment"], found.metadata["split"]) == ("x", 2)
    for patch in range(6):
        assert (found.patch[found.ptr[patch] : found.ptr[patch + 1]] == patch).all()
    assert found.ptr[-1] == len(found)


def test_a_fold_without_detections_is_a_file_without_rows(tmp_path):
    path = write(tmp_path / "none.parquet", tuple(column[:0] for column in detections(0)))
    found = read_predictions(path)
    assert len(found) == 0
    assert found.class_scores.shape == (0, len(CLASSES))
    assert found.ptr.tolist() == [0] * 7
    assert len(ScoreRule().keep(found)) == 0


def test_rows_in_another_order_are_sorted(tmp_path):
    columns = detections(1)
    turned = tuple(column[::-1] for column in columns)
    found = read_predictions(write(tmp_path / "a.parquet", turned, step=6))
    assert np.array_equal(found.boxes, columns[2].astype(np.float32))


def test_nothing_is_left_when_writing_fails(tmp_path):
    columns = detections(2)
    with pytest.raises(ValueError, match="patch: got 0 to 5, expected 0 to 4"):
        write(tmp_path / "a.parquet", columns, n_patches=5, step=6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, [2], "patch: got 2 to 2, expected 0 to 1"),
        (0, [0.0], "patch: got float64"),
        (1, [40_000], "query: got 40000"),
        (2, [[0, 0, 1]], r"boxes: got shape \(1, 3\), expected \(1, 4\)"),
        (3, [0.5, 0.5], "nucleus_score"),
        (4, [[0.1, 0.2]], "class_scores"),
    ],
)
def test_writer_refuses_wrong_arrays(tmp_path, position, value, message):
    columns = [[0], [0], [[0, 0, 1, 1]], [0.5], [[0.1, 0.2, 0.3]]]
    columns[position] = value
    options = {"classes": CLASSES, "n_patches": 2, "nucleus_threshold": 0.4}
    with (
        pytest.raises(ValueError, match=message),
        PredictionsWriter(tmp_path / "a.parquet", **options) as writer,
    ):
        writer.append(*columns)


def set_value(table, name, row, value):
    values = table.column(name).to_numpy().copy()
    values[row] = value
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("patch", 6, "'patch' must be 0 to 5"),
        ("patch", -1, "'patch' must be 0 to 5"),
        ("x0", np.nan, "boxes must be finite"),
        ("y1", -5.0, "boxes must be x0 <= x1"),
        ("nucleus_score", 0.39, "'nucleus_score' must be 0.4 to 1"),
        ("nucleus_score", np.nan, "'nucleus_score' must be 0.4 to 1"),
        ("score_connective", 1.2, "class scores must be 0 to 1"),
        ("label", 3, "'label' must be a class"),
        ("label", -1, "'label' must be a class"),
    ],
)
def test_a_broken_value_is_refused_with_file_rule_and_row(tmp_path, column, value, message):
    path = write(tmp_path / "a.parquet", detections(3))
    pq.write_table(set_value(pq.read_table(path), column, 4, value), path)
    with pytest.raises(InputError, match=f"a.parquet: 1 of .*{message}.*first row 4"):
        read_predictions(path)


def test_a_label_of_a_lower_score_and_a_repeated_query_are_refused(tmp_path):
    columns = detections(3)
    path = write(tmp_path / "a.parquet", columns)
    table = pq.read_table(path)
    wrong = (columns[4][0].argmax() + 1) % len(CLASSES)
    pq.write_table(set_value(table, "label", 0, wrong), path)
    with pytest.raises(InputError, match="'label' must be the class of the largest score"):
        read_predictions(path)
    row = int(np.flatnonzero(np.diff(columns[0]) == 0)[0])
    pq.write_table(set_value(table, "query", row, columns[1][row + 1]), path)
    with pytest.raises(InputError, match="a query of a patch must occur once"):
        read_predictions(path)


def test_other_files_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", detections(3))
    table = pq.read_table(path)
    own = json.loads(table.schema.metadata[METADATA_KEY])

    def refused(changed, message):
        pq.write_table(changed, path)
        with pytest.raises(InputError, match=message):
            read_predictions(path)

    refused(table.drop_columns(["x0"]), "column 'x0': got no such column, expected float")
    refused(table.drop_columns(["score_inflammatory"]), "score_inflammatory")
    refused(table.replace_schema_metadata({}), "no key 'celldetr'")
    refused(table.replace_schema_metadata({METADATA_KEY: b"{"}), "is not JSON")
    for key in ("classes", "n_patches", "nucleus_threshold"):
        without = json.dumps({k: v for k, v in own.items() if k != key}).encode()
        refused(table.replace_schema_metadata({METADATA_KEY: without}), f"key '{key}': got None")
    for count in (-1, 10**19):
        wrong = json.dumps({**own, "n_patches": count}).encode()
        refused(table.replace_schema_metadata({METADATA_KEY: wrong}), "key 'n_patches': got a count out of range")
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"a.parquet: cannot be read as Parquet"):
        read_predictions(path)
    path.write_bytes(write(tmp_path / "b.parquet", detections(3)).read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
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
    with pytest.raises(ConfigError, match="got 'best', expected one of both_thresholds"):
        ScoreRule("best")
    with pytest.raises(ConfigError, match="class_threshold: got 1.5"):
        ScoreRule(class_threshold=1.5)
