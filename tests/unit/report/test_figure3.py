"""Figure 3: attention over nuclei."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.text import Text

from celldetr.inference.attention import DrawnNuclei, read_drawn, share_inside
from celldetr.report.figure3 import SystemShare, figure3
from celldetr.report.style import save
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import write_npz

CLASSES = ("neoplastic", "inflammatory", "connective", "necrotic", "epithelial")
SIZE = 64
SHARES = [SystemShare("Deformable DETR", 0.4213, 12345), SystemShare("CellDETR-S", float("nan"), 0)]


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
        points=points,
        weights=weights / weights.sum(axis=1, keepdims=True),
        classes=CLASSES,
        mpp=0.25,
    )


def test_drawn_nuclei_come_back_as_written(tmp_path):
    drawn = make_drawn(found=(True, False, True))
    write_npz(tmp_path / "points.npz", drawn)
    back = read_drawn(tmp_path / "points.npz")
    for name, value in vars(drawn).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    assert back.classes == CLASSES


def texts(figure):
    return [text.get_text() for text in dict.fromkeys(figure.findobj(Text)) if text.get_text()]


def test_every_nucleus_is_a_row_and_every_model_a_column():
    drawn = [make_drawn(), make_drawn(seed=1, found=(True, False, True))]
    figure = figure3(drawn, SHARES)
    assert len(figure.axes) == 3 * 3 + 1  # colour bar
    words = texts(figure)
    assert {"H&E", "Deformable DETR", "CellDETR-S", "42.1 % in box, n = 12,345", "no nucleus detected"} <= set(words)
    assert words.count("missed") == 1
    for row, of_class in enumerate(CLASSES[:3]):
        tissue, *systems = figure.axes[3 * row : 3 * row + 3]
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


@pytest.mark.parametrize("models", [1, 2, 3])
def test_texts_do_not_overlap(models):
    drawn = [replace(make_drawn(4, seed=k), points=make_drawn(4, seed=k).points * 2) for k in range(models)]
    shares = [SystemShare(title, 0.4213, 123456) for title in ("Deformable DETR", "CellDETR-S", "CellDETR-P")]
    figure = figure3(drawn, shares[:models])
    renderer = FigureCanvasAgg(figure).get_renderer()
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


def test_a_figure_without_nuclei_is_refused():
    with pytest.raises(ConfigError, match="got no nuclei to draw"):
        figure3([make_drawn(0)], SHARES[:1])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, kind):
    for name in ("a", "b"):
        save(figure3([make_drawn()], SHARES[:1]), tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
