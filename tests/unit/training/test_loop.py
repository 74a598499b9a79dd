"""Training runs of a tiny model: they learn, stop, go on, and share a batch."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_training import (
    CLASSES,
    assert_same_result,
    make_experiment,
    make_split,
    make_ssl_experiment,
    make_store,
    read_log,
    stopping,
    train,
)

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import TrainingSettings
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.inference.predict import predict_fold
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import load_model, read_checkpoint
from celldetr.runtime.errors import ConfigError, InputError, Interrupted, NonFinite, ProcessFailed
from celldetr.training import loop, run_log
from celldetr.training.data import TrainingBatches
from celldetr.training.loop import Training
from celldetr.training.optimizer import learning_rate_factor, make_optimizer

HELPERS = Path(__file__).parents[2] / "helpers"


def test_a_run_leaves_all_its_results(store, tmp_path):
    path = train(make_experiment(), [store], make_split(store, 7, 4), tmp_path / "run")
    assert load_model(path).settings == make_experiment().model
    lines = read_log(path.parent)
    assert [line["step"] for line in lines] == [2, 4, 6]  # 7 patches make 2 batches of 4
    assert set(lines[0]["val"]["f1"]) == set(CLASSES)
    provenance = json.loads((path.parent / "provenance.json").read_text())
    assert provenance["patches"] == {"train": 7, "val": 4}
    assert list((path.parent / "tensorboard").glob("events*"))


def test_a_small_model_learns_two_images_by_heart(store, tmp_path):
    experiment = make_experiment(
        "sequential",
        model={"d_model": 32, "dropout": 0.0, "queries": 8},
        epochs=150,
        batch_size=2,
        lr=4e-3,
        backbone_lr=4e-3,
        warmup_steps=10,
        select="last",
        augmentation={"elastic": 0.0, "flip": 0.0, "blur": 0.0, "jitter": 0.0},
    )
    split = make_split(store, 2, 2)
    split["patch"] = [0, 1, 0, 1]
    path = train(experiment, [store], split, tmp_path / "run", scoring=ScoringSettings(radius_um=1.5))
    lines = read_log(path.parent)
    assert lines[-1]["train"]["loss"] < 0.3 * lines[0]["train"]["loss"]
    assert lines[-1]["val"]["detection"]["f1"] == 1
    assert lines[-1]["val"]["class_f1"] == 1


@pytest.mark.parametrize(
    ("mode", "score", "threshold"),
    [("sequential", "both_thresholds", 0.52), ("parallel", "product", 0.17), ("baseline", "class", 0.33)],
)
def test_validation_scores_are_those_of_the_test(store, tmp_path, mode, score, threshold):
    """What the log says of an epoch is what predicting and scoring with its weights gives, with any settings."""
    scoring = ScoringSettings(score=score, nucleus_threshold=0.2, class_threshold=threshold, radius_um=2.0)
    experiment = make_experiment(mode, epochs=12, lr=4e-3, backbone_lr=4e-3, select="last")
    split = make_split(store, 10, 0)
    split = pd.concat([split, split.assign(part="val")])
    path = train(experiment, [store], split, tmp_path / "run", scoring=scoring)
    ten = make_store(tmp_path / "ten.zarr", 10)  # the first patches of the fixture: same seed
    predict_fold(load_model(path), ten, tmp_path / "p.parquet", nucleus_threshold=0.2, batch_size=3)
    found = read_predictions(tmp_path / "p.parquet")
    table = score_fold(found, ten, scoring, resamples=0).query("metric == 'strict'").set_index("class")
    said = read_log(path.parent)[-1]["val"]
    assert 0 < table.loc["Detection", "n_predicted"] < len(found), "the thresholds decide"
    assert said["detection"]["f1"] > 0
    assert said["detection"] == pytest.approx(table.loc["Detection", ["precision", "recall", "f1"]].to_dict(), abs=1e-6)
    assert said["f1"] == pytest.approx({name: table.loc[name.capitalize(), "f1"] for name in CLASSES}, abs=1e-6)


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = TrainingSettings(warmup_steps=10, warmup_from=0.1)
    factors = [learning_rate_factor(step, 110, settings) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1)
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    assert np.argmax(factors) == 10


def test_backbone_has_its_own_learning_rate():
    experiment = make_experiment(backbone_lr=3e-5)
    model = CellDETR(experiment.model)
    groups = make_optimizer(model, experiment.training).param_groups
    assert [group["lr"] for group in groups] == [1e-3, 3e-5]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.backbone.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel"])
def test_patches_without_nuclei_and_nuclei_without_labels_are_legal(tmp_path, mode):
    store = make_store(tmp_path / "fold1.zarr", 10, unlabelled=True)
    split = make_split(store, 4, 4)
    split["patch"] = [4, 9, 0, 1, 4, 9, 0, 1]  # every fifth is empty
    path = train(make_experiment(mode, batch_size=2), [store], split, tmp_path / "run")
    last = read_log(path.parent)[-1]
    assert last["val"]["class_f1"] is None
    assert last["val"].get("classes", 0) == 0
    assert last["val"]["l1"] > 0


def test_streaming_gives_the_same_run_as_a_cache(store, tmp_path):
    split = make_split(store, 8, 4)
    for cache, workers in (("ram", 0), ("none", 0), ("none", 2)):
        train(make_experiment(cache=cache, workers=workers, epochs=2), [store], split, tmp_path / f"{cache}{workers}")
    assert_same_result(tmp_path / "ram0", tmp_path / "none0")
    assert_same_result(tmp_path / "ram0", tmp_path / "none2")


@pytest.mark.parametrize(
    ("at", "number", "experiment"),
    [
        (3, signal.SIGTERM, make_experiment("parallel", noise={"share": 0.5})),
        (4, signal.SIGUSR1, make_ssl_experiment()),
        (8, signal.SIGTERM, make_experiment("sequential")),
    ],
    ids=["in an epoch", "before its last step", "in the last step of all"],
)
def test_a_signal_stops_at_the_next_step_and_the_run_goes_on_exactly(
    store, slide, tmp_path, monkeypatch, at, number, experiment
):
    store = slide if experiment.stage == "ssl" else store
    split = make_split(store, 9, 4)
    train(experiment, [store], split, tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        stopping(patch, at, number)
        if at < 8:
            with pytest.raises(Interrupted, match=f"{number.name} after step {at + 1} of 9"):
                train(experiment, [store], split, tmp_path / "run")
            assert not (tmp_path / "run" / "model.pt").exists()
        else:
            train(experiment, [store], split, tmp_path / "run")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    train(experiment, [store], split, tmp_path / "run")
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_training_goes_on_while_its_state_is_written(store, tmp_path, monkeypatch):
    """The file holds the weights of its step, whatever later steps did to them before it was written."""
    weights, written, steps_after = {}, threading.Event(), 2
    take_step, write_state = Training.take_step, Training.write_state

    def step(self, batch):
        if self.step == 2:
            weights.update({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        take_step(self, batch)
        if self.step == 2 + steps_after:
            written.set()

    def late(self, state):
        assert written.wait(60)
        write_state(self, state)
        if state["step"] == 2:
            weights["found"] = read_checkpoint(self.run.state_file)["model"]

    monkeypatch.setattr(Training, "take_step", step)
    monkeypatch.setattr(Training, "write_state", late)
    train(make_experiment(), [store], make_split(store, 8, 4), tmp_path / "run")
    found = weights.pop("found")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("at", [2, 6])
def test_a_state_that_cannot_be_written_ends_the_run_with_its_error(store, tmp_path, monkeypatch, at):
    """At the next step, or at the end; the state before and the model that it names are still there."""
    experiment, split = make_experiment(), make_split(store, 8, 4)
    train(experiment, [store], split, tmp_path / "whole")
    write = loop.write_state

    def full(path, identity, **state):
        if state["step"] == at:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, identity, **state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_state", full)
        with pytest.raises(OSError, match=r"No space left .*last\.ckpt"):
            train(experiment, [store], split, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (read_checkpoint(state)["step"] if state.exists() else 0) == at - 2
    assert not (tmp_path / "run" / "model.pt").exists()
    train(experiment, [store], split, tmp_path / "run")
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_seconds_of_training_are_without_validation_and_writing(store, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def taking(seconds, function):
        def timed(*args):
            clock.now += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(run_log, "time", clock)
    for seconds, name in ((2.0, "take_step"), (10.0, "validate"), (100.0, "save_state")):
        monkeypatch.setattr(Training, name, taking(seconds, getattr(Training, name)))
    path = train(make_experiment(epochs=2), [store], make_split(store, 8, 4), tmp_path / "run")
    lines = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    names = ("train_seconds", "val_seconds", "images_per_second")
    assert [[line[name] for name in names] for line in lines] == [[4.0, 10.0, 2.0]] * 2
    assert json.loads((path.parent / "provenance.json").read_text())["training_seconds"] == 8.0


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_bit_identical(store, tmp_path):
    """SIGKILL at two random moments; the last process finishes."""
    whole = {"epochs": 20, "batch_size": 2}
    split = make_split(store, 8, 4)
    train(make_experiment(**whole), [store], split, tmp_path / "whole")
    program = f"""
        import sys
        sys.path.insert(0, {str(HELPERS)!r})
        from pathlib import Path
        from tiny_training import make_experiment, make_split, train
        from celldetr.store import open_store
        store = open_store({str(store.path)!r})
        train(make_experiment(**{whole!r}), [store], make_split(store, 8, 4), Path({str(tmp_path / "run")!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    state = tmp_path / "run" / "checkpoints" / "last.ckpt"
    moments = random.Random()
    for _ in range(2):
        written = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == written):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_failed_while_writing_its_results_only_writes_them(store, tmp_path, monkeypatch):
    experiment, split = make_experiment(), make_split(store, 8, 4)
    train(experiment, [store], split, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("celldetr.training.loop.write_provenance", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(experiment, [store], split, tmp_path / "run")
    monkeypatch.setattr(Training, "take_step", lambda *_: 1 / 0)
    train(experiment, [store], split, tmp_path / "run")
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_a_damaged_checkpoint_is_refused_by_name(store, tmp_path):
    train(make_experiment(epochs=1), [store], make_split(store, 8, 4), tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.ckpt[\s\S]*Delete .*last\.ckpt to train from the start"):
        train(make_experiment(), [store], make_split(store, 8, 4), tmp_path / "run")


def test_a_killed_loader_process_is_said_at_once_and_the_run_goes_on(store, tmp_path, monkeypatch):
    experiment, split = make_experiment(cache="none", workers=1), make_split(store, 8, 4)
    train(experiment, [store], split, tmp_path / "whole")
    load = TrainingBatches.__getitem__

    def killed(batches, step):
        if step == 3 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__getitem__", killed)
        start = time.monotonic()
        with pytest.raises(
            ProcessFailed, match=r"a process that loads patches was killed .*DataLoader worker.* memory"
        ):
            train(experiment, [store], split, tmp_path / "run")
        assert time.monotonic() - start < 60
    assert not (tmp_path / "run" / "model.pt").exists()
    train(experiment, [store], split, tmp_path / "run")
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_not_finite_names_the_patches(store, tmp_path):
    experiment = make_experiment(lr=1e30, backbone_lr=1e30, warmup_steps=0, gradient_clip=0.0)
    with pytest.raises(NonFinite, match=r"step 2: .* not finite, in a batch of patches fold1:\d+"):
        train(experiment, [store], make_split(store, 8, 4), tmp_path / "run")


def test_nuclei_without_a_label_do_not_train_the_class_head(tmp_path):
    cells = make_store(tmp_path / "sample.zarr", 8, unlabelled=True)
    experiment = make_experiment("parallel", epochs=1, weight_decay=0.0, select="last")
    path = train(experiment, [cells], make_split(cells, 6, 2), tmp_path / "run")
    torch.manual_seed(experiment.training.seed)
    start = CellDETR(experiment.model).state_dict()
    trained = read_checkpoint(path)["state"]
    assert torch.equal(start["class_head.weight"], trained["class_head.weight"])
    assert not torch.equal(start["decoder.class_embed.0.weight"], trained["decoder.class_embed.0.weight"])
    assert read_log(tmp_path / "run")[0]["val"]["f1"] == dict.fromkeys(CLASSES)


def test_what_cannot_be_trained_is_refused(store, tmp_path):
    split = make_split(store, 4, 2)
    turned = make_store(tmp_path / "fold1.zarr", 6, classes=CLASSES[::-1])
    coarse = make_store(tmp_path / "coarse.zarr", 6, mpp=5.0)
    both = pd.concat([split, make_split(coarse, 2, 1)])
    for stores, table, options, message in (
        ([store], split.assign(store="nowhere"), {}, "nowhere"),
        ([store], split.assign(part="train"), {}, "part 'val'"),
        ([store], split.assign(part="val"), {}, "part 'train'"),
        ([turned], split, {}, r"fold1\.zarr: got classes \['long', 'round'\], expected"),
        ([store, coarse], both, {}, r"\{'fold1': \(32, 0\.5\), 'coarse': \(32, 5\.0\)\}, expected the same of all"),
        ([store], split, {"accelerator": "cuda"}, r"training\.gpus: got 4"),
    ):
        with pytest.raises((InputError, ConfigError), match=message):
            train(make_experiment(gpus=4 if options else 1), stores, table, tmp_path / "run", **options)
    train(make_experiment(select="last", epochs=1), [store], split.assign(part="train"), tmp_path / "run")
