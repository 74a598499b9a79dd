"""Similarity of anchors to originals."""

import json

import numpy as np
import pytest
import torch
from tiny_training import make_crowded_store, make_experiment, make_split, make_ssl_experiment, make_store, train

from celldetr.config.experiment import NoiseSettings
from celldetr.inference.similarity import measure_similarity
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import load_model
from celldetr.runtime.errors import InputError

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
    said = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["val"]
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
    with pytest.raises(InputError, match="no projection head"):
        measure(CellDETR(make_experiment("parallel").model), store, [0])
