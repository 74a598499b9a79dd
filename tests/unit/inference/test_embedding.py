"""Embeddings of true boxes: in the order of the store, and of nothing but the patch of the nucleus."""

import numpy as np
import pytest
import torch
from small_model import small_model

from celldetr.inference.embedding import embed_boxes, embed_patches
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.runtime.errors import InputError
from celldetr.training.contrastive import Views

MODELS = {
    "sequential": {"mode": "sequential"},
    "parallel": {"mode": "parallel"},
    "tokens": {"mode": "parallel", "tokens": 3},
    "contrastive": {"mode": "parallel", "projection": 8, "tokens": 1, "classes": ()},
}


def embed(model, store, **options):
    """Embeddings (M, 32) of all nuclei of the chosen patches."""
    found = embed_patches(model, store, **{"batch_size": 4, "device": "cpu"} | options)
    return np.concatenate([embeddings for _, embeddings in found])


def alone(model, store, index):
    """Embeddings of one patch by the model itself."""
    patch = store.read(index)
    image = torch.from_numpy(patch.image).permute(2, 0, 1)[None].float() / 255
    boxes = xyxy_to_cxcywh(torch.from_numpy(patch.boxes))[None] / store.patch_size
    with torch.no_grad():
        features = model.encode(image)
        if not model.settings.projection:
            return model.represent(features, boxes)[0].numpy()
        n = boxes.shape[1]
        slots = torch.arange(n)[None]
        views = Views(boxes, slots, slots >= 0, slots < 0, torch.tensor([n]))
        mask = views.mask(model.representation.global_tokens)
        return model.represent(features, boxes, views.valid, mask=mask, positions=False)[0].numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_are_those_of_each_patch_alone(store, kind):
    model, counts = small_model(**MODELS[kind]), np.diff(store.box_ptr)
    expected = np.concatenate([alone(model, store, index) for index in np.flatnonzero(counts)])
    for batch_size in (1, 3, 100):
        found = embed(model, store, batch_size=batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.unique(expected.round(3), axis=0).shape == (len(store.labels), 32)  # nuclei differ
    order = [5, 1, 2, 0]
    rows = np.concatenate([np.arange(store.box_ptr[k], store.box_ptr[k + 1]) for k in order])
    np.testing.assert_allclose(embed(model, store, batch_size=3, patches=order), expected[rows], atol=2e-5)


def test_patches_are_yielded_with_their_index_also_without_nuclei(store):
    found = list(embed_patches(small_model("parallel"), store, batch_size=2, device="cpu"))
    assert [patch for patch, _ in found] == list(range(store.n_patches))
    assert [embeddings.shape for _, embeddings in found] == [(count, 32) for count in np.diff(store.box_ptr)]
    assert list(embed_patches(small_model("parallel"), store, batch_size=2, device="cpu", patches=[])) == []
    none = np.empty((0, 4), np.float32)
    without = embed_boxes(small_model("parallel"), store.images([1, 4]), [none, none], device="cpu")
    assert [embeddings.shape for embeddings in without] == [(0, 32), (0, 32)]


def test_dropout_is_off_and_the_mode_of_the_model_is_kept(store):
    model = small_model("parallel", dropout=0.5).train()
    first, second = (embed(model, store) for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training


def test_models_without_embeddings_or_with_broken_ones_are_refused(store):
    with pytest.raises(InputError, match="baseline"):
        embed(small_model("baseline"), store)
    model = small_model("parallel")
    with torch.no_grad():
        model.level_embed.fill_(float("nan"))
    with pytest.raises(InputError, match="patches 0 to 3: .*not finite"):
        embed(model, store)
