"""Learning curves, and figures 4b and 4c, of planted logs."""

import json

import numpy as np
import pandas as pd
import pytest

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.colours import CLASS_COLOURS
from celldetr.evaluation.similarity import DrawnSimilarities
from celldetr.report.curves import draw_curves, read_log
from celldetr.report.figure4 import figure4b, figure4c
from celldetr.report.style import save
from celldetr.runtime.errors import InputError

MEASURED = {"store": "fold1", "retrieval": 0.75, "chance": 0.0625, "anchors": 96, "patches": 6}


def losses(epoch, *names):
    return {name: 1 / (epoch + 1) for name in ("loss", "nucleus", "l1", "giou", *names)}


def table(lines):
    return pd.json_normalize(lines).set_index("epoch")


def ssl_log():
    """Make the log of three epochs of pretraining; epoch 0 was only validated."""
    lines = []
    for epoch in range(4):
        scores = {"retrieval": 0.2 * epoch, "own": 0.9, "others": 0.1, "spread": 0.5, "detection": {"f1": None}}
        train = losses(epoch, "contrastive") if epoch else None
        lines.append({"epoch": epoch, "train": train, "val": {**losses(epoch, "contrastive"), **scores}})
    return table(lines)


def supervised_log():
    """Make the log of five epochs; necrotic nuclei have no score, and every second epoch was validated."""
    lines = []
    for epoch in range(1, 6):
        f1 = {name: None if name == "necrotic" else 0.1 * epoch for name in PANNUKE_CLASSES}
        val = {**losses(epoch, "classes"), "detection": {"f1": 0.15 * epoch}, "f1": f1} if epoch % 2 else None
        lines.append({"epoch": epoch, "train": losses(epoch, "classes"), "val": val})
    return table(lines)


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_learning_curves_draw_the_numbers_of_the_log_and_mark_the_epoch_of_the_model(tmp_path):
    total, parts, found = draw_curves(supervised_log(), 3).axes
    assert list(lines_of(total)["training"].get_xdata()) == [1, 2, 3, 4, 5]
    assert list(lines_of(total)["validation"].get_xdata()) == [1, 3, 5]
    assert list(lines_of(total)["epoch 3: the model"].get_xdata()) == [3, 3]
    assert {"nucleus", "l1", "giou", "classes"} <= set(lines_of(parts))
    assert lines_of(found)["epithelial"].get_color() == CLASS_COLOURS["epithelial"]
    assert np.isnan(lines_of(found)["necrotic"].get_ydata()).all()
    assert {"retrieval", "spread"} <= set(lines_of(draw_curves(ssl_log(), 3).axes[2]))
    without = table([{"epoch": 1, "train": losses(1, "classes"), "val": None}])
    save(draw_curves(without, 1), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_logs_are_read_and_other_files_are_refused_by_name(tmp_path):
    path, lines = tmp_path / "log.jsonl", [{"epoch": k, "train": {"loss": 0.5}, "val": None} for k in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(path)["train.loss"].tolist() == [0.5, 0.5]
    for damaged in (path.read_text()[:-4], "{}\n"):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"log\.jsonl: got .*expected the log of a training run"):
            read_log(path)


def test_figure_4b_draws_the_numbers_of_the_log():
    figure = figure4b(ssl_log(), "SSL")
    assert len(figure.axes) == 5
    training, validation = figure.axes[1].get_lines()
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(validation.get_xdata()) == [0, 1, 2, 3]
    assert validation.get_ydata()[1] == 0.5


def test_figure_4c_draws_one_heat_map_per_patch_with_its_accuracy(tmp_path):
    matrices = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8)).astype(np.float32)
    drawn = DrawnSimilarities(np.array([1, 4]), np.array([8, 5]), matrices)
    figure = figure4c(drawn, MEASURED, ssl_log(), "PanNuke")
    maps = [np.asarray(axis.get_images()[0].get_array()) for axis in figure.axes if axis.get_images()]
    assert np.array_equal(maps[0], matrices[0])
    assert np.array_equal(maps[1], matrices[1, :5, :5])
    assert "75.0% of 96 anchors" in figure.get_suptitle()
    assert "6 patches of fold1 (chance 6.2%)" in figure.get_suptitle()
    save(figure, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    none = DrawnSimilarities(np.array([], int), np.array([], int), matrices[:0])
    with pytest.raises(InputError, match="no patch with two nuclei"):
        figure4c(none, {**MEASURED, "retrieval": None}, ssl_log(), "PanNuke")
