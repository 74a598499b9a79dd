"""The patch store: what goes in comes out, and damage is named."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.runtime.errors import InputError
from celldetr.store import StoreWriter, merge, open_store, select, split_groups, validate
from celldetr.store.writer import PATCHES_PER_SHARD

CLASSES = ("a", "b")
SIZE = 8
INDEX_BYTES = 16 * PATCHES_PER_SHARD + 4  # at the end of a shard


def make(path, counts, seed=0, classes=CLASSES, mpp=0.5, size=SIZE, step=7):
    """Write a store with `counts[i]` random nuclei in patch i; return what was written."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(counts), size, size, 3), dtype=np.uint8)
    low = [rng.uniform(0, size / 2, (n, 2)) for n in counts]
    boxes = [np.concatenate([xy, xy + rng.uniform(1, size / 2, xy.shape)], axis=1).astype(np.float32) for xy in low]
    labels = [rng.integers(-1, len(classes), n).astype(np.int8) for n in counts]
    centroids = [(box[:, :2] + box[:, 2:]) / 2 for box in boxes]
    columns = {
        "source": [f"slide {i} é" for i in range(len(counts))],
        "group": [f"g{i % 3}" for i in range(len(counts))],
        "tissue": ["Lung"] * len(counts),
        "x": np.arange(len(counts)) * 10,
        "y": -np.arange(len(counts)),
    }
    with StoreWriter(path, patch_size=size, classes=classes, mpp=mpp, attrs={"dropped": {"x": 3}}) as writer:
        for start in range(0, len(counts), step):
            part = slice(start, start + step)
            writer.append(
                images[part],
                boxes[part],
                labels[part],
                centroids=centroids[part],
                patches={name: values[part] for name, values in columns.items()},
            )
    return images, boxes, labels, centroids, columns


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 4), max_size=20), seed=st.integers(0, 9))
def test_round_trip(tmp_path_factory, counts, seed):
    path = tmp_path_factory.mktemp("s") / "x.zarr"
    images, boxes, labels, centroids, columns = make(path, counts, seed)
    validate(path)
    store = open_store(path)
    assert len(store) == store.n_patches == len(counts)
    assert (store.classes, store.mpp, store.patch_size) == (CLASSES, 0.5, SIZE)
    assert np.array_equal(store.all_images(), images)
    assert store.attrs["dropped"] == {"x": 3}
    for index in range(len(counts)):
        patch = store.read(index)
        assert np.array_equal(patch.image, images[index])
        assert np.array_equal(patch.boxes, boxes[index])
        assert np.array_equal(patch.labels, labels[index])
        assert np.array_equal(store.patches["source"][index], columns["source"][index])
    assert np.array_equal(store.centroids, np.concatenate([np.empty((0, 2)), *centroids]).astype(np.float32))
    assert store.attrs["counts"]["unlabelled"] == int((store.labels < 0).sum())


def test_any_order_of_patches_can_be_read(tmp_path):
    images, *_ = make(tmp_path / "x.zarr", [1] * 30)
    store = open_store(tmp_path / "x.zarr")
    for indices in ([], [4], [29, 0, 0, 13], range(10, 20)):
        assert np.array_equal(store.images(list(indices)), images[list(indices)])
    with pytest.raises(IndexError):
        store.images([30])


def test_a_store_is_a_few_files(tmp_path):
    make(tmp_path / "x.zarr", [1] * (PATCHES_PER_SHARD + 5), size=4)
    shards = [path for path in (tmp_path / "x.zarr" / "images" / "c").rglob("*") if path.is_file()]
    assert len(shards) == 2


def test_nothing_is_left_of_a_store_that_fails(tmp_path):
    def fail():
        with StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
            writer.append(np.zeros((1, SIZE, SIZE, 3), np.uint8), [[]], [[]], patches=dict.fromkeys(COLUMNS, [0]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


COLUMNS = ("source", "group", "tissue", "x", "y")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, "images"),
        ({"images": np.zeros((1, SIZE, SIZE, 3), np.float32)}, "images"),
        ({"labels": []}, "labels"),
        ({"labels": [[2]]}, "labels: got 2 to 2, expected -1 to 1"),
        ({"labels": [np.array([256])]}, "labels: got 256"),  # 0 in eight bits
        ({"patches": {**dict.fromkeys(COLUMNS, [0]), "x": []}}, "'x': 0"),
    ],
)
def test_writer_refuses_what_does_not_fit(tmp_path, changes, message):
    values = {
        "images": np.zeros((1, SIZE, SIZE, 3), np.uint8),
        "boxes": [[[0, 0, 1, 1]]],
        "labels": [[0]],
        "patches": dict.fromkeys(COLUMNS, [0]),
    } | changes
    with (
        pytest.raises(ValueError, match=message),
        StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer,
    ):
        writer.append(**values)


def overwrite(path, name, index, value):
    zarr.open_group(path, mode="r+")[name][index] = value


DAMAGE = {
    "not a store": (lambda path: shutil.rmtree(path / "images"), "images: got no such array"),
    "no folder": (lambda path: shutil.rmtree(path), "no such folder"),
    "other format": (
        lambda path: zarr.open_group(path, mode="r+").attrs.update({"format": 99}),
        "format: got 99, expected 2",
    ),
    "offsets fall": (lambda path: overwrite(path, "box_ptr", 2, 0), "box_ptr"),
    "offsets end early": (lambda path: overwrite(path, "box_ptr", -1, 3), "box_ptr"),
    "unknown class": (lambda path: overwrite(path, "labels", 5, 2), "labels must be -1 to 1.*nucleus 5 of patch"),
    "box outside": (lambda path: overwrite(path, "boxes", (3, 2), 9), "boxes must lie in 0 to 8 px"),
    "empty box": (lambda path: overwrite(path, "boxes", 3, [4, 4, 4, 5]), "boxes must not be empty"),
    "no number": (lambda path: overwrite(path, "boxes", (3, 0), np.nan), "boxes must be finite"),
    "centroid elsewhere": (lambda path: overwrite(path, "centroids", (0, 0), 99), "centroids must lie in their box"),
    "label changed": (lambda path: overwrite(path, "labels", slice(None), 1), "counts"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, name):
    path = tmp_path / "x.zarr"
    make(path, [2] * 6)
    break_it, message = DAMAGE[name]
    break_it(path)
    with pytest.raises(InputError, match=message) as error:
        open_store(path)
    assert str(path) in str(error.value)


def shard_of(path):
    return next(file for file in (path / "images" / "c").rglob("*") if file.is_file())


def test_one_changed_bit_of_an_image_is_noticed_and_named(tmp_path):
    path = tmp_path / "x.zarr"
    make(path, [1] * 4)
    shard = shard_of(path)
    whole = shard.read_bytes()
    (start, length), *_ = open_store(path)._images._places[2:3].astype(int)
    for at in (start, start + length // 2, start + length - 1):
        data = bytearray(whole)
        data[at] ^= 1
        shard.write_bytes(data)
        with pytest.raises(InputError, match="images: patch 2 cannot be read"):
            validate(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.unlink(), "No such file"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "damaged or ends early"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:10]), "damaged or ends early"),
        # the entry of patch 1 in the index says that it was never written
        (
            lambda shard: shard.write_bytes(
                shard.read_bytes()[: 16 - INDEX_BYTES] + b"\xff" * 16 + shard.read_bytes()[32 - INDEX_BYTES :]
            ),
            "patch 1 and 0 others are not in their shard",
        ),
    ],
    ids=["no file", "cut", "stub", "not written"],
)
def test_missing_images_are_an_error_and_not_black(tmp_path, change, message):
    path = tmp_path / "x.zarr"
    make(path, [1] * 4)
    change(shard_of(path))
    with pytest.raises(InputError, match=message) as error:
        open_store(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["boxes", "labels", "centroids", "box_ptr", "patches/source", "patches/x"])
def test_missing_chunks_are_an_error_and_not_zero(tmp_path, name):
    path = tmp_path / "x.zarr"
    make(path, [1] * 4)
    shutil.rmtree(path / name / "c")
    with pytest.raises(InputError, match=f"{name}: got 0 of 1 chunks"):
        open_store(path)


def test_black_patches_and_zero_values_are_kept(tmp_path):
    images = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    with StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
        writer.append(images, [[[0, 0, 1, 1]]] * 3, [[0]] * 3, patches=dict.fromkeys(COLUMNS, [0] * 3))
    validate(tmp_path / "x.zarr")
    assert not open_store(tmp_path / "x.zarr").all_images().any()


def test_zarr_reads_what_we_read(tmp_path):
    path = tmp_path / "x.zarr"
    images, *_ = make(path, [1] * (PATCHES_PER_SHARD + 5), size=4)
    assert np.array_equal(zarr.open_group(path, mode="r")["images"][:], images)
    order = np.random.default_rng(0).permutation(len(images))
    assert np.array_equal(open_store(path).images(order), images[order])


def test_a_store_goes_to_other_processes(tmp_path):
    images, *_ = make(tmp_path / "x.zarr", [1] * 6)
    store = open_store(tmp_path / "x.zarr")
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert np.array_equal(pool.apply(store.images, ([5, 1],)), images[[5, 1]])


def test_an_image_array_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.zarr"
    make(path, [1] * 4)
    shutil.rmtree(path / "images")
    zarr.open_group(path, mode="r+").create_array("images", data=np.zeros((4, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(InputError, match="images: got an array without shards"):
        open_store(path)


def test_missing_attribute_is_named(tmp_path):
    path = tmp_path / "x.zarr"
    make(path, [1])
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    del content["attributes"]["classes"]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="attribute classes"):
        open_store(path)


def test_merge_puts_stores_one_after_another(tmp_path):
    first = make(tmp_path / "a.zarr", [1, 0, 3], seed=1)
    second = make(tmp_path / "b.zarr", [2, 2], seed=2)
    make(tmp_path / "empty.zarr", [])
    merge([tmp_path / "a.zarr", tmp_path / "empty.zarr", tmp_path / "b.zarr"], tmp_path / "all.zarr")
    store = open_store(tmp_path / "all.zarr")
    assert np.array_equal(store.all_images(), np.concatenate([first[0], second[0]]))
    assert np.array_equal(np.diff(store.box_ptr), [1, 0, 3, 2, 2])
    assert np.array_equal(store.boxes, np.concatenate([*first[1], *second[1]]))
    assert store.patches["x"].tolist() == [0, 10, 20, 0, 10]


def test_select_takes_the_chosen_patches_in_order(tmp_path):
    first = make(tmp_path / "a.zarr", [1, 0, 3, 2], seed=1)
    second = make(tmp_path / "b.zarr", [2, 4], seed=2)
    stores = [open_store(tmp_path / name) for name in ("a.zarr", "b.zarr")]
    select([(stores[1], [1]), (stores[0], [3, 0]), (stores[1], [])], tmp_path / "some.zarr", attrs={"why": "test"})
    validate(tmp_path / "some.zarr")
    some = open_store(tmp_path / "some.zarr")
    assert np.array_equal(some.all_images(), np.stack([second[0][1], first[0][3], first[0][0]]))
    assert np.array_equal(np.diff(some.box_ptr), [4, 2, 1])
    assert np.array_equal(some.boxes, np.concatenate([second[1][1], first[1][3], first[1][0]]))
    assert np.array_equal(some.labels, np.concatenate([second[2][1], first[2][3], first[2][0]]))
    assert np.array_equal(some.centroids, np.concatenate([second[3][1], first[3][3], first[3][0]]))
    assert some.patches["x"].tolist() == [10, 30, 0]
    assert some.attrs["why"] == "test"
    select([(stores[0], [])], tmp_path / "none.zarr")
    assert len(open_store(tmp_path / "none.zarr")) == 0
    with pytest.raises(InputError, match="at least one"):
        select([], tmp_path / "x.zarr")


@pytest.mark.parametrize(("key", "value"), [("classes", ("a", "c")), ("mpp", 0.25), ("size", 4)])
def test_merge_refuses_stores_of_another_kind(tmp_path, key, value):
    make(tmp_path / "a.zarr", [1])
    make(tmp_path / "b.zarr", [1], **{key: value})
    with pytest.raises(InputError, match=r"b\.zarr"):
        merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "all.zarr")
    assert not (tmp_path / "all.zarr").exists()


@given(
    groups=st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=60).filter(lambda g: len(set(g)) > 2),
    seed=st.integers(0, 5),
)
def test_groups_stay_together_and_every_part_gets_one(groups, seed):
    parts = split_groups(groups, {"train": 0.7, "val": 0.15, "test": 0.15}, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(groups)))
    of_part = [{groups[i] for i in indices} for indices in parts.values()]
    assert all(of_part)
    assert sum(map(len, of_part)) == len(set(groups))


def test_shares_are_met_when_groups_are_small():
    parts = split_groups([str(i) for i in range(1000)], {"train": 0.8, "val": 0.2}, 0)
    assert abs(len(parts["train"]) - 800) <= 1
    again = split_groups([str(i) for i in range(1000)], {"train": 0.8, "val": 0.2}, 1)
    assert not np.array_equal(parts["val"], again["val"])


def test_wrong_shares_and_too_few_groups_are_refused():
    with pytest.raises(InputError, match="sum to 1"):
        split_groups(["a", "b"], {"train": 0.8, "val": 0.1}, 0)
    with pytest.raises(InputError, match="got 1"):
        split_groups(["a", "a"], {"train": 0.8, "val": 0.2}, 0)
