"""Patch stores: every valid one comes back to the byte; a damaged one is refused or gives the very same content."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import damages, refused, tries

from celldetr.store import StoreWriter, open_store, validate

FEW = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6)


@st.composite
def contents(draw):
    """Everything that a store is written from."""
    size = draw(st.sampled_from([1, 2, 8, 33]))
    classes = tuple(draw(st.lists(FEW.filter(lambda name: name != "unlabelled"), max_size=4, unique=True)))
    counts = draw(st.lists(st.integers(0, 3), max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corner = st.integers(0, 4 * size)
    boxes, centroids = [], []
    for count in counts:
        ends = [
            [sorted(draw(st.lists(corner, min_size=2, max_size=2, unique=True))) for _ in "xy"] for _ in range(count)
        ]
        box = np.array([[x[0], y[0], x[1], y[1]] for x, y in ends], np.float32).reshape(-1, 4) / 4
        boxes.append(box)
        centroids.append(np.where(draw(st.booleans()), (box[:, :2] + box[:, 2:]) / 2, np.nan).astype(np.float32))
    return {
        "classes": classes,
        "mpp": draw(st.floats(0.01, 10)),
        "images": rng.integers(0, 256, (len(counts), size, size, 3), dtype=np.uint8),
        "boxes": boxes,
        "labels": [rng.integers(-1, len(classes), count).astype(np.int8) for count in counts],
        "centroids": centroids,
        "patches": {
            **{name: [draw(FEW) for _ in counts] for name in ("source", "group", "tissue")},
            **{name: [draw(st.integers(-(2**62), 2**62)) for _ in counts] for name in ("x", "y")},
        },
    }


def write(path, content):
    parts = dict(content)
    options = {"patch_size": parts["images"].shape[1], "classes": parts.pop("classes"), "mpp": parts.pop("mpp")}
    with StoreWriter(path, **options) as writer:
        writer.append(parts.pop("images"), parts.pop("boxes"), parts.pop("labels"), **parts)
    return path


def everything(path):
    """All that a store gives, for comparison; raises for a store that is damaged."""
    validate(path)
    store = open_store(path)
    arrays = (store.all_images(), store.boxes, store.labels, store.centroids, store.box_ptr)
    return [store.classes, [(array.dtype, array.shape, array.tobytes()) for array in arrays], store.patches.to_csv()]


@tries(80)
@given(content=contents())
def test_a_valid_store_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    validate(write(path, content))
    store = open_store(path)
    assert store.classes == content["classes"]
    assert store.mpp == content["mpp"]
    assert np.array_equal(store.all_images(), content["images"])
    for name, width in (("boxes", 4), ("centroids", 2)):
        want = np.concatenate([np.empty((0, width), np.float32), *content[name]])
        assert getattr(store, name).tobytes() == want.tobytes()
    assert np.array_equal(store.labels, np.concatenate([np.empty(0, np.int8), *content["labels"]]))
    assert np.array_equal(np.diff(store.box_ptr), [len(box) for box in content["boxes"]])
    for name, values in content["patches"].items():
        assert store.patches[name].tolist() == values
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a store, all that it gives, and its files."""
    rng = np.random.default_rng(3)
    counts = [2, 0, 3, 1]
    low = [rng.uniform(0, 8, (count, 2)) for count in counts]
    boxes = [np.concatenate([corner, corner + rng.uniform(1, 8, corner.shape)], axis=1) for corner in low]
    path = write(
        tmp_path_factory.mktemp("whole") / "a.zarr",
        {
            "classes": ("round", "long"),
            "mpp": 0.25,
            "images": rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8),
            "boxes": boxes,
            "labels": [rng.integers(-1, 2, count) for count in counts],
            "centroids": [(box[:, :2] + box[:, 2:]) / 2 for box in boxes],
            "patches": {
                **{name: ["a", "b é", "", "d"] for name in ("source", "group", "tissue")},
                **{name: [1, -2, 3, 4] for name in ("x", "y")},
            },
        },
    )
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return path, everything(path), files


@tries(600)
@given(data=st.data(), damage=damages(), delete=st.integers(0, 20))
def test_a_damaged_store_is_refused_or_gives_the_same(whole, tmp_path_factory, data, damage, delete):
    path, before, files = whole
    copy = tmp_path_factory.mktemp("copy") / "a.zarr"
    shutil.copytree(path, copy)
    file = copy / data.draw(st.sampled_from(files))
    if delete == 0:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    error, after = refused(everything, copy)
    assert error is not None or after == before
    assert error is None or str(copy) in str(error)
    shutil.rmtree(copy)
