"""A batch of images through a model: what it predicts, in one transfer, with given boxes or without."""

import numpy as np
import pytest
import torch
from small_model import read_batch, small_model

from celldetr.model.celldetr import float_images

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
GIVEN = [np.array([[4, 4, 20, 18], [30, 30, 44, 52]], np.float32), np.empty((0, 4), np.float32)]
GIVEN += [np.array([[10, 8, 31, 25]], np.float32)]


@pytest.fixture
def transfers(monkeypatch):
    """Tensors of more than a few numbers that were copied from the device."""
    seen, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: seen.append(tensor.shape) or copy(tensor))
    return seen


@pytest.mark.parametrize("mode", ["baseline", "sequential", "parallel"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_it_finds_what_the_model_predicts(mode, threshold, transfers):
    model = small_model(mode)
    expected = model.predict(float_images(torch.from_numpy(IMAGES)), threshold)
    found, given = read_batch(model, IMAGES, nucleus_threshold=threshold)
    assert len(transfers) == (2 if mode == "parallel" and len(found.query) else 1)
    counts = [len(image.query) for image in expected]
    assert found.image.tolist() == np.repeat(np.arange(3), counts).tolist()
    for name in ("query", "boxes", "nucleus_score", "class_scores"):
        values = torch.cat([getattr(image, name) for image in expected]).numpy()
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5, err_msg=name)
    assert found.embeddings.shape == (sum(counts), 0 if mode == "baseline" else 32)
    assert len(given.embeddings) == 0
    boxes, _ = read_batch(model, IMAGES, nucleus_threshold=threshold, embeds="none")
    for name in ("image", "query", "boxes", "nucleus_score"):
        np.testing.assert_allclose(getattr(boxes, name), getattr(found, name), rtol=1e-5, err_msg=name)
    assert boxes.class_scores.shape == boxes.embeddings.shape == (sum(counts), 0)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_given_boxes_are_embedded_beside_detection_as_alone(mode, transfers):
    model = small_model(mode)
    found, given = read_batch(model, IMAGES, nucleus_threshold=0.0, given=GIVEN)
    assert len(transfers) == 1
    assert len(found.query) == 30
    alone = read_batch(model, IMAGES, GIVEN)[1].embeddings
    np.testing.assert_allclose(given.embeddings, alone, atol=1e-5)
    scores = model.classify(torch.from_numpy(alone)).sigmoid().detach().numpy()
    np.testing.assert_allclose(given.class_scores, scores, atol=1e-5)
