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


def segmented(seed=0, size=40):
    """Make detections with masks in order, four in each patch: random pixels that reach the sides of their boxes."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, size - 12, (4 * N, 2))
    sides = rng.integers(1, 13, low.shape)
    masks = []
    for width, height in sides:
        mask = rng.uniform(size=(height, width)) < 0.5
        mask[[0, -1], rng.integers(width)] = mask[rng.integers(height), [0, -1]] = True
        masks.append(mask)
    boxes = np.hstack([low, low + sides])
    patch, query = np.repeat(np.arange(N), 4), np.tile(np.arange(4), N)
    scores = rng.uniform(0, 1, 4 * N).astype(np.float32), rng.uniform(0, 1, (4 * N, 3)).astype(np.float32)
    metadata = {"nucleus_threshold": 0.0, "mode": "segmentation"}
    return Predictions(patch, query, boxes, *scores, classes=CLASSES, n_patches=N, metadata=metadata, masks=masks)


def test_masks_come_back_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_ROWS", 6)
    given, path = segmented(), tmp_path / "a.parquet"
    order = np.random.default_rng(1).permutation(len(given))
    nothing = given.select(np.zeros(len(given), dtype=bool))
    assert write_predictions(path, [nothing, given.select(order[:9]), given.select(order[9:])]) == len(given)
    assert read_predictions(path).masks is None
    found = read_predictions(path, patch_size=40)
    assert len(found.masks) == len(given)
    assert all(np.array_equal(*pair) for pair in zip(found.masks, given.masks, strict=True))
    kept = found.select(found.patch == 2)
    assert all(np.array_equal(*pair) for pair in zip(kept.masks, given.masks[8:12], strict=True))
    write_predictions(path, [nothing])
    assert read_predictions(path, patch_size=40).masks == []
    write_predictions(path, [dataclasses.replace(make(0), metadata={"mode": "parallel"})])
    assert read_predictions(path, patch_size=40).masks is None


def test_mask_centres_are_those_of_its_pixels():
    given = segmented()
    for index, (x, y) in enumerate(given.mask_centres):
        alone = given.select(np.array([index]))
        rows, columns = np.nonzero(alone.instances(int(alone.patch[0]), 40))
        assert np.allclose((x, y), (columns.mean() + 0.5, rows.mean() + 0.5))
    box = dataclasses.replace(given, masks=None)
    assert np.array_equal(box.mask_centres, box.centres)


def test_a_pixel_claimed_twice_is_of_the_more_certain_nucleus_then_of_the_first():
    given = segmented()
    for score in (given.nucleus_score, np.full(len(given), np.float32(0.7))):
        given = dataclasses.replace(given, nucleus_score=score)
        for patch in range(N):
            own = given.select(given.patch == patch)
            best = np.full((40, 40), -1.0)
            expected = np.zeros((40, 40), int)
            for index, ((x0, y0, x1, y1), mask) in enumerate(zip(own.boxes, own.masks, strict=True)):
                claimed = np.zeros((40, 40), bool)
                claimed[y0:y1, x0:x1] = mask
                claimed &= own.nucleus_score[index] > best
                best[claimed], expected[claimed] = own.nucleus_score[index], index + 1
            assert np.array_equal(given.instances(patch, 40), expected)


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (3, {"mask": lambda bits: bits[:-1]}, r"row 3: got a mask of \d+ bytes, expected \d+ in a box of"),
        (4, {"mask": lambda bits: bits + b"\0"}, r"row 4: got a mask of"),
        (5, {"mask": lambda bits: b"\0" * len(bits)}, "row 5: got a mask whose pixels do not reach the sides"),
        (6, {"mask": lambda bits: b"\xff" * len(bits)}, "row 6: got a mask whose pixels do not .* and no farther"),
        (7, {"x0": lambda x: x - 1, "x1": lambda x: x + 7}, "row 7: got a mask"),
        (8, {"x0": lambda x: x + 0.5}, r"row 8: got a mask in box .*, expected whole px in a patch of 40 x 40 px"),
        (9, {"y1": lambda y: y + 40}, "row 9: got a mask in box"),
        (10, {"y1": lambda y: float("nan")}, "row 10: got a mask in box"),
        (11, {"x1": lambda x: x - 20}, "row 11: got a mask in box"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, row, change, message):
    path = tmp_path / "a.parquet"
    given = segmented()
    given.masks[6] = np.ones((3, 5), bool)
    given.boxes[6] = (5, 5, 10, 8)
    write_predictions(path, [given])
    table = pq.read_table(path)
    for name, damage in change.items():
        values = table.column(name).to_pylist()
        values[row] = damage(values[row])
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)
    assert len(read_predictions(path)) == len(given)
    with pytest.raises(InputError, match=rf"a\.parquet: got .*{message}.*predict this split again"):
        read_predictions(path, patch_size=40)


def test_a_system_that_segments_without_masks_and_patches_that_are_too_small_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_predictions(path, [segmented()])
    with pytest.raises(InputError, match="expected whole px in a patch of 20 x 20 px"):
        read_predictions(path, patch_size=20)
    write_predictions(path, [dataclasses.replace(segmented(), masks=None)])
    with pytest.raises(InputError, match="got KeyError.'mask'.*expected a Parquet file of the predict rule"):
        read_predictions(path, patch_size=40)


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
