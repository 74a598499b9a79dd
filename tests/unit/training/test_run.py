"""What a run is: whatever its result depends on starts it anew, and nothing is tested on what its model has seen."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_training import make_experiment, make_split, make_store, read_log, stopping, train

import train as train_script
from celldetr.config.evaluation import ScoringSettings
from celldetr.model.backbone import Backbone
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import read_checkpoint, save_model, trained_on
from celldetr.runtime.errors import InputError, Interrupted
from celldetr.runtime.provenance import sha256
from celldetr.store import StoreWriter, open_store
from celldetr.store.splits import split_digest
from celldetr.training.loop import Training

EXPERIMENT = make_experiment(epochs=2)


def write_initial(path, seed):
    torch.manual_seed(seed)
    save_model(path, CellDETR(EXPERIMENT.model), EXPERIMENT.model, {"trained_on": []})
    return path


def copied(path, store, what=""):
    """Copy a store with one pixel, box or label changed."""
    images, boxes, labels = store.images(np.arange(len(store))), store.boxes.copy(), store.labels.copy()
    images[0, 3, 3, 0] += what == "pixel"
    boxes[0, 0] += 0.5 * (what == "box")
    labels[0] = 1 - labels[0] if what == "label" else labels[0]
    with StoreWriter(path, patch_size=store.patch_size, classes=store.classes, mpp=store.mpp) as writer:
        cuts = store.box_ptr[1:-1]
        writer.append(images, np.split(boxes, cuts), np.split(labels, cuts), patches=store.patches.to_dict("list"))
    return [open_store(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Give a finished run and what it was made from."""
    root = tmp_path_factory.mktemp("run")
    store = make_store(root / "fold1.zarr", 10)
    initial = write_initial(root / "initial.pt", 1)
    given = {"experiment": EXPERIMENT, "stores": [store], "split": make_split(store, 6, 3), "initial": initial}
    train(run_dir=root / "run", code="a", **given)
    return root / "run", {**given, "code": "a"}


CHANGES = {
    "initial weights": lambda given, folder: {"initial": write_initial(folder / "initial.pt", 2)},
    "a pixel": lambda given, folder: {"stores": copied(folder / "fold1.zarr", *given["stores"], "pixel")},
    "a box": lambda given, folder: {"stores": copied(folder / "fold1.zarr", *given["stores"], "box")},
    "a label": lambda given, folder: {"stores": copied(folder / "fold1.zarr", *given["stores"], "label")},
    "nucleus threshold": lambda given, folder: {"scoring": ScoringSettings(nucleus_threshold=0.3)},
    "class threshold": lambda given, folder: {"scoring": ScoringSettings(class_threshold=0.3)},
    "radius": lambda given, folder: {"scoring": ScoringSettings(radius_um=4.0)},
    "a row of the split": lambda given, folder: {"split": make_split(*given["stores"], 5, 4)},
    "settings": lambda given, folder: {"experiment": make_experiment(epochs=2, seed=9)},
    "code": lambda given, folder: {"code": "b"},
    "what the initial model has seen": lambda given, folder: {"trained_on": ("slide 7",)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_starts_anew_when_its_result_would_change(finished, tmp_path, monkeypatch, name):
    run, given = finished
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(Training, "take_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(run_dir=tmp_path / "run", **{**given, **CHANGES[name](given, tmp_path)})


HARMLESS = {
    "nothing": lambda given, folder: {},
    "paths": lambda given, folder: {
        "stores": copied(folder / "fold1.zarr", *given["stores"]),
        "initial": shutil.copyfile(given["initial"], folder / "other.pt"),
    },
    "processes and cache": lambda given, folder: {"experiment": make_experiment(epochs=2, cache="none", workers=1)},
    "threads": lambda given, folder: {"threads": 2},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_finished_run_is_not_trained_again_otherwise(finished, tmp_path, monkeypatch, name):
    run, given = finished
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.pt").unlink()
    monkeypatch.setattr(Training, "take_step", lambda *_: 1 / 0)
    train(run_dir=tmp_path / "run", **{**given, **HARMLESS[name](given, tmp_path)})
    assert (tmp_path / "run" / "model.pt").read_bytes() == (run / "model.pt").read_bytes()
    first, second = (json.loads((folder / "provenance.json").read_text()) for folder in (run, tmp_path / "run"))
    assert {key: value for key, value in second.items() if key not in ("written", "wall_seconds", "settings")} == {
        key: value for key, value in first.items() if key not in ("written", "wall_seconds", "settings")
    }


def test_the_backbone_is_part_of_the_run(tmp_path, monkeypatch):
    store = make_store(tmp_path / "fold1.zarr", 8)
    experiment = make_experiment(model={"backbone": {**EXPERIMENT.model.backbone.to_dict(), "norm": "frozen_batch"}})
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights = Backbone(experiment.model.backbone).state_dict()
        torch.save(weights, tmp_path / f"resnet{seed}.pth")
    given = (experiment, [store], make_split(store, 4, 3), tmp_path / "run")
    train(*given, backbone=tmp_path / "resnet1.pth")
    monkeypatch.setattr(Training, "take_step", lambda *_: 1 / 0)
    train(*given, backbone=tmp_path / "resnet1.pth")
    with pytest.raises(ZeroDivisionError):
        train(*given, backbone=tmp_path / "resnet2.pth")


def test_an_interrupted_run_of_other_settings_gives_the_result_of_a_new_one(tmp_path, monkeypatch, caplog):
    store = make_store(tmp_path / "fold1.zarr", 10)
    split, other = make_split(store, 6, 3), make_experiment(epochs=2, lr=2e-3)
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.raises(Interrupted):
            train(EXPERIMENT, [store], split, tmp_path / "run")
    train(other, [store], split, tmp_path / "run")
    assert "settings.training.lr: was 0.001, now 0.002" in caplog.text
    train(other, [store], split, tmp_path / "whole")
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    assert len(list((tmp_path / "run" / "checkpoints").glob("best*"))) == 1


def test_inputs_are_hashed_before_training(tmp_path, monkeypatch):
    """What lies at the path of an input after training was not read."""
    store, initial = make_store(tmp_path / "fold1.zarr", 8), write_initial(tmp_path / "initial.pt", 1)
    expected = {str(store.path): store.digest, str(initial): sha256(initial)}
    fit = Training.fit

    def replaced(self):
        write_initial(initial, 2)
        fit(self)

    monkeypatch.setattr(Training, "fit", replaced)
    train(EXPERIMENT, [store], make_split(store, 4, 3), tmp_path / "run", initial=initial)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["inputs"] == expected
    assert sha256(initial) != expected[str(initial)]


def test_a_model_names_what_it_and_its_ancestors_have_seen(tmp_path):
    stores = [make_store(tmp_path / f"{name}.zarr", 6, group=name) for name in ("d1", "d2", "d3")]
    split = pd.concat([make_split(stores[0], 4, 2), make_split(stores[1], 3, 2), make_split(stores[2], 6, 0)])
    split = pd.concat([split, pd.DataFrame({"store": ["d2"], "patch": [5], "part": ["test"]})], ignore_index=True)
    split.loc[split["store"] == "d3", "part"] = "test"
    first = train(make_experiment(epochs=1), stores, split, tmp_path / "first")
    own = ["d1", f"d2@{split_digest(split)}"]
    assert read_checkpoint(first)["extra"]["trained_on"] == own
    assert read_checkpoint(first)["extra"]["mpp"] == stores[0].mpp
    other = make_store(tmp_path / "fold1.zarr", 6, group="fold1")
    second = train(make_experiment(epochs=1), [other], make_split(other, 4, 2), tmp_path / "second", initial=first)
    assert read_checkpoint(second)["extra"]["trained_on"] == [*own, "fold1"]
    again = train(make_experiment(epochs=1), stores, split, tmp_path / "again", initial=first)  # the same test part
    assert read_checkpoint(again)["extra"]["trained_on"] == own


def test_a_run_that_would_be_tested_on_what_its_ancestor_has_seen_is_refused(tmp_path):
    stores = [make_store(tmp_path / f"{name}.zarr", 6, group=name) for name in ("d1", "d2")]
    split = pd.concat([make_split(stores[0], 4, 2), make_split(stores[1], 6, 0).assign(part="test")])
    initial = write_initial(tmp_path / "initial.pt", 1)
    with pytest.raises(InputError, match=r"initial\.pt: .*trained or validated on \['d2'\], expected none of"):
        train(EXPERIMENT, stores, split, tmp_path / "run", initial=initial, trained_on=("d2",))
    with pytest.raises(InputError, match=r"trained or validated on \['d2@0123'\]"):  # another split of the same donor
        train(EXPERIMENT, stores, split, tmp_path / "run", initial=initial, trained_on=("d2@0123",))
    train(EXPERIMENT, stores, split, tmp_path / "run", initial=initial, trained_on=("d1", "slide 3"))


def test_a_file_that_does_not_say_what_it_has_seen_must_be_declared(tmp_path):
    store = make_store(tmp_path / "fold1.zarr", 6)
    save_model(tmp_path / "foreign.pt", CellDETR(EXPERIMENT.model), EXPERIMENT.model)
    with pytest.raises(InputError, match=r"foreign\.pt: does not say .* list it in experiments\.tiny\.trained_on"):
        train(EXPERIMENT, [store], make_split(store, 4, 2), tmp_path / "run", initial=tmp_path / "foreign.pt")


def test_the_model_of_another_experiment_in_the_place_of_a_model_is_refused(tmp_path):
    for name in ("mine", "tiny"):
        place = tmp_path / "results" / "models" / name / "split1" / "model.pt"
        place.parent.mkdir(parents=True)
        extra = {"experiment": "tiny", "trained_on": ["fold1"]}
        save_model(place, CellDETR(EXPERIMENT.model), EXPERIMENT.model, extra)
    assert trained_on(place, None, "") == ["fold1"]
    with pytest.raises(InputError, match=r"mine/split1/model\.pt: got the model of experiment 'tiny', expected 'mine'"):
        trained_on(place.parents[2] / "mine" / "split1" / "model.pt", None, "")


def test_the_rule_refuses_a_split_that_was_cut_short_or_names_test_patches(tmp_path):
    fold1, fold2 = (make_store(tmp_path / f"{name}.zarr", 6, group=name) for name in ("fold1", "fold2"))
    split = pd.concat([make_split(fold1, 4, 2), make_split(fold2, 6, 0).assign(part="test")], ignore_index=True)
    options = {"experiment": EXPERIMENT.to_dict(), "scoring": {}, "trained_on": None, "code": ""}
    rule = SimpleNamespace(
        input=SimpleNamespace(stores=[str(fold1.path)], split=tmp_path / "split1.tsv", initial=[], backbone=[]),
        output=SimpleNamespace(model=str(tmp_path / "run" / "model.pt")),
        params=SimpleNamespace(**options),
        resources=SimpleNamespace(workers=0),
        threads=1,
    )
    for table, message in (
        (split.iloc[:5], r"split1\.tsv: got 5 rows of store fold1, expected one for each of its 6 patches"),
        (split.replace("test", "train"), r"part train names stores \['fold2'\]"),
        (split.assign(part="testing"), r"split1\.tsv: column part: got \['testing'\]"),
    ):
        table.to_csv(tmp_path / "split1.tsv", sep="\t", index=False)
        with pytest.raises(InputError, match=message):
            train_script.main(rule)
    split.to_csv(tmp_path / "split1.tsv", sep="\t", index=False)
    train_script.main(rule)
    assert read_checkpoint(rule.output.model)["extra"]["trained_on"] == ["fold1"]
