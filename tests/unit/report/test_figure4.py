"""Similarity of anchors to originals, and figures 4b and 4c."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import make_crowded_store, make_experiment, make_split, make_ssl_experiment, make_store

from celldetr.config.experiment import NoiseSettings
from celldetr.inference.similarity import measure_similarity
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import load_model
from celldetr.report import figure4
from celldetr.report.style import save
from celldetr.runtime.errors import InputError
from celldetr.training.loop import train

NOISE = NoiseSettings(low=0.4, high=0.8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train for two epochs; the model, the patches that it was validated on, and the folder of the run."""
    folder = tmp_path_factory.mktemp("ssl")
    before = torch.get_num_threads()
    store = make_crowded_store(folder / "slide.zarr", 12)
    split = make_split(store, 0, 12)
    split.loc[6:, "part"] = "train"
    experiment = make_ssl_experiment(
        {"dropout": 0.0}, epochs=2, lr=3e-3, backbone_lr=3e-3, select="last", noise={"low": 0.4, "high": 0.8}
    )
    path = train(experiment, [store], split, folder / "run")
    torch.set_num_threads(before)
    first = make_crowded_store(folder / "first.zarr", 6)  # the same first patches: same seed
    return load_model(path), first, folder / "run"


def measure(model, store, patches, **settings):
    given = {"seed": 42, "noise": NOISE, "batch_size": 4} | settings
    drawn, measured = measure_similarity(model, store, patches=np.array(patches, dtype=np.int64), **given)
    return drawn, {**measured, "store": "fold1"}


def test_measured_retrieval_is_the_one_that_the_log_says(trained):
    model, store, run = trained
    _, measured = measure(model, store, [0])
    said = figure4.read_log(run / "log.jsonl")[-1]["val"]
    for name in ("retrieval", "own", "others"):
        assert measured[name] == pytest.approx(said[name], abs=1e-5)
    assert measured["anchors"] == 6 * 16
    assert measured["chance"] == pytest.approx(1 / 16)
    assert measured["own"] > measured["others"]


def test_matrices_are_those_of_the_chosen_patches_whatever_the_batch(trained):
    model, store, _ = trained
    drawn, measured = measure(model, store, [1, 4])
    again, same = measure(model, store, [4], batch_size=1)
    assert drawn.similarity.shape == (2, 16, 16)
    assert drawn.counts.tolist() == [16, 16]
    assert np.allclose(drawn.similarity[1], again.similarity[0], atol=1e-4)
    assert same["own"] == pytest.approx(measured["own"], abs=1e-4)
    assert (np.abs(drawn.similarity) <= 1 + 1e-5).all()
    other, _ = measure(model, store, [4], seed=1)
    assert not np.allclose(other.similarity, again.similarity, atol=1e-3)


def test_summary_follows_from_the_matrices(trained):
    model, store, _ = trained
    drawn, measured = measure(model, store, range(6))
    right = drawn.similarity.argmax(axis=2) == np.arange(16)
    diagonal = np.eye(16, dtype=bool)
    assert measured["retrieval"] == pytest.approx(right.mean())
    assert measured["own"] == pytest.approx(drawn.similarity[:, diagonal].mean(), abs=1e-5)
    assert measured["others"] == pytest.approx(drawn.similarity[:, ~diagonal].mean(), abs=1e-5)


def test_classes_of_a_store_do_not_matter_and_empty_patches_are_legal(trained, tmp_path):
    model, _, _ = trained
    store = make_store(tmp_path / "fold1.zarr", 10)
    drawn, measured = measure(model, store, [0, 4])
    sizes = np.diff(store.box_ptr)
    assert drawn.counts.tolist() == sizes[[0, 4]].tolist()
    assert measured["anchors"] == sizes[sizes >= 2].sum()
    assert measured["patches"] == (sizes >= 2).sum()
    assert np.isnan(drawn.similarity[1]).all()
    empty = make_crowded_store(tmp_path / "empty.zarr", 0)
    assert measure(model, empty, [])[1]["retrieval"] is None


def test_a_model_without_a_projection_is_refused(trained):
    with pytest.raises(InputError, match="no projection head"):
        measure(CellDETR(make_experiment("parallel").model), trained[1], [0])


def test_patches_to_draw_are_readable_ones_if_there_are():
    sizes = np.array([0, 1, 100, 8, 2, 20, 90, 39])
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    assert set(figure4.choose_readable(ptr, 3, seed=1)) == {3, 5, 7}
    assert set(figure4.choose_readable(ptr, 20, seed=1)) == {2, 3, 4, 5, 6, 7}
    assert len(figure4.choose_readable(ptr, 0, seed=1)) == 0


def test_files_come_back(trained, tmp_path):
    drawn, measured = measure(*trained[:2], [1, 4])
    figure4.write_similarities(tmp_path / "a.npz", drawn)
    figure4.write_retrieval(tmp_path / "a.json", measured)
    back = figure4.read_similarities(tmp_path / "a.npz")
    assert np.array_equal(back.similarity, drawn.similarity)
    assert np.array_equal(back.patch, drawn.patch)
    assert figure4.read_retrieval(tmp_path / "a.json")["retrieval"] == measured["retrieval"]


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"epoch": 1, "train": {"loss": 1.0}, "val": None}) + "\n")
    with pytest.raises(InputError, match=r"log\.jsonl: got no contrastive losses"):
        figure4.read_log(tmp_path / "log.jsonl")
    (tmp_path / "x.json").write_text("{}")
    for read, name in (
        (figure4.read_log, "none.jsonl"),
        (figure4.read_similarities, "x.json"),
        (figure4.read_retrieval, "x.json"),
    ):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read(tmp_path / name)


def test_figure_4b_draws_the_numbers_of_the_log(trained):
    log = figure4.read_log(trained[2] / "log.jsonl")
    figure = figure4.figure4b(log, "SSL")
    assert len(figure.axes) == 5
    training, validation = figure.axes[1].get_lines()
    assert list(training.get_xdata()) == [1, 2]
    assert list(validation.get_xdata()) == [0, 1, 2]
    assert validation.get_ydata()[0] == log[0]["val"]["contrastive"]


def test_figure_4c_draws_one_heat_map_per_patch_with_its_accuracy(trained, tmp_path):
    drawn, measured = measure(*trained[:2], [1, 4])
    figure = figure4.figure4c(drawn, measured, figure4.read_log(trained[2] / "log.jsonl"), "PanNuke")
    maps = [axis for axis in figure.axes if axis.get_images()]
    assert np.array_equal(np.asarray(maps[0].get_images()[0].get_array()), drawn.similarity[0])
    assert f"{measured['retrieval']:.1%} of 96 anchors" in figure.get_suptitle()
    assert "6 patches of fold1 (chance 6.2%)" in figure.get_suptitle()
    save(figure, tmp_path / "c.png")
    assert Path(tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(trained):
    drawn, measured = measure(*trained[:2], [])
    with pytest.raises(InputError, match="no patch with two nuclei"):
        figure4.figure4c(drawn, measured, figure4.read_log(trained[2] / "log.jsonl"), "PanNuke")
