"""Each system, small, learns to find drawn nuclei; what its files say is counted again from the masks alone."""

import json
import zipfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.segmentation import SegmentationExperiment
from celldetr.evaluation.panoptic import panoptic_quality
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.example.pannuke import write_fold
from celldetr.inference.segment import segment_fold
from celldetr.model.weights import read_checkpoint
from celldetr.pannuke.convert import convert_fold
from celldetr.runtime.errors import Interrupted
from celldetr.segmentation.model_file import load_system
from celldetr.segmentation.systems import build_system
from celldetr.store import open_store
from celldetr.training.loop import Run, Training, train
from celldetr.training.segmentation import SegmentationStage

SIZE, RADIUS = 128, 6.0  # px; 3 um of 0.5 um
RECIPES = {
    "hover_net": {"epochs": 8},
    "micro_net": {"epochs": 8},
    "mask_rcnn": {"epochs": 12},
    "cellvit_256": {"epochs": 6, "lr": 3e-3, "backbone_lr": 3e-3},
    "cellvit_sam_b": {"epochs": 6, "lr": 3e-3, "backbone_lr": 3e-3},
}
"""For about 20 to 35 seconds of one core each."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Drawn archives of two folds, and the stores made of them."""
    folder, found = tmp_path_factory.mktemp("folds"), []
    for fold, patches in ((1, 108), (2, 30)):
        archive, path = folder / f"fold_{fold}.zip", folder / f"fold{fold}.zarr"
        write_fold(archive, fold, patches, SIZE, 1, mpp=0.5, mixture="example")
        convert_fold(archive, path, fold=fold, patch_size=SIZE, mpp=0.5)
        found.append((archive, open_store(path)))
    return found


def train_small(name, store, folder, patches=108, segmentation=None, **training):
    """Train a small system on the first patches of a store, of which 8 validate."""
    recipe = {"batch_size": 4, "lr": 1e-3, "backbone_lr": 1e-3, "warmup_steps": 20, "gradient_clip": 1.0}
    recipe |= {"precision": "fp32", "augmentation": {"elastic": 0.0, "blur": 0.0}, **training}
    system = {"system": name, "size": "small", **(segmentation or {})}
    experiment = SegmentationExperiment.from_dict(
        {"name": name, "classes": list(store.classes), "segmentation": system, "training": recipe}
    )
    parts = ["train"] * (patches - 8) + ["val"] * 8
    split = pd.DataFrame({"store": store.path.stem, "patch": range(patches), "part": parts})
    return train(Run(experiment, SegmentationStage, (store.path,), split, folder))


def scored(model, store, path, centres="box"):
    """Predict a store; its strict scores, a row per class."""
    segment_fold(model, store, path, batch_size=16)
    predictions = read_predictions(path, patch_size=SIZE)
    panoptic = panoptic_quality(predictions, store)
    scores = score_fold(predictions, store, ScoringSettings(), centres=centres, resamples=0, panoptic=panoptic)
    return scores[scores["metric"] == "strict"].set_index("class")


def true_nuclei(archive):
    """Of each patch the class and the pixels (n, 2) x, y of each nucleus, from the published layout."""
    with zipfile.ZipFile(archive) as file, file.open("Fold 2/masks/fold2/masks.npy") as member:
        masks = np.lib.format.read_array(member)
    return [
        [
            (channel, np.argwhere(mask[..., channel] == number)[:, ::-1])
            for channel in range(5)
            for number in np.unique(mask[..., channel])
            if number > 0
        ]
        for mask in masks
    ]


def found_nuclei(path, patches):
    """Of each patch the class and the pixels (n, 2) x, y of each nucleus, from the columns of the file."""
    found = [[] for _ in range(patches)]
    for row in pq.read_table(path).to_pylist():
        x0, y0, x1, y1 = (int(row[name]) for name in ("x0", "y0", "x1", "y1"))
        bits = [byte >> place & 1 for byte in row["mask"] for place in range(7, -1, -1)]
        assert 0 <= x0 < x1 <= SIZE
        assert 0 <= y0 < y1 <= SIZE
        assert len(bits) == -(-(x1 - x0) * (y1 - y0) // 8) * 8
        pixels = [(x0 + bit % (x1 - x0), y0 + bit // (x1 - x0)) for bit, inside in enumerate(bits) if inside]
        found[row["patch"]].append((row["label"], np.array(pixels)))
    return found


def centre(pixels, centres):
    """Centre x, y of pixels (n, 2): of all of them, or of the box around them."""
    return pixels.mean(axis=0) + 0.5 if centres == "mask" else (pixels.min(axis=0) + pixels.max(axis=0) + 1) / 2


def counted_again(truth, found, centres):
    """F of detection and of the five classes, written out: pairs of nearest centres, then what is left over."""
    hits, wrong, missed, spurious = (np.zeros(6) for _ in range(4))
    for true, predicted in zip(truth, found, strict=True):
        distance = np.zeros((len(true), len(predicted)))
        for i, (_, a) in enumerate(true):
            for j, (_, b) in enumerate(predicted):
                distance[i, j] = np.hypot(*(centre(a, centres) - centre(b, centres)))
        pairs = [pair for pair in zip(*linear_sum_assignment(distance), strict=True) if distance[pair] <= RADIUS]
        for i, j in pairs:
            hits[0] += 1
            if true[i][0] == predicted[j][0]:
                hits[1 + true[i][0]] += 1
            else:
                wrong[1 + true[i][0]] += 1
                wrong[1 + predicted[j][0]] += 1
        for i in set(range(len(true))) - {i for i, _ in pairs}:
            missed[[0, 1 + true[i][0]]] += 1
        for j in set(range(len(predicted))) - {j for _, j in pairs}:
            spurious[[0, 1 + predicted[j][0]]] += 1
    return 2 * hits / (2 * hits + 2 * wrong + missed + spurious)


def panoptic_again(archive, truth, found):
    """Binary panoptic quality, written out: 2 x (sum of the overlaps above one half) / (true + found) of an image.

    Its mean over the images with nuclei of each tissue, and over the tissues.
    """
    with zipfile.ZipFile(archive) as file, file.open("Fold 2/images/fold2/types.npy") as member:
        tissues = np.lib.format.read_array(member).tolist()
    values = {}
    for tissue, true, predicted in zip(tissues, truth, found, strict=True):
        a, b = disjoint(true), disjoint(predicted)
        overlaps = [len(one & other) / len(one | other) for one in a for other in b]
        if true:
            total = sum(value for value in overlaps if value > 0.5)
            values.setdefault(tissue, []).append(2 * total / (len(a) + len(b)))
    return np.mean([np.mean(of_tissue) for of_tissue in values.values()])


def disjoint(nuclei):
    """Return the sets of the pixels of nuclei; a pixel of several belongs to the smallest one."""
    owner = {}
    for number in sorted(range(len(nuclei)), key=lambda number: -len(nuclei[number][1])):
        owner |= dict.fromkeys(map(tuple, nuclei[number][1].tolist()), number)
    return [{pixel for pixel, of in owner.items() if of == number} for number in set(owner.values())]


@pytest.mark.parametrize("name", RECIPES)
def test_a_system_learns_and_its_scores_are_those_of_its_masks(folds, tmp_path, name):
    (_, store), (archive, test) = folds
    run = train_small(name, store, tmp_path / "run", **RECIPES[name])
    model, path = load_system(run, mpp=test.mpp, patch_size=SIZE), tmp_path / "trained.parquet"
    torch.manual_seed(0)
    untrained = scored(build_system(model.settings).eval(), test, tmp_path / "untrained.parquet")
    scores = {centres: scored(model, test, path, centres) for centres in ("box", "mask")}
    detection = scores["box"].loc["Detection"]
    assert untrained.loc["Detection", "f1"] < 0.25  # Mask R-CNN: every anchor is a nucleus
    assert detection["f1"] > 0.5
    assert detection["pq"] > 0.2

    truth, found = true_nuclei(archive), found_nuclei(path, test.n_patches)
    for centres, rows in scores.items():
        np.testing.assert_allclose(rows["f1"], counted_again(truth, found, centres), atol=1e-12)
    assert detection["pq"] == pytest.approx(panoptic_again(archive, truth, found), abs=1e-12)


@pytest.mark.parametrize("name", ["mask_rcnn", "micro_net", "cellvit_256"])
def test_a_run_that_is_interrupted_ends_with_the_same_weights(folds, tmp_path, monkeypatch, name):
    """Random are the proposals that train (Mask R-CNN), dropped maps, and dropped attention and paths."""
    store, how = folds[0][1], {"patches": 20, "epochs": 3}
    whole = read_checkpoint(train_small(name, store, tmp_path / "whole", **how))["state"]
    take_step = Training.take_step

    def interrupted(self, batch):
        take_step(self, batch)
        if self.step == 4:  # the first of the second epoch
            self.save_state()
            self.writer.check(wait=True)
            raise Interrupted("stop")

    monkeypatch.setattr(Training, "take_step", interrupted)
    with pytest.raises(Interrupted):
        train_small(name, store, tmp_path / "parts", **how)
    monkeypatch.setattr(Training, "take_step", take_step)
    again = read_checkpoint(train_small(name, store, tmp_path / "parts", **how))["state"]
    assert [key for key in whole if not torch.equal(again[key], whole[key])] == []


def test_two_processes_train_a_system(folds, tmp_path):
    store, losses = folds[0][1], {}
    for gpus in (1, 2):
        run = tmp_path / str(gpus)
        train_small("mask_rcnn", store, run, patches=20, epochs=2, gpus=gpus)
        assert json.loads((run / "provenance.json").read_text())["processes"] == gpus
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses[gpus] = [line["train"]["loss"] for line in lines]
    assert losses[2][1] < losses[2][0]
    assert losses[2] == pytest.approx(losses[1], rel=0.03)
