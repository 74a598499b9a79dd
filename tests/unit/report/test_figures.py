"""Nuclei that are drawn, shares of attention, and pictures."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from PIL import Image

from celldetr.evaluation.predictions import Predictions
from celldetr.inference import attention
from celldetr.inference.attention import DrawnNuclei, choose_nuclei, read_drawn, share_inside, write_drawn
from celldetr.report.figures import SystemShare, choose_patches, figure3, overlays
from celldetr.report.style import colour_of, save
from celldetr.runtime.errors import ConfigError, InputError

CLASSES = ("neoplastic", "inflammatory", "connective", "necrotic", "epithelial")
SIZE = 64


@dataclass(frozen=True)
class Store:
    box_ptr: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    centroids: np.ndarray = None
    classes: tuple = CLASSES

    @property
    def n_patches(self):
        return len(self.box_ptr) - 1


def make_store(seed=0, n_patches=30, labels=(0, 1, 2, 4)):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 9, n_patches)
    low = rng.uniform(0, SIZE - 4, (sizes.sum(), 2))
    boxes = np.concatenate([low, np.minimum(low + rng.uniform(1, 14, low.shape), SIZE)], axis=1)
    return Store(np.cumsum([0, *sizes]), boxes.astype(np.float32), rng.choice(labels, sizes.sum()).astype(np.int8))


def make_drawn(count=3, *, seed=0, found=None, heads=8, per_head=4):
    rng = np.random.default_rng(seed)
    images = np.random.default_rng(0).integers(100, 255, (count, SIZE, SIZE, 3), dtype=np.uint8)
    boxes = np.tile(np.array([20, 22, 34, 40], dtype=np.float32), (count, 1))
    weights = rng.gamma(0.5, size=(count, heads * per_head)).astype(np.float32)
    points = rng.uniform(15, 45, (count, heads * per_head, 2)).astype(np.float32)
    found = np.ones(count, dtype=bool) if found is None else np.array(found)
    weights[~found], points[~found] = np.nan, np.nan
    return DrawnNuclei(
        patch=np.arange(count),
        nucleus=np.arange(count) * 3,
        label=np.arange(count).astype(np.int8),
        true_box=boxes,
        image=images,
        found=found,
        box=np.where(found[:, None], boxes + 1, np.nan).astype(np.float32),
        nucleus_score=np.where(found, 0.9, np.nan).astype(np.float32),
        points=points,
        weights=weights / weights.sum(axis=1, keepdims=True),
        classes=CLASSES,
        mpp=0.25,
    )


# ---- which nuclei are drawn


def test_nuclei_are_the_same_each_time_and_differ_by_seed():
    store = make_store()
    assert np.array_equal(choose_nuclei(store, SIZE, 4, 1), choose_nuclei(store, SIZE, 4, 1))
    assert any(not np.array_equal(choose_nuclei(store, SIZE, 4, 1), choose_nuclei(store, SIZE, 4, s)) for s in (2, 3))


def test_nuclei_are_of_different_classes_and_patches_and_well_inside():
    store = make_store(n_patches=60)
    for seed in range(10):
        chosen = choose_nuclei(store, SIZE, 4, seed)
        assert store.labels[chosen].tolist() == [0, 1, 2, 4]
        assert len(set(np.searchsorted(store.box_ptr, chosen, side="right"))) == 4
        edge = attention.MARGIN * SIZE
        assert (store.boxes[chosen, :2] >= edge).all()
        assert (store.boxes[chosen, 2:] <= SIZE - edge).all()
    twelve = choose_nuclei(store, SIZE, 12, 0)
    assert len(set(twelve.tolist())) == 12
    assert np.bincount(store.labels[twelve]).tolist() == [3, 3, 3, 0, 3]


def test_fewer_nuclei_than_asked_for_are_all_drawn():
    few = Store(np.array([0, 2, 2]), np.array([[0, 0, 1, 1], [60, 60, 64, 64]], np.float32), np.array([0, -1], np.int8))
    assert choose_nuclei(few, SIZE, 4, 0).tolist() == [0]
    unlabelled = replace(few, labels=np.array([-1, -1], np.int8))
    assert choose_nuclei(unlabelled, SIZE, 4, 0).tolist() == [0, 1]
    none = Store(np.array([0, 0]), np.empty((0, 4), np.float32), np.empty(0, np.int8))
    assert choose_nuclei(none, SIZE, 4, 0).tolist() == []


# ---- shares


def test_share_is_the_weight_of_the_points_inside():
    points = np.array([[[1, 1], [5, 5], [10, 3], [11, 3]], [[0, 0], [0, 0], [0, 0], [0, 0]]], dtype=float)
    weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    boxes = np.array([[5, 3, 10, 6], [1, 1, 2, 2]], dtype=float)
    assert share_inside(points, weights, boxes) == pytest.approx([0.5, 0.0])  # edges count
    assert share_inside(points, 7 * weights, boxes) == pytest.approx([0.5, 0.0])
    assert share_inside(points[:0], weights[:0], boxes[:0]).shape == (0,)


def test_drawn_nuclei_come_back_as_written(tmp_path):
    drawn = make_drawn(found=(True, False, True))
    write_drawn(tmp_path / "points.npz", drawn)
    back = read_drawn(tmp_path / "points.npz")
    for name, value in vars(drawn).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    assert back.classes == CLASSES
    (tmp_path / "points.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"points.npz: got .*expected a file of the attention rule"):
        read_drawn(tmp_path / "points.npz")


def test_shares_come_back_as_written(tmp_path):
    path = tmp_path / "share.json"
    attention.write_share(path, {"share_true_box": 0.25, "nuclei": 4})
    assert attention.read_share(path) == (0.25, 4)
    attention.write_share(path, {"share_true_box": None, "nuclei": 0})
    assert np.isnan(attention.read_share(path)[0])
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"share.json: got TypeError"):
        attention.read_share(path)


# ---- figure 3


def texts(figure):
    return [text.get_text() for text in dict.fromkeys(figure.findobj(Text)) if text.get_text()]


def panels(figure, row, n_columns):
    return figure.axes[row * n_columns : (row + 1) * n_columns]


SHARES = [SystemShare("Deformable DETR", 0.4213, 12345), SystemShare("CellDETR-S", float("nan"), 0)]


def test_every_nucleus_is_a_row_and_every_model_a_column():
    drawn = [make_drawn(), make_drawn(seed=1, found=(True, False, True))]
    figure = figure3(drawn, SHARES)
    assert len(figure.axes) == 3 * 3 + 1  # colour bar
    words = texts(figure)
    assert {"H&E", "Deformable DETR", "CellDETR-S", "42.1 % in box, n = 12,345", "no nucleus detected"} <= set(words)
    assert words.count("missed") == 1
    for row, of_class in enumerate(CLASSES[:3]):
        tissue, *systems = panels(figure, row, 3)
        assert tissue.get_ylabel() == of_class
        for axis, item in zip(systems, drawn, strict=True):
            drawn_points = [artist for artist in axis.collections if isinstance(artist, PathCollection)]
            assert len(drawn_points) == int(item.found[row])
            if item.found[row]:
                share = share_inside(item.points[[row]], item.weights[[row]], item.true_box[[row]])[0]
                assert axis.get_xlabel().startswith(f"{100 * share:.0f} % in box")
                (artist,) = drawn_points
                assert len(artist.get_offsets()) == item.points.shape[1]
                assert np.all(np.diff(artist.get_sizes()) >= 0)
            assert axis.get_xlim() == tissue.get_xlim()
            assert axis.get_ylim() == tissue.get_ylim()


@pytest.mark.parametrize("where", [(0, 0), (SIZE - 14, SIZE - 18), (30, 30)])
def test_views_stay_in_the_patch_and_hold_the_nucleus(where):
    drawn = make_drawn(1)
    box = np.array([[*where, where[0] + 14, where[1] + 18]], dtype=np.float32)
    far = drawn.points + np.float32(500)
    for points in (drawn.points, far):
        axis = figure3([replace(drawn, true_box=box, points=points)], SHARES[:1]).axes[0]
        (x0, x1), (y1, y0) = axis.get_xlim(), axis.get_ylim()
        assert 0 <= x0 <= box[0, 0]
        assert box[0, 2] <= x1 <= SIZE
        assert 0 <= y0 <= box[0, 1]
        assert box[0, 3] <= y1 <= SIZE


def test_weight_outside_the_view_is_said():
    drawn = make_drawn(1)
    figure = figure3([replace(drawn, points=drawn.points + np.float32(500))], SHARES[:1])
    assert figure.axes[1].get_xlabel() == "0 % in box, 100 % off view"


def test_texts_do_not_overlap():
    drawn = [replace(make_drawn(4, seed=k), points=make_drawn(4, seed=k).points * 2) for k in range(3)]
    shares = [SystemShare(title, 0.4213, 123456) for title in ("Deformable DETR", "CellDETR-S", "CellDETR-P")]
    figure = figure3(drawn, shares)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    whole = figure.bbox
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in dict.fromkeys(figure.findobj(Text))
        if text.get_text() and text.get_visible()
    ]
    for index, (one, box) in enumerate(boxes):
        assert box.x0 >= 0, one
        assert box.y0 >= 0, one
        assert box.x1 <= whole.x1, one
        assert box.y1 <= whole.y1, one
        for other, second in boxes[index + 1 :]:
            assert not box.overlaps(second), (one, other)


def test_models_on_different_nuclei_are_refused():
    one = make_drawn()
    with pytest.raises(InputError, match="attention of CellDETR-S: its nuclei are not those of Deformable DETR"):
        figure3([one, replace(one, nucleus=one.nucleus + 1)], SHARES)
    with pytest.raises(InputError, match="its nuclei are not"):
        figure3([one, replace(one, image=one.image[::-1])], SHARES)
    with pytest.raises(ConfigError, match="got no nuclei to draw"):
        figure3([make_drawn(0)], SHARES[:1])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, kind):
    for name in ("a", "b"):
        save(figure3([make_drawn()], SHARES[:1]), tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


# ---- overlays


def predictions(n_patches, count=5):
    rng = np.random.default_rng(0)
    patch = np.repeat(np.arange(n_patches), count).astype(np.int32)
    low = rng.uniform(0, SIZE - 10, (len(patch), 2))
    scores = rng.uniform(size=(len(patch), len(CLASSES))).astype(np.float32)
    return Predictions(
        patch=patch,
        query=np.tile(np.arange(count), n_patches).astype(np.int16),
        boxes=np.concatenate([low, low + 9], axis=1).astype(np.float32),
        nucleus_score=np.full(len(patch), 0.9, np.float32),
        class_scores=scores,
        labels=scores.argmax(axis=1).astype(np.int8),
        classes=CLASSES,
        n_patches=n_patches,
    )


def test_overlays_draw_every_box_of_the_chosen_patches(tmp_path):
    found = predictions(9)
    patches = np.array([1, 4, 5, 8])
    truth = [(np.array([[1, 1, 9, 9]] * k, dtype=np.float32).reshape(-1, 4), np.full(k, -1)) for k in range(4)]
    images = np.full((4, SIZE, SIZE, 3), 200, dtype=np.uint8)
    figure = overlays(images, patches, truth, found, title="a model")
    counts = [len(axis.patches) / 2 for axis in figure.axes]  # each box has a dark casing
    assert counts == [0, 5, 1, 5, 2, 5, 3, 5]
    assert {"a model", "patch 4: 1 true", "5 predicted", "no label", *CLASSES} <= set(texts(figure))
    save(figure, tmp_path / "overlays.png")
    with Image.open(tmp_path / "overlays.png") as picture:
        assert min(picture.size) > 500
    with pytest.raises(InputError, match="without patches"):
        overlays(images[:0], patches[:0], [], found, title="none")


def test_patches_with_nuclei_are_chosen_first():
    box_ptr = np.cumsum([0, 0, 3, 0, 0, 1, 2, 0])
    assert choose_patches(box_ptr, 3, 0).tolist() == [1, 4, 5]
    assert set(choose_patches(box_ptr, 5, 0)) > {1, 4, 5}
    assert choose_patches(box_ptr, 99, 0).tolist() == list(range(7))
    assert choose_patches(np.array([0]), 3, 0).tolist() == []


def test_classes_have_colours_of_their_own():
    assert len({colour_of(label) for label in range(-1, 10)}) == 11
