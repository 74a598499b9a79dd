"""The patch store: what goes in comes out; an incomplete or invalid store is named."""

import multiprocessing
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from celldetr.runtime.errors import InputError
from celldetr.store import StoreWriter, encode_image, open_store, select
from celldetr.store.shards import PATCHES_PER_SHARD

CLASSES = ("a", "b")
SIZE = 8
COLUMNS = ("source", "group", "tissue", "x", "y")


def shard(path, array="images"):
    """Give a shard of an array."""
    return next(file for file in (path / array / "c").rglob("*") if file.is_file())


def drawn(boxes, size):
    """Draw the instance map of a patch whose nuclei fill their boxes, the later ones on top."""
    found = np.zeros((size, size), np.uint16)
    for number, (x0, y0, x1, y1) in enumerate(boxes, 1):
        found[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = number
    return found


def make(path, counts, seed=0, classes=CLASSES, mpp=0.5, size=SIZE, step=7, mapped=False):
    """Write a store with `counts[i]` random nuclei in patch i; return what was written."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(counts), size, size, 3), dtype=np.uint8)
    low = [rng.uniform(0, size / 2, (n, 2)) for n in counts]
    boxes = [np.concatenate([xy, xy + rng.uniform(1, size / 2, xy.shape)], axis=1).astype(np.float32) for xy in low]
    labels = [rng.integers(-1, len(classes), n).astype(np.int8) for n in counts]
    centroids = [(box[:, :2] + box[:, 2:]) / 2 for box in boxes]
    columns = {
        "source": [f"slide {i} é" if i else "" for i in range(len(counts))],
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
                instances=[drawn(found, size) for found in boxes[part]] if mapped else None,
                patches={name: values[part] for name, values in columns.items()},
            )
    return images, boxes, labels, centroids, columns


@settings(max_examples=10, deadline=None)
@given(counts=st.lists(st.integers(0, 4), max_size=20), seed=st.integers(0, 9), mapped=st.booleans())
def test_round_trip(tmp_path_factory, counts, seed, mapped):
    path = tmp_path_factory.mktemp("s") / "x.zarr"
    images, boxes, labels, centroids, columns = make(path, counts, seed, mapped=mapped)
    store = open_store(path)
    assert len(store) == store.n_patches == len(counts)
    assert (store.classes, store.mpp, store.patch_size) == (CLASSES, 0.5, SIZE)
    assert np.array_equal(store.images(range(len(store))), images)
    assert store.attrs["dropped"] == {"x": 3}
    for index in range(len(counts)):
        patch = store.read(index)
        assert np.array_equal(patch.image, images[index])
        assert np.array_equal(patch.boxes, boxes[index])
        assert np.array_equal(patch.labels, labels[index])
        assert np.array_equal(store.patches["source"][index], columns["source"][index])
    assert np.array_equal(store.centroids, np.concatenate([np.empty((0, 2)), *centroids]).astype(np.float32))
    assert store.attrs["counts"]["unlabelled"] == int((store.labels < 0).sum())
    assert store.has_instances == (mapped or not counts)  # a store without patches lacks none
    if store.has_instances:
        maps = store.instances(range(len(store)))
        assert maps.shape == (len(counts), SIZE, SIZE)
        assert maps.dtype == np.uint16
        assert all(np.array_equal(found, drawn(box, SIZE)) for found, box in zip(maps, boxes, strict=True))
    if mapped and counts:
        shown = sum(len(np.unique(found[found > 0])) for found in maps)
        assert store.attrs["nuclei_without_pixels"] == sum(counts) - shown


def test_any_order_of_patches_can_be_read_from_several_shards(tmp_path):
    path, count = tmp_path / "x.zarr", PATCHES_PER_SHARD + 5
    images, boxes, *_ = make(path, [1] * count, size=4, mapped=True)
    maps = np.stack([drawn(box, 4) for box in boxes])
    for name, array in (("images", images), ("instances", maps)):  # zarr reads the shards that we write
        assert np.array_equal(zarr.open_group(path)[name][...], array)
    store = open_store(path)
    everything = np.random.default_rng(0).permutation(count)
    for indices in ([], [4], [29, 0, 0, 13], range(250, 260), everything):
        assert np.array_equal(store.images(indices), images[list(indices)])
        assert np.array_equal(store.instances(indices), maps[list(indices)])
    for read in (store.images, store.instances):
        with pytest.raises(IndexError):
            read([count])


def test_images_can_be_encoded_before_they_are_appended(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 2 * SIZE, SIZE, 3), dtype=np.uint8)[:, ::2]  # not contiguous
    nuclei = {"boxes": [[], []], "labels": [[], []], "patches": dict.fromkeys(COLUMNS, [0, 1])}
    digests = set()
    for name, given_images in {"a": images, "b": [encode_image(image) for image in images]}.items():
        with StoreWriter(tmp_path / name, patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
            writer.append(given_images, **nuclei)
        store = open_store(tmp_path / name)
        assert np.array_equal(store.images([0, 1]), images)
        digests.add(store.digest)
    assert len(digests) == 1


BLACK = {
    "images": np.zeros((1, SIZE, SIZE, 3), np.uint8),
    "boxes": [[[0, 0, 1, 1]]],
    "labels": [[0]],
    "patches": dict.fromkeys(COLUMNS, [0]),
}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, ValueError, r"images: got shape \(4, 4, 3\)"),
        ({"images": np.zeros((1, SIZE, SIZE, 3), np.float32)}, ValueError, "images: got float32"),
        ({"images": [encode_image(np.zeros((SIZE, 4, 3), np.uint8))]}, ValueError, r"images: got shape \(8, 4, 3\)"),
        ({"images": []}, ValueError, "longer"),
        ({"labels": []}, ValueError, "shorter"),
        ({"patches": {**dict.fromkeys(COLUMNS, [0]), "x": []}}, ValueError, "shorter"),
        ({"labels": [[2]]}, InputError, "labels must be -1 to 1, but 1 of 1 are not.*nucleus 0 of patch 0.*label 2"),
        ({"labels": [np.array([256])]}, InputError, "label 256"),  # 0 in eight bits
        ({"boxes": [[[0, 0, 9, 1]]]}, InputError, r"x\.zarr: boxes must lie in 0 to 8 px"),
        ({"boxes": [[[4, 4, 4, 5]]]}, InputError, "and not be empty"),
        ({"boxes": [[[np.nan, 0, 1, 1]]]}, InputError, "boxes must lie"),
        ({"centroids": [[[5, 0.5]]]}, InputError, "centroids must lie in their box"),
    ],
)
def test_writer_refuses_what_does_not_fit(tmp_path, changes, kind, message):
    with (
        pytest.raises(kind, match=message),
        StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer,
    ):
        writer.append(**{**BLACK, **changes})
    assert list(tmp_path.iterdir()) == []


FULL = np.zeros((1, SIZE, SIZE), np.uint16)
FULL[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"instances": FULL.astype(np.int64)}, ValueError, r"instances: got int64 \(8, 8\), expected uint16"),
        ({"instances": FULL[:, :, :4]}, ValueError, r"instances: got shape \(8, 4\), expected sides of 8 px"),
        ({"instances": FULL[..., None]}, ValueError, r"instances: got shape \(8, 8, 1\)"),
        ({"instances": FULL[:0]}, ValueError, "shorter"),
        ({"instances": FULL + np.uint16(1)}, InputError, "patch 1: got the number 2, expected 0 to 1: its boxes"),
        ({"instances": FULL[:, ::-1]}, InputError, r"1 of 1 pixels lie outside.*x 0, y 7: number 1, box \[0.0, 0.0, 1"),
        ({"instances": 0 * FULL}, InputError, r"x\.zarr: instances of patch 1: number 1 has no pixel, and no other"),
        ({"instances": FULL, "boxes": [[]], "labels": [[]]}, InputError, "the number 1, expected 0 to 0"),
        ({"instances": FULL, "boxes": [[[np.nan, 0, 1, 1]]]}, InputError, "1 of 1 pixels lie outside"),
        (
            {"instances": None},
            ValueError,
            "instances: got none for patch 1, some for those before",
        ),
    ],
)
def test_writer_refuses_instances_that_do_not_fit(tmp_path, changes, kind, message):
    with StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
        writer.append(**BLACK, instances=FULL)
        with pytest.raises(kind, match=message):
            writer.append(**{**BLACK, **changes})


def test_writer_refuses_instances_of_the_later_patches_alone(tmp_path):
    with StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
        writer.append(**BLACK)
        with pytest.raises(ValueError, match="instances: got some for patch 1, none for those before"):
            writer.append(**BLACK, instances=FULL)


def overwrite(path, name, index, value):
    zarr.open_group(path, mode="r+")[name][index] = value


def change(**attrs):
    return lambda path: zarr.open_group(path, mode="r+").attrs.update(attrs)


WRONG = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no store": (lambda path: (path / "zarr.json").unlink(), "cannot be opened as a patch store"),
    "no images": (lambda path: shutil.rmtree(path / "images"), "cannot be opened as a patch store.*images"),
    "no shard": (lambda path: shard(path).unlink(), "images: got 0 of 1 files"),
    "no shard of instances": (lambda path: shard(path, "instances").unlink(), "instances: got 0 of 1 files"),
    "no instances": (lambda path: shutil.rmtree(path / "instances"), "cannot be opened as a patch store.*instances"),
    "other instances": (change(instances_digest=""), "digest: got"),
    "forgotten instances": (lambda path: zarr.open_group(path).attrs.pop("instances_digest"), "digest: got"),
    "no boxes": (lambda path: shutil.rmtree(path / "boxes" / "c"), "boxes: got 0 of 1 files"),
    "no places": (lambda path: shutil.rmtree(path / "patches" / "x" / "c"), "patches/x: got 0 of 1 files"),
    "other format": (change(format=3), "format: got 3, expected 4; make the store again"),
    "other mpp": (change(mpp=5.0), "digest: got .* changed after the store was written"),
    "other classes": (change(classes=["b", "a"]), "digest: got"),
    "other stride": (change(settings={"stride": 0.5}), "digest: got"),
    "other images": (change(images_digest=""), "digest: got"),
    "other box": (lambda path: overwrite(path, "boxes", (3, 2), 9), "digest: got"),
    "other label": (lambda path: overwrite(path, "labels", 5, 1 - int(open_store(path).labels[5])), "digest: got"),
    "other offsets": (lambda path: overwrite(path, "box_ptr", -1, 3), "digest: got"),
    "other group": (lambda path: overwrite(path, "patches/group", 0, "g9"), "digest: got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_incomplete_or_invalid_store_is_named(tmp_path, name):
    path = tmp_path / "x.zarr"
    make(path, [2] * 6, mapped=True)
    spoil, message = WRONG[name]
    spoil(path)
    with pytest.raises(InputError, match=message) as error:
        open_store(path)
    assert str(path) in str(error.value)


def flip(data, at):
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-100],
        lambda data: b"",
        lambda data: flip(data, 50),  # pixels
        lambda data: flip(data, -4095),  # places of the chunks
        lambda data: flip(data, -1),  # checksum of the places
    ],
)
@pytest.mark.parametrize("array", ["images", "instances"])
def test_damaged_pixels_are_an_error_and_not_zeros(tmp_path, spoil, array):
    path = tmp_path / "x.zarr"
    make(path, [1] * 4, mapped=True)
    file = shard(path, array)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(InputError, match=rf"x\.zarr: {array} of patches 0 to 3: cannot be read"):
        getattr(open_store(path), array)(range(4))


def test_instances_of_other_patches_are_refused(tmp_path):
    make(tmp_path / "a.zarr", [2, 1, 2], mapped=True)
    make(tmp_path / "b.zarr", [2, 3, 2], mapped=True)
    shutil.copy(shard(tmp_path / "b.zarr", "instances"), shard(tmp_path / "a.zarr", "instances"))
    store = open_store(tmp_path / "a.zarr")
    store.instances([0, 2])
    with pytest.raises(InputError, match=r"a\.zarr: instances of patch 1: got numbers above .* of another store"):
        store.instances([2, 1, 0])


def test_black_patches_and_zero_values_are_kept(tmp_path):
    with StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
        writer.append(**BLACK)
    assert not open_store(tmp_path / "x.zarr").images([0]).any()


def test_a_store_goes_to_other_processes(tmp_path):
    images, *_ = make(tmp_path / "x.zarr", [1] * 6)
    store = open_store(tmp_path / "x.zarr")
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert np.array_equal(pool.apply(store.images, ([5, 1],)), images[[5, 1]])


def test_the_digest_is_that_of_the_content(tmp_path):
    def digest(name, counts=(2, 1, 2), **options):
        make(tmp_path / name, counts, **options)
        return open_store(tmp_path / name).digest

    first = digest("a.zarr")
    assert first == digest("again.zarr", step=1)  # however it is written
    assert first == "445113f6871965e952dd783bd479fa7a6f376e993394a44068641d38fe707cd2"  # as before there were instances
    others = {"b.zarr": {"seed": 1}, "c.zarr": {"mpp": 0.25}, "d.zarr": {"classes": ("b", "a")}, "e.zarr": {"size": 4}}
    others["f.zarr"] = {"mapped": True}
    assert len({first, *(digest(name, **options) for name, options in others.items())}) == 1 + len(others)
    store = open_store(tmp_path / "a.zarr")
    select([(store, [0, 1, 2])], tmp_path / "copy.zarr", attrs={"why": "test"})
    select([(store, [2, 1, 0])], tmp_path / "turned.zarr")
    assert open_store(tmp_path / "copy.zarr").digest == first != open_store(tmp_path / "turned.zarr").digest


def test_the_digest_covers_every_pixel_of_the_instances(tmp_path):
    digests, whole = set(), BLACK | {"boxes": [[[0, 0, 8, 8]]], "instances": np.ones((1, SIZE, SIZE), np.uint16)}
    for pixel in (None, (0, 0, 0), (0, 0, 1), (0, SIZE - 1, SIZE - 1)):
        instances = whole["instances"].copy()
        if pixel:
            instances[pixel] = 0
        with StoreWriter(tmp_path / "x.zarr", patch_size=SIZE, classes=CLASSES, mpp=1) as writer:
            writer.append(**whole | {"instances": instances})
        digests.add(open_store(tmp_path / "x.zarr").digest)
    assert len(digests) == 4


def test_incomplete_patches_are_kept_and_a_store_without_them_is_as_before(tmp_path):
    images, boxes, labels, centroids, columns = make(tmp_path / "a.zarr", [2, 1, 2])
    stores = {}
    for name, complete in {"all.zarr": [True, True, True], "some.zarr": [True, False, True]}.items():
        with StoreWriter(tmp_path / name, patch_size=SIZE, classes=CLASSES, mpp=0.5, attrs={"dropped": {}}) as writer:
            patches = {**columns, "complete": complete}
            writer.append(images, boxes, labels, centroids=centroids, patches=patches)
        stores[name] = open_store(tmp_path / name)
        assert stores[name].patches["complete"].tolist() == complete
    before = open_store(tmp_path / "a.zarr")
    assert before.patches["complete"].all()
    assert before.digest == stores["all.zarr"].digest != stores["some.zarr"].digest
    select([(stores["some.zarr"], [1, 0]), (before, [1])], tmp_path / "mixed.zarr")
    assert open_store(tmp_path / "mixed.zarr").patches["complete"].tolist() == [False, True, True]
    shutil.rmtree(tmp_path / "some.zarr" / "patches" / "complete")
    with pytest.raises(InputError, match="digest"):
        open_store(tmp_path / "some.zarr")


def test_a_store_without_instances_says_what_to_do(tmp_path):
    make(tmp_path / "a.zarr", [1, 2])
    with pytest.raises(InputError, match=r"a\.zarr: instances: got none, .*convert_pannuke .*delete an older store"):
        open_store(tmp_path / "a.zarr").instances([0])


def test_select_takes_instances_if_all_stores_have_them(tmp_path):
    options = {"a.zarr": {"mapped": True}, "b.zarr": {"mapped": True, "seed": 1}, "c.zarr": {}}
    boxes = {name: make(tmp_path / name, [3, 2, 0, 4], **how)[1] for name, how in options.items()}
    a, b, c = (open_store(tmp_path / name) for name in options)
    select([(b, [3, 0]), (a, [3])], tmp_path / "ba.zarr")
    expected = [drawn(boxes[name][patch], SIZE) for name, patch in (("b.zarr", 3), ("b.zarr", 0), ("a.zarr", 3))]
    assert np.array_equal(open_store(tmp_path / "ba.zarr").instances(range(3)), expected)
    select([(a, [0]), (c, [0])], tmp_path / "ac.zarr", attrs=a.attrs)
    assert not open_store(tmp_path / "ac.zarr").has_instances
    select([(a, range(4))], tmp_path / "copy.zarr")
    assert open_store(tmp_path / "copy.zarr").digest == a.digest


def test_select_takes_the_chosen_patches_in_order(tmp_path):
    first = make(tmp_path / "a.zarr", [1, 0, 3, 2], seed=1)
    second = make(tmp_path / "b.zarr", [2, 4], seed=2)
    stores = [open_store(tmp_path / name) for name in ("a.zarr", "b.zarr")]
    select([(stores[1], [1]), (stores[0], [3, 0]), (stores[1], [])], tmp_path / "some.zarr", attrs={"why": "test"})
    some = open_store(tmp_path / "some.zarr")
    assert np.array_equal(some.images(range(3)), np.stack([second[0][1], first[0][3], first[0][0]]))
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
def test_select_refuses_stores_of_another_kind(tmp_path, key, value):
    make(tmp_path / "a.zarr", [1])
    make(tmp_path / "b.zarr", [1], **{key: value})
    with pytest.raises(InputError, match=r"b\.zarr"):
        select([(open_store(tmp_path / name), [0]) for name in ("a.zarr", "b.zarr")], tmp_path / "all.zarr")
    assert not (tmp_path / "all.zarr").exists()
