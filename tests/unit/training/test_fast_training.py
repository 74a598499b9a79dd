"""Kernels, compilation, precision and activation checkpointing leave the result of training as it is."""

import itertools

import numpy as np
import pytest
import torch
from tiny_training import (
    assert_same_result,
    make_crowded_store,
    make_experiment,
    make_split,
    make_ssl_experiment,
    read_log,
    train,
)
from torch._dynamo.backends.registry import lookup_backend

from celldetr.config.experiment import Experiment
from celldetr.training import detection, loop
from celldetr.training.data import TrainingBatches, ValidationBatches

STEPS = 50
PLAIN = {"model": {"kernel": "reference"}}


def experiment_of(kind, **settings):
    """Make an experiment of one step per epoch; settings by the block that they belong to."""
    recipe = {
        "epochs": STEPS,
        "select": "last",
        "lr": 5e-4,
        "backbone_lr": 5e-4,
        "noise": {"share": 0.5} if kind == "parallel" else {},
    }
    experiment = make_ssl_experiment(**recipe) if kind == "ssl" else make_experiment(kind, **recipe)
    told = experiment.to_dict()
    for block, values in settings.items():
        told[block] |= values
    return Experiment.from_dict(told)


def losses(store, experiment, folder, accelerator="cpu"):
    """Total loss of each step (S,)."""
    train(experiment, [store], make_split(store, 4, 2), folder, accelerator=accelerator)
    return np.array([line["train"]["loss"] for line in read_log(folder) if line["train"]])


def follow(fast, plain):
    """Allow what rounding does: it drives them apart slowly at first, then by a match that falls the other way."""
    np.testing.assert_allclose(fast[:10], plain[:10], rtol=1e-3)
    np.testing.assert_allclose(fast, plain, rtol=0.03)


@pytest.mark.parametrize("kind", ["baseline", "sequential", "parallel", "ssl"])
def test_fifty_steps_follow_those_of_the_plain_form(store, tmp_path, kind):
    if kind == "ssl":
        store = make_crowded_store(tmp_path / "crowded.zarr", 6)
    fast = losses(store, experiment_of(kind), tmp_path / "fast")
    plain = losses(store, experiment_of(kind, **PLAIN), tmp_path / "plain")
    assert len(fast) == STEPS
    assert fast[-5:].mean() < 0.9 * fast[:5].mean()  # it is training that is compared
    follow(fast, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["baseline", "sequential", "parallel", "ssl"])
def test_fifty_steps_on_a_gpu_follow_those_of_the_plain_form(store, tmp_path, kind):
    if kind == "ssl":
        store = make_crowded_store(tmp_path / "crowded.zarr", 6)
    fast = losses(store, experiment_of(kind, training={"precision": "tf32"}), tmp_path / "fast", "cuda")
    plain = losses(store, experiment_of(kind, training={"precision": "fp32"}, **PLAIN), tmp_path / "plain", "cuda")
    np.testing.assert_allclose(fast[:10], plain[:10], rtol=0.02)  # TF32 has 10 bits
    assert fast[-5:].mean() == pytest.approx(plain[-5:].mean(), rel=0.1)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_training_on_a_cpu_never_allows_tf32(store, tmp_path, precision):
    losses(store, experiment_of("parallel", training={"precision": precision, "epochs": 1}), tmp_path)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


@pytest.fixture
def graphs(monkeypatch):
    """Compile to graphs, forward and backward, without kernels; the graphs."""
    made, real, trace = [], torch.compile, lookup_backend("aot_eager")

    def backend(graph, inputs):
        made.append(graph)
        return trace(graph, inputs)

    whole = {"fullgraph": True, "dynamic": False, "backend": backend}
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, **whole))
    yield made
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("baseline", "fp32"), ("sequential", "fp32"), ("sequential", "bf16"), ("parallel", "fp32"), ("ssl", "bf16")],
)
def test_a_step_is_few_graphs_with_the_same_result(store, tmp_path, kind, precision, graphs, caplog):
    if kind == "ssl":
        store = make_crowded_store(tmp_path / "crowded.zarr", 6)
    recipe, model = {"precision": precision, "epochs": 3}, {}
    if precision == "bf16":  # PyTorch's attention with dropout rounds otherwise in half precision where it is traced
        model = {"dropout": 0.0}
    for name, compiled in (("compiled", True), ("plain", False)):
        losses(store, experiment_of(kind, training={**recipe, "compile": compiled}, model=model), tmp_path / name)
    assert_same_result(tmp_path / "compiled", tmp_path / "plain")
    assert "ran uncompiled" not in caplog.text
    functions = 4 if kind in ("parallel", "ssl") else 3
    assert functions <= len(graphs) <= 2 * functions + 1  # those of validation have no gradients
    graphs.clear()
    losses(store, experiment_of(kind, training={**recipe, "compile": True}, model=model), tmp_path / "compiled")
    assert not graphs, "a finished run compiles nothing"


def test_the_log_tells_of_steps_that_ran_uncompiled(store, tmp_path, graphs, monkeypatch, caplog):
    monkeypatch.setattr(TrainingBatches, "steps_of_sizes", lambda self, epochs: [])
    monkeypatch.setattr(ValidationBatches, "numbers_of_sizes", lambda self: [])
    for name, compiled in (("all", True), ("plain", False)):
        losses(store, experiment_of("sequential", training={"compile": compiled, "epochs": 2}), tmp_path / name)
    assert caplog.text.count("1 of the last 1 steps ran uncompiled or captured") == 2
    assert_same_result(tmp_path / "all", tmp_path / "plain")
    assert not graphs
    monkeypatch.setattr(loop, "captures", itertools.count().__next__)
    losses(store, experiment_of("sequential", training={"epochs": 1}), tmp_path / "captured")
    assert caplog.text.count("1 of the last 1 steps ran uncompiled or captured") == 3


def test_a_step_that_fails_to_compile_runs_as_it_is(store, tmp_path, monkeypatch, caplog):
    def broken(function, device, missed):
        def call(*given):
            raise RuntimeError("no kernel image\nis available")

        return call

    experiment = experiment_of("sequential", training={"epochs": 2})
    losses(store, experiment, tmp_path / "plain")
    monkeypatch.setattr(loop, "compiles", lambda setting, device, key, pays: True)
    monkeypatch.setattr(detection, "compiled", broken)
    losses(store, experiment, tmp_path / "broken")
    assert_same_result(tmp_path / "broken", tmp_path / "plain")
    assert "could not compile the step (no kernel image)" in caplog.text
    with pytest.raises(RuntimeError, match="no kernel"):
        losses(store, experiment_of("sequential", training={"compile": True}), tmp_path / "asked")


def test_half_precision_stays_near_single_precision(store, tmp_path):
    half = losses(store, experiment_of("parallel", training={"precision": "bf16", "epochs": 20}), tmp_path / "half")
    single = losses(store, experiment_of("parallel", training={"epochs": 20}), tmp_path / "single")
    assert not np.array_equal(half, single)
    np.testing.assert_allclose(half[:10], single[:10], rtol=0.05)
    assert half[-5:].mean() == pytest.approx(single[-5:].mean(), rel=0.15)


def test_activation_checkpointing_changes_nothing(store, tmp_path):
    again, kept = (
        experiment_of("parallel", training={"activation_checkpointing": again, "epochs": 5}) for again in (True, False)
    )
    for experiment, name in ((again, "again"), (kept, "kept")):
        losses(store, experiment, tmp_path / name)
    assert_same_result(tmp_path / "again", tmp_path / "kept")
