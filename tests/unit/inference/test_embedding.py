"""Embeddings of true boxes: in the order of the store, and of nothing but the patch of the nucleus."""

import numpy as np
import pytest
import torch
from small_model import read_batch, small_model
from tiny_training import make_experiment, make_split, make_ssl_experiment

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import NoiseSettings
from celldetr.inference.embedding import embed_patches
from celldetr.inference.similarity import measure_similarity
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.weights import load_model, save_model
from celldetr.runtime.errors import InputError
from celldetr.training.data import PatchData, TrainingBatches
from celldetr.training.initial import build_model
from celldetr.training.ssl import SslStage
from celldetr.training.supervised import SupervisedStage

MODELS = {
    "sequential": {"mode": "sequential"},
    "parallel": {"mode": "parallel"},
    "tokens": {"mode": "parallel", "tokens": 3},
    "contrastive": {"mode": "parallel", "projection": 8, "tokens": 1, "positions": False, "classes": ()},
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
        return model.represent(model.encode(image), boxes)[0].numpy()


def entering(head):
    """List the embeddings (B, S, C) that enter a head of a model from now on."""
    seen = []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen


def test_pretraining_probe_frozen_features_and_similarity_embed_alike(store, tmp_path):
    """One frozen decoder: wherever its embeddings are used, self-attention sees the same nuclei, without positions."""
    pretraining = make_ssl_experiment()
    torch.manual_seed(3)
    model = CellDETR(pretraining.model).eval()
    for parameter in model.representation.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that it matters who sees whom and where
    save_model(tmp_path / "ssl.pt", model, pretraining.model)
    decoder = {"classes": list(store.classes), "representation": pretraining.model.representation.to_dict()}
    probing = make_experiment("parallel", decoder, probe="head")
    probe, frozen = build_model(probing, None, tmp_path / "ssl.pt", "cpu"), load_model(tmp_path / "ssl.pt")
    data = PatchData([store], make_split(store, store.n_patches, 0), "train")
    batch, noise = TrainingBatches(data, store.n_patches, seed=1)[0], NoiseSettings(low=0.1, high=0.4)
    images = float_images(batch.images)
    seen = {"pretraining": entering(model.projection), "probe": entering(probe.class_head)}
    SslStage(pretraining, model, data, data, ScoringSettings()).compute(images, batch.targets, batch)
    stage = SupervisedStage(probing, probe, data, data, ScoringSettings())
    stage.train()
    stage.compute(images, batch.targets, batch)
    seen["similarity"] = entering(frozen.projection)
    measure_similarity(frozen, store, patches=np.array([0]), seed=1, noise=noise, batch_size=store.n_patches)
    expected = dict(embed_patches(frozen, store, batch_size=4, device="cpu"))
    for name, (embeddings, *_) in seen.items():
        patches = range(store.n_patches) if name == "similarity" else batch.patches.tolist()
        for row, patch in enumerate(patches):
            found = embeddings[row, : len(expected[patch])]  # originals, before their anchors
            np.testing.assert_allclose(found, expected[patch], atol=1e-4, err_msg=name)
    other = load_model(tmp_path / "ssl.pt")
    other.representation.layers[1].positions = True
    moved = dict(embed_patches(other, store, batch_size=4, device="cpu"))
    assert np.abs(moved[3] - expected[3]).max() > 1e-2


def test_a_probe_of_a_decoder_that_was_trained_otherwise_is_refused(tmp_path):
    pretraining = make_ssl_experiment().model
    save_model(tmp_path / "ssl.pt", CellDETR(pretraining), pretraining)
    probing = make_experiment("parallel", {"representation": {"layers": 2}}, probe="head")
    with pytest.raises(InputError, match=r"got .*'positions': True.*ssl.pt.*stays frozen.*'positions': False"):
        build_model(probing, None, tmp_path / "ssl.pt", "cpu")
    tuning = probing.model_copy(update={"training": make_experiment().training})
    assert build_model(tuning, None, tmp_path / "ssl.pt", "cpu").settings.representation.positions


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
    without = read_batch(small_model("parallel"), store.images([1, 4]), given=[np.empty((0, 4))] * 2)[1]
    assert without.embeddings.shape == (0, 32)


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


def test_thousands_of_nuclei_in_a_patch_do_not_pad_the_others(store, monkeypatch):
    """Groups of images have the results of one batch, in the given order, and each is small."""
    model, seen = small_model("parallel", tokens=2), []
    counts = [3, 40, 0, 7, 40, 1]
    rng = np.random.default_rng(0)
    boxes = []
    for count in counts:
        low = rng.uniform(0, store.patch_size - 9, (count, 2))
        boxes.append(np.concatenate([low, low + rng.uniform(4, 9, (count, 2))], axis=1).astype(np.float32))
    images = store.images(np.arange(len(counts)))
    expected = read_batch(model, images, given=boxes)[1].embeddings
    monkeypatch.setattr("celldetr.inference.batch.MOST_PAIRS", 100)
    represent = model.represent

    def watched(features, given, valid):
        seen.append((given.shape[0], given.shape[1], valid is None))
        return represent(features, given, valid)

    monkeypatch.setattr(model, "represent", watched)
    found = read_batch(model, images, given=boxes)[1].embeddings
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert seen == [(2, 3, False), (1, 7, True), (1, 40, True), (1, 40, True)]
