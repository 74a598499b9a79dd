"""Predicting a store and measuring attention: planted models, and a small CellDETR with random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from celldetr.config.experiment import BackboneSettings, ModelSettings, RepresentationSettings
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.inference.attention import choose_nuclei, measure_attention, share_inside
from celldetr.inference.predict import attend_patches, predict_fold
from celldetr.model.celldetr import CellDETR, ImagePredictions
from celldetr.model.deformable_attention import SamplingPoints
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.store import StoreWriter, open_store

CLASSES = ("neoplastic", "inflammatory", "connective")
SIZE = 64
COUNTS = (3, 0, 2, 5, 1, 4, 2)


def boxes_of(index):
    rng = np.random.default_rng(index)
    low = np.stack([np.arange(COUNTS[index]) * 12.0 + 1, rng.uniform(0, 40, COUNTS[index])], axis=1)
    return np.concatenate([low, low + rng.uniform(6, 10, low.shape)], axis=1).astype(np.float32)


def labels_of(index):
    return np.random.default_rng(100 + index).integers(0, len(CLASSES), COUNTS[index]).astype(np.int8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store whose patches carry their index in the first pixel."""
    path = tmp_path_factory.mktemp("store") / "fold1.zarr"
    count = len(COUNTS)
    images = np.random.default_rng(0).integers(0, 255, (count, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    with StoreWriter(path, patch_size=SIZE, classes=CLASSES, mpp=0.25) as writer:
        writer.append(
            images,
            [boxes_of(k) for k in range(count)],
            [labels_of(k) for k in range(count)],
            patches={
                "x": np.arange(count),
                "y": np.zeros(count, dtype=np.int64),
                "source": ["fold1"] * count,
                "group": [str(k) for k in range(count)],
                "tissue": ["Colon"] * count,
            },
        )
    return open_store(path)


class Planted(nn.Module):
    """Finds every nucleus of the patches of `store`, with one box that reaches over the edge."""

    def __init__(self, classes=CLASSES, shift=0.0, spread=0.0):
        super().__init__()
        self.settings = SimpleNamespace(classes=classes)
        self.shift, self.spread, self.seen = shift, spread, []

    def predict(self, images, nucleus_threshold):
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        self.seen.append(len(images))
        return [self._found(int(round(float(image[0, 0, 0]) * 255)), nucleus_threshold) for image in images]

    def _found(self, index, nucleus_threshold):
        boxes = torch.from_numpy(boxes_of(index)) + self.shift
        if len(boxes):
            boxes[0, :2] = -7.5
            boxes[0, 2:] = torch.maximum(boxes[0, 2:], 2 * torch.from_numpy(boxes_of(index))[0, 2:])
        scores = torch.full((len(boxes), len(CLASSES)), 0.1)
        scores[torch.arange(len(boxes)), torch.from_numpy(labels_of(index)).long()] = 0.9
        return ImagePredictions(
            query=torch.arange(len(boxes)) * 7,
            boxes=boxes,
            nucleus_score=torch.full((len(boxes),), nucleus_threshold),
            class_scores=scores,
            embeddings=None,
        )

    def attention(self, images, nucleus_threshold):
        """Two heads, one level, two points: one at the centre of the true box, one `spread` box widths to the right."""
        results = []
        for image in images:
            index = int(round(float(image[0, 0, 0]) * 255))
            found = self._found(index, nucleus_threshold)
            found.boxes[:] = torch.from_numpy(boxes_of(index)) + self.shift
            true = torch.from_numpy(boxes_of(index))
            centre, width = (true[:, :2] + true[:, 2:]) / 2, true[:, 2] - true[:, 0]
            points = centre[:, None, None, None].repeat(1, 2, 1, 2, 1)
            points[..., 1, 0] += self.spread * width[:, None, None]
            weights = torch.tensor([0.75, 0.25]).expand(len(true), 2, 1, 2)
            results.append((found, SamplingPoints(points / SIZE, weights)))
        return results


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_predictions_are_in_order_and_clipped(store, tmp_path, batch_size):
    model, path = Planted(), tmp_path / "a.parquet"
    options = {"nucleus_threshold": 0.4, "batch_size": batch_size, "metadata": {"experiment": "planted"}}
    assert predict_fold(model, store, path, **options) == sum(COUNTS)
    assert sum(model.seen) == len(COUNTS)
    assert max(model.seen) == min(batch_size, len(COUNTS))
    found = read_predictions(path)
    assert found.n_patches == len(COUNTS)
    assert found.metadata["experiment"] == "planted"
    assert np.array_equal(np.diff(found.ptr), COUNTS)
    assert np.array_equal(found.labels, store.labels)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= SIZE
    inner = np.setdiff1d(np.arange(len(found)), found.ptr[:-1])
    assert np.array_equal(found.boxes[inner], store.boxes[inner])
    assert (found.boxes[found.ptr[:-1][np.array(COUNTS) > 0], :2] == 0).all()


def test_planted_truth_scores_one(store, tmp_path):
    predict_fold(Planted(), store, tmp_path / "a.parquet", nucleus_threshold=0.4, batch_size=4)
    frame = score_fold(read_predictions(tmp_path / "a.parquet"), store, radius=30, resamples=5)
    assert (frame.loc[frame["metric"] == "strict", "f1"].dropna() == 1).all()


TYPES = ("T", "Malignant", "B")
MAP = {"T": "inflammatory", "B": "inflammatory", "Malignant": "neoplastic"}


def test_scores_of_other_classes_are_mapped_and_classes_without_a_source_are_not_punished(store, tmp_path):
    class Zero(Planted):
        """Sees lymphocytes as T or B, gives connective nuclei to Malignant."""

        def _found(self, index, nucleus_threshold):
            found = super()._found(index, nucleus_threshold)
            labels = torch.from_numpy(labels_of(index)).long()
            scores = torch.full((len(labels), 3), 0.05)
            scores[labels == 0, 1] = 0.7
            scores[labels == 1, torch.arange(int((labels == 1).sum())) % 2 * 2] = 0.8
            scores[labels == 2, 1] = 0.6
            return found._replace(class_scores=scores)

    predict_fold(Zero(TYPES), store, tmp_path / "a.parquet", nucleus_threshold=0.4, batch_size=4, class_map=MAP)
    found = read_predictions(tmp_path / "a.parquet")
    assert found.classes == CLASSES
    assert found.metadata["absent"] == ["connective"]
    assert np.array_equal(found.labels, np.where(store.labels == 2, 0, store.labels))
    assert found.class_scores[:, 2].max() == 0
    assert np.allclose(found.class_scores[store.labels == 1, 1], 0.8)
    frame = score_fold(found, store, radius=30, resamples=5)
    strict = frame[frame["metric"] == "strict"].set_index("class")
    assert strict.loc["Detection", "f1"] == 1
    assert strict.loc["Connective", "absent"]
    assert np.isnan(strict.loc["Connective", "f1"])
    assert strict.loc["Neoplastic", "f1"] == 1
    assert strict.loc["Neoplastic", "n_ignored"] == (store.labels == 2).sum()


def test_a_map_must_fit_the_model_and_own_classes_need_none(store, tmp_path):
    options = {"nucleus_threshold": 0.4, "batch_size": 4, "class_map": MAP}
    with pytest.raises(InputError, match=r"classes \['NK'\] that map to none of"):
        predict_fold(Planted(("T", "NK", "B")), store, tmp_path / "a.parquet", **options)
    predict_fold(Planted(), store, tmp_path / "a.parquet", **options)
    assert "absent" not in read_predictions(tmp_path / "a.parquet").metadata


def test_a_model_that_finds_nothing_is_said_and_legal(store, tmp_path, caplog):
    class Blind(Planted):
        def _found(self, index, nucleus_threshold):
            found = super()._found(index, nucleus_threshold)
            return ImagePredictions(*(None if v is None else v[:0] for v in found))

    assert predict_fold(Blind(), store, tmp_path / "a.parquet", nucleus_threshold=0.4, batch_size=4) == 0
    assert "no detection in 7 patches reached a nucleus score of 0.4" in caplog.text
    assert len(read_predictions(tmp_path / "a.parquet")) == 0


def test_other_classes_and_precisions_are_refused_and_leave_nothing(store, tmp_path):
    options = {"nucleus_threshold": 0.4, "batch_size": 4}
    with pytest.raises(InputError, match="the model has classes .*, the store .*fold1.zarr"):
        predict_fold(Planted(CLASSES[::-1]), store, tmp_path / "a.parquet", **options)
    with pytest.raises(ConfigError, match="precision: got 'fp8'"):
        predict_fold(Planted(), store, tmp_path / "a.parquet", precision="fp8", **options)
    assert list(tmp_path.iterdir()) == []


def attention_of(model, store, *, count=3, radius=12.0, batch_size=3):
    chosen = choose_nuclei(store, SIZE, count, 0)
    patches = attend_patches(model, store, nucleus_threshold=0.4, batch_size=batch_size)
    return chosen, *measure_attention(patches, store, nuclei=chosen, radius=radius)


def test_shares_are_those_that_were_planted(store):
    chosen, drawn, share = attention_of(Planted(spread=3.0), store)
    assert share["share_true_box"] == pytest.approx(0.75)
    assert share["share_predicted_box"] == pytest.approx(0.75)
    assert share["nuclei"] == share["n_truth"] == share["n_detections"] == sum(COUNTS)
    assert sum(item["nuclei"] for item in share["classes"].values()) == sum(COUNTS)
    assert drawn.found.all()
    assert np.array_equal(drawn.nucleus, chosen)
    assert drawn.points.shape == (3, 4, 2)
    np.testing.assert_allclose(drawn.weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(share_inside(drawn.points, drawn.weights, drawn.true_box), 0.75, rtol=1e-6)
    centre = (drawn.true_box[:, :2] + drawn.true_box[:, 2:]) / 2
    np.testing.assert_allclose(drawn.points[:, 0], centre, rtol=1e-5)
    assert np.array_equal(drawn.image[:, 0, 0, 0], drawn.patch)
    assert attention_of(Planted(spread=0.2), store)[2]["share_true_box"] == pytest.approx(1)


def test_the_true_box_and_the_predicted_box_are_told_apart(store):
    share = attention_of(Planted(shift=7.0), store)[2]
    assert share["share_true_box"] == pytest.approx(1)
    assert share["share_predicted_box"] < 0.2


def test_nuclei_without_a_detection_near_them_are_missed(store):
    _, drawn, share = attention_of(Planted(shift=300.0), store)
    assert not drawn.found.any()
    assert np.isnan(drawn.box).all()
    assert (share["nuclei"], share["share_true_box"]) == (0, None)
    assert share["n_detections"] == sum(COUNTS)


def test_attention_does_not_depend_on_the_batch_size(store):
    one, many = (attention_of(Planted(spread=1.3), store, batch_size=size) for size in (1, 7))
    assert one[2] == many[2]
    assert np.array_equal(one[1].points, many[1].points)


# ---- a small model


def small_model(mode):
    torch.manual_seed(0)
    settings = ModelSettings(
        mode=mode,
        classes=CLASSES,
        d_model=32,
        heads=4,
        points=2,
        ffn=32,
        encoder_layers=1,
        decoder_layers=2,
        queries=12,
        backbone=BackboneSettings(block="basic", layers=(1, 1, 1, 1), width=8, stages=(2, 3), norm="group"),
        representation=RepresentationSettings(layers=2, offset_init="spread"),
    )
    model = CellDETR(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # heads that start at zero would make all boxes independent of the image
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel"])
def test_a_model_with_random_weights_predicts_the_same_in_every_batch_size(store, tmp_path, mode):
    model = small_model(mode)
    found = []
    for batch_size in (2, 7):
        path = tmp_path / f"{batch_size}.parquet"
        assert predict_fold(model, store, path, nucleus_threshold=0.0, batch_size=batch_size) == 12 * len(COUNTS)
        found.append(read_predictions(path))
    assert np.array_equal(found[0].query, found[1].query)
    np.testing.assert_allclose(found[0].boxes, found[1].boxes, atol=1e-3)
    np.testing.assert_allclose(found[0].class_scores, found[1].class_scores, atol=1e-5)


def test_bf16_is_close_to_fp32(store, tmp_path):
    model = small_model("sequential")
    boxes = []
    for precision in ("fp32", "bf16"):
        path = tmp_path / f"{precision}.parquet"
        predict_fold(model, store, path, nucleus_threshold=0.0, batch_size=7, precision=precision)
        boxes.append(read_predictions(path).boxes)
    assert not np.array_equal(*boxes)
    assert np.abs(boxes[0] - boxes[1]).mean() < 1


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_constrained_attention_stays_in_the_predicted_box(store, mode):
    patches = attend_patches(small_model(mode), store, nucleus_threshold=0.0, batch_size=4)
    drawn, share = measure_attention(patches, store, nuclei=np.arange(3), radius=100.0)
    assert share["share_predicted_box"] == pytest.approx(1)
    assert drawn.found.all()
    assert drawn.points.shape == (3, 4 * 2 * 2, 2)
    np.testing.assert_allclose(share_inside(drawn.points, drawn.weights, drawn.box), 1)


def test_attention_of_the_baseline_is_that_of_its_detections(store):
    patches = attend_patches(small_model("baseline"), store, nucleus_threshold=0.0, batch_size=4)
    drawn, share = measure_attention(patches, store, nuclei=np.arange(3), radius=100.0)
    assert share["n_detections"] == 12 * len(COUNTS)
    assert 0 <= share["share_true_box"] <= 1
    np.testing.assert_allclose(drawn.weights.sum(axis=1), 1, rtol=1e-5)
