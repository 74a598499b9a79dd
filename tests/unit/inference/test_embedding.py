"""Embeddings of true boxes: in the order of the store, and of nothing but the nucleus' own patch."""

import numpy as np
import pytest
import torch

from celldetr.config.experiment import ModelSettings
from celldetr.inference.embedding import embed_boxes, embed_patches
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import CellDETR
from celldetr.runtime.errors import InputError
from celldetr.store import StoreWriter, open_store
from celldetr.training.contrastive import Views

SIZE = 32
COUNTS = (2, 0, 5, 1, 0, 3, 7)


def make_model(mode="parallel", *, projection=0, tokens=0, classes=("a", "b"), dropout=0.0, seed=0):
    torch.manual_seed(seed)
    settings = {
        "mode": mode,
        "classes": list(classes),
        "projection": projection,
        "d_model": 16,
        "heads": 2,
        "points": 2,
        "ffn": 16,
        "dropout": dropout,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "queries": 4,
        "backbone": {"block": "basic", "layers": [1, 1, 1, 1], "width": 8, "stages": [1, 2], "norm": "group"},
        "representation": {"layers": 2, "offset_init": "spread", "global_tokens": tokens},
    }
    model = CellDETR(ModelSettings.from_dict(settings))
    with torch.no_grad():
        for parameter in model.representation.parameters() if mode != "baseline" else ():
            parameter.add_(0.1 * torch.randn_like(parameter))  # zero weights would hide what an embedding depends on
    return model.eval()


MODELS = {
    "sequential": {"mode": "sequential"},
    "parallel": {},
    "tokens": {"tokens": 3},
    "contrastive": {"projection": 8, "tokens": 1, "classes": ()},
}


def write_store(path, counts=COUNTS):
    drawn = []
    for index, count in enumerate(counts):
        rng = np.random.default_rng(index)
        low = rng.uniform(0, 20, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(3, 12, (count, 2))], axis=1).astype(np.float32)
        drawn.append((rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8), boxes))
    columns = {name: ["s"] * len(drawn) for name in ("source", "group", "tissue")}
    columns |= {name: np.arange(len(drawn)) for name in ("x", "y")}
    with StoreWriter(path, patch_size=SIZE, classes=("x",), mpp=0.5) as writer:
        labels = [np.full(len(boxes), -1, np.int8) for _, boxes in drawn]
        writer.append(np.stack([image for image, _ in drawn]), [boxes for _, boxes in drawn], labels, patches=columns)
    return open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "a.zarr")


def embed(model, store, **options):
    """Embeddings (M, 16) of all nuclei of the chosen patches."""
    found = embed_patches(model, store, **{"batch_size": 4, "device": "cpu"} | options)
    return np.concatenate([one.embeddings for one in found])


def alone(model, store, index):
    """Embeddings of one patch by the model itself."""
    patch = store.read(index)
    image = torch.from_numpy(patch.image).permute(2, 0, 1)[None].float() / 255
    boxes = xyxy_to_cxcywh(torch.from_numpy(patch.boxes))[None] / SIZE
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
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_embeddings_are_those_of_each_patch_alone(store, kind, batch_size):
    model = make_model(**MODELS[kind])
    found = embed(model, store, batch_size=batch_size)
    assert found.dtype == np.float32
    assert found.shape == (sum(COUNTS), 16)
    expected = np.concatenate([alone(model, store, index) for index in range(len(COUNTS)) if COUNTS[index]])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.unique(found.round(4), axis=0).shape == found.shape  # nuclei differ


@pytest.mark.parametrize("kind", MODELS)
def test_order_of_patches_is_that_asked_for(store, kind):
    model = make_model(**MODELS[kind])
    whole = embed(model, store)
    order = [5, 1, 2, 0]
    found = embed(model, store, batch_size=3, patches=order)
    rows = np.concatenate([np.arange(store.box_ptr[k], store.box_ptr[k + 1]) for k in order])
    np.testing.assert_allclose(found, whole[rows], atol=2e-5)


def test_patches_are_yielded_with_their_index_also_without_nuclei(store):
    found = list(embed_patches(make_model(), store, batch_size=2, device="cpu"))
    assert [one.patch for one in found] == list(range(len(COUNTS)))
    assert [one.embeddings.shape for one in found] == [(count, 16) for count in COUNTS]


def test_images_without_nuclei_need_no_other_image(store):
    none = np.empty((0, 4), np.float32)
    assert [x.shape for x in embed_boxes(make_model(), store.images([1, 4]), [none, none], device="cpu")] == [
        (0, 16)
    ] * 2
    assert list(embed_patches(make_model(), store, batch_size=2, device="cpu", patches=[])) == []


def test_labels_have_no_influence(store, tmp_path):
    labelled = tmp_path / "b.zarr"
    columns = {name: ["s"] for name in ("source", "group", "tissue")} | {"x": np.zeros(1, int), "y": np.zeros(1, int)}
    patch = store.read(2)
    with StoreWriter(labelled, patch_size=SIZE, classes=("p", "q"), mpp=0.5) as writer:
        writer.append(patch.image[None], [patch.boxes], [np.array([0, 1, 0, 1, -1], np.int8)], patches=columns)
    model = make_model()
    assert np.array_equal(embed(model, open_store(labelled)), embed(model, store, patches=[2]))


def test_dropout_is_off_and_the_mode_of_the_model_kept(store):
    model = make_model(dropout=0.5).train()
    first, second = (embed(model, store) for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training


def test_models_without_embeddings_are_refused(store):
    with pytest.raises(InputError, match="baseline"):
        embed(make_model("baseline"), store)


def test_embeddings_that_are_not_finite_are_refused(store):
    model = make_model()
    with torch.no_grad():
        model.level_embed.fill_(float("nan"))
    with pytest.raises(InputError, match="patches 0 to 3: .*not finite"):
        embed(model, store)
