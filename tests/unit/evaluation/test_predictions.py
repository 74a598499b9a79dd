"""The predictions file: what is written comes back, and other files are refused."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from celldetr.evaluation import predictions
from celldetr.evaluation.predictions import Predictions, read_predictions, write_predictions
from celldetr.runtime.errors import InputError

N = 6
CLASSES = ("neoplastic", "inflammatory", "connective")


def make(seed, most=5):
    """Make detections of a fold in order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, N)
    patch = np.repeat(np.arange(N), sizes)
    query = np.concatenate([np.empty(0, int), *(np.sort(rng.permutation(900)[:n]) for n in sizes)])
    low = rng.uniform(0, 200, (len(patch), 2))
    boxes = np.concatenate([low, low + rng.uniform(0, 56, low.shape)], axis=1)
    scores = rng.uniform(0.4, 1, len(patch)), rng.uniform(0, 1, (len(patch), len(CLASSES)))
    metadata = {"nucleus_threshold": 0.4, "experiment": "x", "split": 2}
    return Predictions(patch, query, boxes, *scores, classes=CLASSES, n_patches=N, metadata=metadata)


@pytest.mark.parametrize(("seed", "most"), [(0, 5), (1, 300), (2, 0)])
def test_what_is_written_comes_back_in_order(tmp_path, seed, most):
    given = make(seed, most)
    write_predictions(tmp_path / "a.parquet", [given.select(np.arange(len(given))[::-1])])
    found = read_predictions(tmp_path / "a.parquet")
    for name in ("patch", "query", "boxes", "nucleus_score", "class_scores"):
        want = getattr(given, name)
        assert np.array_equal(getattr(found, name), want.astype(np.float32) if want.dtype == float else want)
    assert np.array_equal(found.labels, found.class_scores.argmax(axis=1))
    assert (found.classes, found.n_patches) == (CLASSES, N)
    assert given.metadata.items() <= found.metadata.items()
    assert np.array_equal(found.ptr, np.searchsorted(given.patch, range(N + 1)))
    labels = pq.read_table(tmp_path / "a.parquet").column("label").to_numpy()
    assert np.array_equal(labels[::-1], found.labels)


def test_embeddings_are_written_in_row_groups_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_ROWS", 20)
    given, path = make(1, 30), tmp_path / "a.parquet"
    own = np.random.default_rng(0).normal(size=(len(given), 8)).astype(np.float32)
    given = dataclasses.replace(given, embeddings=own)
    parts = [given.select(np.flatnonzero(given.patch == patch)) for patch in range(N)]
    assert write_predictions(path, parts) == len(given)
    found = read_predictions(path)
    assert found.embeddings is None
    assert np.array_equal(found.boxes, given.boxes.astype(np.float32))
    file = pq.ParquetFile(path)
    assert 1 < file.num_row_groups < N
    stored = file.read(["embedding"]).column(0).combine_chunks()
    assert np.array_equal(stored.flatten().to_numpy().reshape(-1, 8), own)
    without = tmp_path / "without.parquet"
    write_predictions(without, [dataclasses.replace(given, embeddings=None)])
    assert "embedding" not in pq.read_schema(without).names


def test_damaged_and_other_files_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_predictions(path, [make(3)])
    content = path.read_bytes()
    for damaged in (b"not parquet", content[:-20], content[:60] + bytes([content[60] ^ 255]) + content[61:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: got .*predict this split again"):
            read_predictions(path)
    many = pa.table({name: np.zeros(1_000_000) for name in "ab"})  # a few kB, which would fill memory a thousandfold
    pq.write_table(many, path)
    with pytest.raises(InputError, match=r"1000000 detections, more than a file of this size holds"):
        read_predictions(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: .*expected a Parquet file of the predict rule"):
        read_predictions(path)
