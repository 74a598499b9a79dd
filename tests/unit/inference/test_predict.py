"""Predicting a store: a planted model, and small models with random weights."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from small_model import small_model, small_settings
from torch import nn

import predict
import score
from celldetr.config.evaluation import ScoringSettings
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.inference.attention import share_inside
from celldetr.inference.predict import attend_patches, predict_fold
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import CellDETR, Detections, Seen
from celldetr.model.weights import save_model
from celldetr.runtime.errors import InputError
from celldetr.runtime.provenance import sha256
from celldetr.store import StoreWriter

FAR = ScoringSettings(radius_um=7.5)
LIMITS = {"nucleus_threshold": 0.4, "batch_size": 4}


class Planted(nn.Module):
    """Finds every nucleus of a store; the first box of each patch reaches over the edge.

    `scores_of` turns true labels (n,) into class scores (n, K).
    """

    def __init__(self, store, classes=None, scores_of=None):
        super().__init__()
        classes = store.classes if classes is None else classes
        self.settings = SimpleNamespace(classes=classes, mode="sequential", d_model=0)
        self.store, self.seen, self.baseline = store, [], False
        self.scores_of = scores_of or (lambda labels: 0.1 + 0.8 * torch.eye(len(store.classes))[labels])

    def forward(self, images):
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        self.seen.append(len(images))
        slots = 7 * int(np.diff(self.store.box_ptr).max())
        logits, scores = torch.full((len(images), slots, 1), -9.0), torch.zeros(len(images), slots, 3)
        boxes = torch.zeros(len(images), slots, 4)
        for row, image in enumerate(images):
            own, labels = self._found(int(round(float(image[0, 0, 0]) * 255)))
            at = 7 * torch.arange(len(own))
            logits[row, at], scores[row, at] = 9.0, self.scores_of(labels)
            boxes[row, at] = xyxy_to_cxcywh(own) / self.store.patch_size
        return Seen(None, Detections(logits[None], boxes[None]), scores[..., :0], scores.logit())

    def _found(self, index):
        patch = self.store.read(index)
        boxes = torch.from_numpy(patch.boxes.copy())
        if len(boxes):
            boxes[0, :2], boxes[0, 2:] = -7.5, 2 * boxes[0, 2:]
        return boxes, torch.from_numpy(patch.labels).long()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_predictions_are_in_order_and_clipped(store, tmp_path, batch_size):
    model, path, counts = Planted(store), tmp_path / "a.parquet", np.diff(store.box_ptr)
    options = {"nucleus_threshold": 0.4, "batch_size": batch_size, "metadata": {"experiment": "planted"}}
    assert predict_fold(model, store, path, **options) == len(store.labels)
    assert sum(model.seen) == store.n_patches
    assert max(model.seen) == min(batch_size, store.n_patches)
    found = read_predictions(path)
    assert found.n_patches == store.n_patches
    assert found.metadata["experiment"] == "planted"
    assert np.array_equal(np.diff(found.ptr), counts)
    assert np.array_equal(found.labels, store.labels)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= store.patch_size
    inner = np.setdiff1d(np.arange(len(found)), found.ptr[:-1])
    np.testing.assert_allclose(found.boxes[inner], store.boxes[inner], atol=1e-4)
    assert (found.boxes[found.ptr[:-1][counts > 0], :2] == 0).all()

    frame = score_fold(found, store, FAR, resamples=5)
    assert (frame.loc[frame["metric"] == "strict", "f1"].dropna() == 1).all()


def test_only_predictions_of_this_model_split_and_store_are_scored(store, tmp_path):
    model, other = tmp_path / "model.pt", tmp_path / "other.pt"
    model.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    origin = {"experiment": "planted", "split": 1, "model_sha256": sha256(model), "trained_on": []}
    predict_fold(Planted(store), store, tmp_path / "a.parquet", metadata=origin, **LIMITS)

    def run(model_file=model, store_path=store.path, experiment="planted", split="1"):
        inputs = SimpleNamespace(predictions=tmp_path / "a.parquet", store=store_path, model=model_file)
        params = {"scoring": FAR.to_dict(), "centres": "box", "resamples": 0, "seed": 0}
        wildcards = SimpleNamespace(experiment=experiment, split=split)
        output = SimpleNamespace(scores=tmp_path / "scores.tsv", panoptic=tmp_path / "panoptic.tsv")
        score.main(SimpleNamespace(input=inputs, params=SimpleNamespace(**params), wildcards=wildcards, output=output))

    run()
    assert set(pd.read_csv(tmp_path / "scores.tsv", sep="\t")["test_store"]) == {"fold1"}
    assert len(pd.read_csv(tmp_path / "panoptic.tsv", sep="\t")) == 0  # boxes have no masks
    with pytest.raises(InputError, match=r"a.parquet: got predictions of .*'split': 1.*, expected .*'split': 2"):
        run(split="2")
    with pytest.raises(InputError, match="'experiment': 'planted'.* expected .*'experiment': 'celldetr_s'"):
        run(experiment="celldetr_s")
    with pytest.raises(InputError, match="'model_sha256': .*; predict this split again"):
        run(model_file=other)
    origin["trained_on"] = sorted(set(store.patches["group"]))
    predict_fold(Planted(store), store, tmp_path / "a.parquet", metadata=origin, **LIMITS)
    with pytest.raises(InputError, match=r"the model of .*a.parquet: it, or a model .* was trained or validated on"):
        run()
    origin["trained_on"] = []
    predict_fold(Planted(store), store, tmp_path / "a.parquet", metadata=origin, **LIMITS)
    twin = StoreWriter(tmp_path / "fold1.zarr", patch_size=store.patch_size, classes=store.classes, mpp=store.mpp)
    with twin as writer:
        boxes, labels = zip(*(store.boxes_of(index) for index in range(store.n_patches)), strict=True)
        images = 255 - store.images(np.arange(store.n_patches))
        columns = {name: store.patches[name].to_numpy() for name in store.patches}
        writer.append(images, boxes, labels, centroids=None, patches=columns)
    with pytest.raises(InputError, match="got those of store fold1 with digest .*, expected .*fold1.zarr with"):
        run(store_path=tmp_path / "fold1.zarr")


def test_a_model_predicts_nothing_that_it_has_seen(store, tmp_path):
    settings = small_settings("parallel", classes=store.classes)
    wildcards, groups = SimpleNamespace(experiment="mine", split="1"), sorted(set(store.patches["group"]))

    def run(named, declared):
        save_model(tmp_path / "m.pt", CellDETR(settings), settings, {} if named is None else {"trained_on": named})
        inputs = SimpleNamespace(model=tmp_path / "m.pt", store=store.path)
        own = {"precision": "fp32", "compile": "auto", "embeddings": False, "class_map": None, "trained_on": declared}
        params = SimpleNamespace(**LIMITS, **own)
        output = [tmp_path / "p.parquet"]
        predict.main(SimpleNamespace(input=inputs, params=params, wildcards=wildcards, output=output, threads=1))
        return read_predictions(output[0]).metadata["trained_on"]

    assert run(["fold9"], ["other"]) == ["fold9", "other"]
    assert run(None, []) == []
    for named, declared in ((groups, None), (groups, []), (None, groups)):
        with pytest.raises(InputError, match=r"m\.pt: it, or a model that it started from, was trained or"):
            run(named, declared)
    with pytest.raises(InputError, match=r"m\.pt: does not say .* list it in experiments\.mine\.trained_on"):
        run(None, None)


MAP = {"T": "inflammatory", "B": "inflammatory", "Malignant": "neoplastic"}


def test_scores_of_other_classes_are_mapped_and_classes_without_a_source_are_not_punished(store, tmp_path):
    def scores_of(labels):
        """Score T, Malignant and B: lymphocytes are T or B in turn, neoplastic and connective nuclei Malignant."""
        scores = torch.full((len(labels), 3), 0.05)
        scores[labels != 1, 1] = 0.7
        scores[labels == 1, torch.arange(int((labels == 1).sum())) % 2 * 2] = 0.8
        return scores

    model = Planted(store, ("T", "Malignant", "B"), scores_of)
    predict_fold(model, store, tmp_path / "a.parquet", class_map=MAP, **LIMITS)
    found = read_predictions(tmp_path / "a.parquet")
    assert found.classes == store.classes
    assert found.metadata["absent"] == ["connective"]
    assert np.array_equal(found.labels, np.where(store.labels == 2, 0, store.labels))
    assert found.class_scores[:, 2].max() == 0
    assert np.allclose(found.class_scores[store.labels == 1, 1], 0.8)
    frame = score_fold(found, store, FAR, resamples=5)
    strict = frame[frame["metric"] == "strict"].set_index("class")
    assert strict.loc["Detection", "f1"] == strict.loc["Neoplastic", "f1"] == 1
    assert strict.loc["Connective", "absent"]
    assert np.isnan(strict.loc["Connective", "f1"])
    assert strict.loc["Neoplastic", "n_ignored"] == (store.labels == 2).sum()


def test_classes_must_fit_and_a_failure_leaves_no_file(store, tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(InputError, match=r"classes \['NK'\] that map to none of"):
        predict_fold(Planted(store, ("T", "NK", "B")), store, path, class_map=MAP, **LIMITS)
    with pytest.raises(InputError, match="the model has classes .*, the store .*fold1.zarr"):
        predict_fold(Planted(store, store.classes[::-1]), store, path, **LIMITS)
    assert list(tmp_path.iterdir()) == []
    predict_fold(Planted(store), store, path, class_map=MAP, **LIMITS)
    assert "absent" not in read_predictions(path).metadata


def test_a_model_that_finds_nothing_is_legal_and_logged(store, tmp_path, caplog):
    class Blind(Planted):
        def _found(self, index):
            return [values[:0] for values in super()._found(index)]

    assert predict_fold(Blind(store), store, tmp_path / "a.parquet", **LIMITS) == 0
    assert "no detection in 7 patches reached a nucleus score of 0.4" in caplog.text
    assert len(read_predictions(tmp_path / "a.parquet")) == 0


def test_random_weights_predict_the_same_in_every_batch_size_and_nearly_in_bf16(store, tmp_path):
    model, found = small_model("sequential", classes=store.classes), []
    for batch_size, precision in ((2, "fp32"), (7, "fp32"), (7, "bf16")):
        options = {"nucleus_threshold": 0.0, "batch_size": batch_size, "precision": precision}
        assert predict_fold(model, store, tmp_path / "a.parquet", **options) == 10 * store.n_patches
        found.append(read_predictions(tmp_path / "a.parquet"))
    assert np.array_equal(found[0].query, found[1].query)
    np.testing.assert_allclose(found[0].boxes, found[1].boxes, atol=1e-3)
    np.testing.assert_allclose(found[0].class_scores, found[1].class_scores, atol=1e-5)
    assert 0 < np.abs(found[1].boxes - found[2].boxes).mean() < 1


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel"])
def test_embeddings_are_those_that_the_classes_are_read_from(store, tmp_path, caplog, mode):
    model, path = small_model(mode, classes=store.classes), tmp_path / "a.parquet"
    predict_fold(model, store, path, nucleus_threshold=0.0, batch_size=3, embeddings=True)
    table = pq.read_table(path)
    if mode == "baseline":
        assert "embedding" not in table.column_names
        assert "a model of mode baseline has no embeddings" in caplog.text
        return
    own = np.stack(table.column("embedding").to_numpy())
    assert own.shape == (10 * store.n_patches, model.settings.d_model)
    with torch.no_grad():
        scores = model.classify(torch.from_numpy(own)).sigmoid().numpy()
    stored = np.stack([table.column(f"score_{name}").to_numpy() for name in store.classes], axis=1)
    np.testing.assert_allclose(stored, scores, atol=1e-5)
    assert np.ptp(stored, axis=0).min() > 1e-4  # rows differ, so that others would be noticed


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel"])
def test_attention_is_that_of_each_detection_and_constrained_to_its_box(store, mode):
    model = small_model(mode, classes=store.classes)
    patches = list(attend_patches(model, store, nucleus_threshold=0.0, batch_size=4))
    assert len(patches) == store.n_patches
    for patch in patches:
        assert patch.points.shape == (10, 4 * 2 * 2, 2)
        np.testing.assert_allclose(patch.weights.sum(axis=1), 1, rtol=1e-5)
        inside = share_inside(patch.points, patch.weights, patch.boxes)
        assert np.allclose(inside, 1) == (mode != "baseline")
    for patch in attend_patches(model, store, nucleus_threshold=1.0, batch_size=4):
        assert len(patch.boxes) == len(patch.points) == len(patch.weights) == 0
