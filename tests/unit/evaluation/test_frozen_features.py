"""Frozen-feature evaluation: planted embeddings get the scores they must, and only training nuclei are learnt."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_training import make_experiment, make_split, make_store

import frozen_features as script
from celldetr.config.evaluation import FrozenFeatureSettings
from celldetr.evaluation import frozen_features
from celldetr.evaluation.frozen_features import (
    classify,
    draw_nuclei,
    evaluate_frozen_features,
    score,
    write_frozen_features,
)
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import save_model
from celldetr.runtime.errors import ConfigError, InputError

CLASSES = ("neoplastic", "inflammatory", "connective", "necrotic")
PATCHES, CHANNELS = 40, 6
SETTINGS = FrozenFeatureSettings(k=5, max_nuclei=1000)


def make_fold(name, seed):
    """Make a store without images: every seventh nucleus is without a label, every fifth patch without nuclei."""
    rng = np.random.default_rng(seed)
    counts = np.where(np.arange(PATCHES) % 5 == 4, 0, rng.integers(1, 20, PATCHES))
    labels = rng.integers(0, len(CLASSES), counts.sum()).astype(np.int8)
    labels[::7] = -1
    ptr = np.concatenate([[0], np.cumsum(counts)])
    return SimpleNamespace(path=Path(f"some/{name}.zarr"), classes=CLASSES, labels=labels, box_ptr=ptr)


FOLDS = {f"fold{k}": make_fold(f"fold{k}", k) for k in (1, 2, 3)}


def whole_split(val_every=4):
    """Folds 1 and 3 train and validate, fold 2 tests."""
    frames = []
    for name in ("fold1", "fold3"):
        part = np.where(np.arange(PATCHES) % val_every == 0, "val", "train")
        frames.append(pd.DataFrame({"store": name, "patch": np.arange(PATCHES), "part": part}))
    frames.append(pd.DataFrame({"store": "fold2", "patch": np.arange(PATCHES), "part": "test"}))
    return pd.concat(frames, ignore_index=True)


class Planted:
    """Embeddings by fold (M, C): those of the class' centre with some noise, or of noise alone; NaN without a label."""

    def __init__(self, informative=True, spread=0.2):
        rng = np.random.default_rng(9)
        centres = 4 * np.eye(len(CLASSES), CHANNELS) if informative else np.zeros((len(CLASSES), CHANNELS))
        self.values, self.asked = {}, {}
        for name, fold in FOLDS.items():
            noise = spread * rng.standard_normal((len(fold.labels), CHANNELS))
            self.values[name] = np.where(fold.labels[:, None] >= 0, centres[fold.labels] + noise, np.nan)

    def __call__(self, store, patches):
        self.asked[store.path.stem] = np.asarray(patches)
        for patch in patches.tolist():
            nuclei = slice(store.box_ptr[patch], store.box_ptr[patch + 1])
            yield patch, self.values[store.path.stem][nuclei].astype(np.float32)


def measure(embed, *, train=("fold1", "fold3"), split=None, settings=SETTINGS):
    split = whole_split() if split is None else split
    return evaluate_frozen_features(embed, [FOLDS[k] for k in train], FOLDS["fold2"], split, settings=settings, seed=1)


def accuracy(table):
    return table[table["class"] == "Accuracy"].set_index("classifier")["f1"]


def test_separable_embeddings_are_told_apart():
    table, summary = measure(Planted())
    scores = table.set_index("classifier").loc[["knn", "linear"]]
    assert (scores[["precision", "recall", "f1"]] == 1).all(axis=None)
    assert summary["linear"]["converged"]
    share = np.bincount(FOLDS["fold2"].labels[FOLDS["fold2"].labels >= 0]).max() / table["n"].max()
    assert accuracy(table)["majority"] <= share < 0.5


def test_embeddings_without_information_score_at_chance():
    found = accuracy(measure(Planted(informative=False), settings=FrozenFeatureSettings(k=1, max_nuclei=1000))[0])
    n = (FOLDS["fold2"].labels >= 0).sum()
    assert np.abs(found - 1 / len(CLASSES)).max() < 4 * np.sqrt(0.25 * 0.75 / n)


def test_only_labelled_nuclei_of_training_patches_train_and_of_test_patches_are_scored():
    """Embeddings of validation patches are not finite, which no classifier would take."""
    embed, split = Planted(), whole_split()
    expected = 0
    for name in ("fold1", "fold3"):
        fold, train = FOLDS[name], split.loc[(split["store"] == name) & (split["part"] == "train"), "patch"]
        owner = np.repeat(np.arange(PATCHES), np.diff(fold.box_ptr))
        used = np.isin(owner, train) & (fold.labels >= 0)
        expected += used.sum()
        embed.values[name][~used] = np.nan
    table, summary = measure(embed, split=split)
    assert (accuracy(table)[["knn", "linear"]] == 1).all()
    assert sum(summary["train"].values()) == summary["train_available"] == expected
    tested = FOLDS["fold2"].labels
    assert (table.loc[table["class"] == "Accuracy", "n"] == (tested >= 0).sum()).all()
    assert summary["test"] == {name: (tested == k).sum() for k, name in enumerate(CLASSES)}
    for name, asked in embed.asked.items():
        part = "test" if name == "fold2" else "train"
        assert set(asked) <= set(split.loc[(split["store"] == name) & (split["part"] == part), "patch"])


def test_order_of_rows_and_stores_does_not_matter():
    embed = Planted(spread=2.5)
    for limit in (60, 1000):
        settings = FrozenFeatureSettings(k=3, max_nuclei=limit)
        first = measure(embed, settings=settings)
        shuffled = whole_split().sample(frac=1, random_state=3)
        second = measure(embed, train=("fold3", "fold1"), split=shuffled, settings=settings)
        pd.testing.assert_frame_equal(first[0], second[0])
        assert first[1] == second[1]
        assert 0.3 < accuracy(first[0])["knn"] < 0.98  # neither would tell anything


def test_the_draw_is_stratified_has_every_class_and_follows_the_seed():
    available = pd.DataFrame({"label": np.repeat([0, 1, 2, 0, 1, 3], [900, 90, 2, 900, 90, 1])})
    drawn = draw_nuclei(available, 100, seed=5)
    assert np.bincount(drawn["label"]).tolist() in ([89, 9, 1, 1], [90, 8, 1, 1])
    assert drawn.equals(draw_nuclei(available, 100, seed=5))
    assert not drawn.equals(draw_nuclei(available, 100, seed=6))
    assert drawn.index.is_monotonic_increasing
    assert draw_nuclei(available, 5000, seed=5).equals(available)
    for limit in (4, 5, 50):
        drawn = draw_nuclei(available, limit, seed=0)
        assert len(drawn.index.unique()) == limit
        assert set(drawn["label"]) == {0, 1, 2, 3}


def test_neighbours_are_those_by_cosine():
    rng = np.random.default_rng(0)
    directions = np.eye(2, 8)
    labels = np.arange(200) % 2
    points = directions[labels] + 0.1 * rng.standard_normal((200, 8))
    near = points[labels == 0] * 0.01  # their Euclidean neighbours are all of one class
    test = np.concatenate([near, points[labels == 1] * 100])
    predicted, _ = classify(points, labels, test, 3, seed=0)
    assert predicted["knn"].tolist() == [0] * 100 + [1] * 100


def test_logistic_regression_does_not_depend_on_the_scale_of_a_feature():
    rng = np.random.default_rng(1)
    labels = np.arange(300) % 3
    train = np.eye(3, 5)[labels] + 0.5 * rng.standard_normal((300, 5))
    train[:, 4] = 7.0  # tells nothing
    test = train[rng.permutation(300)] + 0.3 * rng.standard_normal((300, 5))
    scale, shift = np.array([1e-3, 1.0, 50.0, 1e3, 2.0]), np.array([0, 5.0, -100.0, 3.0, 1.0])
    plain, _ = classify(train, labels, test, 3, seed=0)
    scaled, _ = classify(train * scale + shift, labels, test * scale + shift, 3, seed=0)
    assert (plain["linear"] == scaled["linear"]).mean() > 0.99
    assert (plain["linear"] == plain["majority"]).mean() < 0.6


def test_a_fit_that_has_not_converged_says_so(monkeypatch, caplog):
    monkeypatch.setattr(frozen_features, "_ITERATIONS", 1)
    _, summary = measure(Planted(spread=2.0))
    assert summary["linear"] == {"converged": False, "iterations": 1}
    assert "did not converge" in caplog.text


def test_scores_of_a_counted_example():
    table = score(np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0]), CLASSES).set_index("class")
    values = table[["precision", "recall", "f1"]]
    assert values.loc["Neoplastic"].tolist() == pytest.approx([2 / 3] * 3)
    assert values.loc["Inflammatory"].tolist() == pytest.approx([1 / 2, 1, 2 / 3])
    assert values.loc["Connective"].tolist() == [0, 0, 0]
    assert values.loc["Accuracy"].tolist() == pytest.approx([3 / 5] * 3)
    assert values.loc["Macro"].tolist() == pytest.approx([7 / 18, 5 / 9, 4 / 9])


def test_classes_without_truth_or_prediction():
    table = score(np.array([0, 0, 1, 1]), np.array([0, 0, 2, 2]), CLASSES).set_index("class")
    assert table.loc["Inflammatory", ["precision", "recall", "f1"]].tolist() == [0, 0, 0]
    assert table.loc[["Connective", "Necrotic"], ["precision", "recall", "f1"]].isna().all(axis=None)
    assert table.loc["Macro", "f1"] == 0.5
    assert table["n"].tolist() == [4, 4, 2, 2, 0, 0]


def test_models_are_written_by_their_weights_and_missing_values_as_na(tmp_path):
    split = whole_split()
    few = split[(split["store"] != "fold2") | (split["patch"] == 0)]
    tables = {"trained": measure(Planted(), split=few)[0], "random (seed 1)": measure(Planted(False), split=few)[0]}
    write_frozen_features(tmp_path / "a.tsv", tables, experiment="ssl", split=2)
    lines = (tmp_path / "a.tsv").read_text().splitlines()
    assert lines[0] == "experiment\tsplit\tweights\tclassifier\tclass\tprecision\trecall\tf1\tn"
    assert len(lines) == 1 + 2 * 3 * (2 + len(CLASSES))
    table = pd.read_csv(tmp_path / "a.tsv", sep="\t")
    assert list(table["weights"].unique()) == list(tables)
    assert (table["f1"].isna() == (table["n"] == 0)).all()
    assert lines[1].startswith("ssl\t2\ttrained\tknn\tAccuracy")


def renamed(fold, **change):
    return SimpleNamespace(**{**vars(fold), **change})


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="frozen_features.k: got 900, expected at most"):
        measure(Planted(), settings=FrozenFeatureSettings(k=900, max_nuclei=1000))
    for label, classes in ((-1, 0), (2, 1)):
        with monkeypatch.context() as patch:
            for name in ("fold1", "fold3"):
                patch.setitem(FOLDS, name, renamed(FOLDS[name], labels=np.full_like(FOLDS[name].labels, label)))
            with pytest.raises(InputError, match=f"got {classes} classes with training nuclei"):
                measure(Planted())
    monkeypatch.setitem(FOLDS, "fold3", renamed(FOLDS["fold3"], classes=("a", "b", "c", "d")))
    with pytest.raises(InputError, match="got classes"):
        measure(Planted())


def test_the_script_reads_a_model_and_stores(tmp_path):
    torch.manual_seed(0)
    settings = make_experiment("parallel").model
    save_model(tmp_path / "model.pt", CellDETR(settings), settings, {"trained_on": []})
    train, test = make_store(tmp_path / "fold1.zarr", 100, seed=1), make_store(tmp_path / "fold2.zarr", 40, seed=2)
    split = make_split(train, 90, 10)
    rows = pd.DataFrame({"store": "fold2", "patch": np.arange(40), "part": "test"})
    pd.concat([split, rows]).to_csv(tmp_path / "split1.tsv", sep="\t", index=False)
    output = SimpleNamespace(tsv=tmp_path / "out.tsv", provenance=tmp_path / "out.json")
    inputs = SimpleNamespace(
        model=tmp_path / "model.pt", stores=[train.path], split=tmp_path / "split1.tsv", test=test.path
    )
    params = SimpleNamespace(k=3, max_nuclei=500, batch_size=8, compile="auto", seed=1)
    wildcards = SimpleNamespace(experiment="tiny", split="1")
    script.main(SimpleNamespace(input=inputs, output=output, params=params, wildcards=wildcards, threads=1))
    table = pd.read_csv(output.tsv, sep="\t")
    assert list(table["weights"].unique()) == ["trained", "random (seed 1)"]
    for _, of_weights in table.groupby("weights"):
        scores = accuracy(of_weights)
        assert scores["linear"] > scores["majority"] + 0.15  # weights that were never trained see colours, too
    trained, untrained = (group["f1"].tolist() for _, group in table.groupby("weights", sort=False))
    assert trained != untrained
    record = json.loads(output.provenance.read_text())
    assert record["settings"] == {"k": 3, "max_nuclei": 500, "batch_size": 8}
    assert "not a detection score" in record["frozen_features"]["what"]
    assert set(record["inputs"]) == {str(path) for path in (*vars(inputs).values(), train.path) if path != [train.path]}
    assert sum(record["frozen_features"]["trained"]["test"].values()) == len(test.labels)
