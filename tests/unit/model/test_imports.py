"""Checkpoints of other codes become our models and compute what the originals do."""

import argparse
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import FIXTURES, authors_shapes, celldetr_shapes, deformable_detr_shapes, weights
from torch.nn import functional as F

from celldetr.model.celldetr import IMAGE_MEAN, IMAGE_STD
from celldetr.model.imports import _renamed, import_checkpoint
from celldetr.model.weights import load_model, model_facts
from celldetr.runtime.errors import ConfigError, InputError

SCRIPT = Path(__file__).parents[3] / "scripts" / "import_checkpoint.py"


@pytest.fixture(scope="module")
def golden():
    with np.load(FIXTURES / "golden_model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("authors") / "parallel.pth"
    torch.save({"model_state_dict": weights(authors_shapes()), "epoch": 99, "loss": np.float64(0.5)}, path)
    return path


@pytest.fixture(scope="module")
def imported(authors_file):
    return import_checkpoint(authors_file, "authors", "parallel")


def golden_images(golden, dtype):
    normalised = (golden["image_u8"] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return torch.from_numpy(normalised.astype(np.float32)).permute(0, 3, 1, 2).to(dtype)


def close(tensor, array, tolerance=1e-6):
    np.testing.assert_allclose(tensor.detach().double().numpy(), array, rtol=0, atol=tolerance)


def close_at_512_places(golden, name, tensor):
    expected = golden[f"tap_{name}_f64"]
    assert list(tensor.shape) == golden[f"tap_{name}_shape"].tolist()
    flat = tensor.contiguous().flatten()
    close(flat[torch.arange(512) * 1000003 % flat.numel()], expected, 1e-6 * np.abs(expected).max())


def test_imported_authors_model_reproduces_every_reference_array(imported, golden):
    model = imported.model.double()
    seen = {}
    for part, layers in (("encoder", model.encoder.layers), ("decoder", model.decoder.layers)):
        for index, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda _, __, out, name=f"{part}{index}": seen.update({name: out[0] if isinstance(out, tuple) else out})
            )
    model.image_mean.zero_()
    model.image_std.fill_(1)
    images = golden_images(golden, torch.float64)
    with torch.no_grad():
        maps = model.backbone(images)
        seen |= {f"resnet_layer{index + 1}": x for index, x in enumerate(maps)}
        seen |= {f"input_proj{index}": x for index, x in enumerate(model.input_projection(maps))}
        features = model.encode(images)
        found = model.detect(features)
        assert len(seen) == 4 + 4 + 6 + 3
        for name, tensor in seen.items():
            close_at_512_places(golden, name, tensor)
        close(found.logits[..., 0], golden["det_logits_f64"])
        close(found.boxes, golden["det_boxes_f64"])

        model.representation.global_tokens = 0
        sequential = model.represent(features, found.boxes[-1])
        close(sequential[:, :16], golden["seq_embed_first16_f64"])
        close(model.classify(sequential), golden["seq_class_logits_f64"])

        boxes = torch.full((2, 7, 4), torch.nan, dtype=torch.float64)
        valid = torch.arange(7) < torch.tensor([[7], [3]])
        boxes[valid] = torch.from_numpy(np.concatenate([golden["boxes_0"], golden["boxes_1"]])).double()
        for tokens in (50, 0, 1):
            model.representation.global_tokens = tokens
            embeddings = model.represent(features, boxes, valid)[valid]
            close(embeddings, golden[f"par_embed_cls{tokens}_f64"])
            close(model.classify(embeddings), golden[f"par_class_logits_cls{tokens}_f64"])


def test_imported_sequential_model_predicts_the_reference_detections_in_float32(authors_file, golden):
    model = import_checkpoint(authors_file, "authors", "sequential").model
    assert model.representation.global_tokens == 0
    images = torch.from_numpy(golden["image_u8"]).permute(0, 3, 1, 2).float() / 255
    for index, found in enumerate(model.predict(images, 0.4)):
        reference = {key: golden[f"seq_final_{key}_img{index}_f64"] for key in ("query", "boxes", "scores", "labels")}
        order = np.argsort(reference["query"])
        np.testing.assert_array_equal(found.query, reference["query"][order])
        np.testing.assert_array_equal(found.class_scores.argmax(dim=1), reference["labels"][order])
        close(found.boxes, reference["boxes"][order], 256 * 5e-6)
        close(found.class_scores.amax(dim=1), reference["scores"][order], 5e-5)


def test_every_tensor_of_the_authors_file_is_used_or_has_a_reason(imported):
    names = set(authors_shapes())
    assert set(imported.used) | set(imported.unused) == names
    assert not set(imported.used) & set(imported.unused)
    assert len(set(imported.used.values())) == len(imported.used)
    assert set(imported.used.values()) | set(imported.fresh) == set(imported.model.state_dict())
    assert set(imported.fresh) == {"image_mean", "image_std"}
    expected = ("detr.transformer.decoder.bbox_embed.", "decouple_decoder.inital_layer.")
    assert all(name.startswith(expected) for name in imported.unused)
    assert imported.model.settings.representation.global_tokens == 50
    assert imported.model.settings.queries == 900


@pytest.fixture(scope="module")
def coco_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("coco") / "coco.pth"
    torch.save({"model": weights(deformable_detr_shapes()), "args": argparse.Namespace(lr=1e-4), "epoch": 49}, path)
    return path


def test_imported_coco_model_differs_from_the_authors_where_the_original_does(coco_file):
    """Its layers are those that the golden arrays check; levels, normalisation and position code are its own."""
    found = import_checkpoint(coco_file, "coco", "baseline")
    model, backbone, settings = found.model, found.model.settings.backbone, found.model.settings
    assert (backbone.layers, backbone.stages, backbone.extra_levels) == ((1, 2, 1, 1), (2, 3, 4), 1)
    assert (settings.queries, settings.decoder_layers, settings.position_offset) == (112, 3, 0.5)
    given, state = weights(deformable_detr_shapes()), model.state_dict()
    detector = {f"detr.{name}": tensor for name, tensor in given.items()}
    assert {name: _renamed(f"detr.{name}") for name in found.used} == found.used, "as in the authors' files"
    assert all(torch.equal(state[new], detector[f"detr.{old}"]) for old, new in found.used.items())
    seen = {}
    model.backbone.register_forward_hook(lambda _, args, maps: seen.update(image=args[0], maps=maps))
    model.input_projection.register_forward_hook(lambda _, args, maps: seen.update(levels=maps))
    images = torch.rand(2, 3, 72, 100)
    with torch.no_grad():
        model.encode(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(seen["image"], (images - mean) / std)
    for level, source in enumerate((*seen["maps"], seen["maps"][-1])):
        (kernel, bias), norm = (
            [given[f"input_proj.{level}.{part}.{x}"] for x in ("weight", "bias")] for part in (0, 1)
        )
        convolved = F.conv2d(source, kernel, bias, stride=1 if level < 3 else 2, padding=kernel.shape[-1] // 2)
        torch.testing.assert_close(seen["levels"][level], F.group_norm(convolved, 32, *norm), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_coco_checkpoint_starts_a_model_with_representation_decoder(coco_file, mode):
    found = import_checkpoint(coco_file, "coco", mode, classes=("x", "y"))
    assert set(found.used) | set(found.unused) == set(deformable_detr_shapes())
    assert found.unused["class_embed.0.weight"].startswith("logits of COCO's classes")
    assert {name.split(".")[0] for name in found.fresh} == {
        "representation", "class_head", "decoder", "image_mean", "image_std",
    }  # fmt: skip
    assert found.model.classify(torch.zeros(1, 32)).shape == (1, 2)


def without(state, pattern):
    return {name: tensor for name, tensor in state.items() if pattern not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "decoder.bbox_embed."), "iterative box refinement"),
        (lambda w: w | {"transformer.enc_output.weight": torch.zeros(1)}, "two-stage"),
        (lambda w: w | {"transformer.level_embed": torch.zeros(1, 32)}, "single-scale"),
        (lambda w: without(w, "level_embed"), "level_embed"),
        (lambda w: w | {"transformer.extra.weight": torch.zeros(1)}, "transformer.extra.weight.* no place"),
        (lambda w: without(w, "encoder.layers.1.norm2.bias"), "encoder.layers.1.ffn.norm.bias: missing"),
        (lambda w: w | {"query_embed.weight": torch.zeros(112, 32)}, r"query_embed.weight: got \(112, 32\)"),
        (lambda w: w | {"query_embed.weight": torch.tensor(1.0)}, "no tensor 'query_embed.weight'"),
        (lambda w: w | {"query_embed.weight": "text"}, "'query_embed.weight'.* are not tensors"),
        (lambda w: w | {"transformer.level_embed": torch.zeros(4, 36)}, "heads: got 8, which does not divide 36"),
        (lambda w: w | {"bbox_embed.0.layers.0.bias": torch.ones(32)}, "expected equal tensors"),
        (lambda w: w | {"class_embed.0.bias": torch.full((7,), torch.nan)}, "class_embed.0.bias: holds values"),
        (lambda w: without(w, "layer4"), "blocks in the stages"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "other.pth"
    torch.save({"model": change(weights(deformable_detr_shapes()))}, path)
    with pytest.raises((InputError, ConfigError), match=message):
        import_checkpoint(path, "coco", "baseline")


def test_source_mode_classes_and_heads_that_do_not_fit_are_refused(tmp_path, coco_file):
    path = tmp_path / "authors.pth"
    torch.save({"model_state_dict": weights(celldetr_shapes())}, path)
    assert import_checkpoint(path, "authors", "sequential").model.settings.representation.layers == 3
    with pytest.raises(InputError, match="expected mode sequential or parallel"):
        import_checkpoint(path, "authors", "baseline")
    with pytest.raises(InputError, match="expected 'model'"):
        import_checkpoint(path, "coco", "baseline")
    with pytest.raises(ConfigError, match="got 2 names, expected 5"):
        import_checkpoint(path, "authors", "parallel", classes=("a", "b"))
    with pytest.raises(ConfigError, match="heads: got 5"):
        import_checkpoint(coco_file, "coco", "baseline", heads=5)


def authors_settings(kind, monkeypatch):
    """Make settings of a class that is known only while they are written, as in the authors' code."""
    module = types.ModuleType("util.config.config")
    methods = {"__module__": module.__name__}
    if kind is dict:  # as the packages whose dictionaries have attributes
        methods |= {"__getnewargs__": lambda self: tuple(self.items()), "__getstate__": lambda self: self}
    module.ConfigDict = type("ConfigDict", (kind,), methods)
    for name in ("util", "util.config", "util.config.config"):
        monkeypatch.setitem(sys.modules, name, module)
    made = module.ConfigDict()
    if kind is dict:
        made.update(lr=1e-4, model=module.ConfigDict(layers=[3, 4]))
    else:
        made.lr, made.model = 1e-4, (3, 4)
    return made


@pytest.mark.parametrize("kind", [dict, object])
@pytest.mark.parametrize("hostile", [False, True])
def test_checkpoints_with_the_authors_settings_object_are_read_without_their_code(tmp_path, monkeypatch, kind, hostile):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "contrastive.pth"
    head = {"contrastive_project.0": (64, 32), "contrastive_project.2": (16, 64)}
    shapes = celldetr_shapes() | {f"{name}.weight": shape for name, shape in head.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in head.items()}
    with monkeypatch.context() as patch:
        settings = authors_settings(kind, patch)
        if hostile:
            settings.__dict__["extra"] = Hostile()
            if kind is dict:
                settings["extra"] = Hostile()
        torch.save({"epoch": 3, "model_state_dict": weights(shapes), "config": settings}, path)
    if hostile:
        with pytest.raises(InputError, match=r"it holds \S*mkdir, which could run code") as error:
            import_checkpoint(path, "authors", "parallel")
        assert "weights_only" not in str(error.value)
        assert not (tmp_path / "ran").exists()
        return
    found = import_checkpoint(path, "authors", "parallel")
    assert set(found.used) | set(found.unused) == set(shapes)
    assert found.used["contrastive_project.2.weight"] == "projection.2.weight"
    assert found.unused["decouple_class_embed.weight"] == "contrastive pretraining does not train it"
    settings = found.model.settings
    assert (settings.projection, settings.classes) == (16, ())
    assert (settings.representation.positions, settings.representation.global_tokens) == (False, 1)
    x, given = torch.randn(4, 32), weights(shapes)
    parts = [given[f"{name}.{part}"] for name in head for part in ("weight", "bias")]
    expected = F.linear(F.linear(x, *parts[:2]).relu(), *parts[2:])
    torch.testing.assert_close(found.model.project(x), expected)
    with pytest.raises(InputError, match="mode 'sequential', expected mode parallel"):
        import_checkpoint(path, "authors", "sequential")


def test_import_script_writes_a_model_file_and_the_list_of_tensors(tmp_path, coco_file):
    out = tmp_path / "model.pt"
    command = [sys.executable, str(SCRIPT), "--source", "coco", "--mode", "baseline"]
    seen = ["--trained-on", "fold1", "donor 2", "--mpp", "0.5", "--patch-size", "64"]
    subprocess.run([*command, str(coco_file), str(out), *seen], check=True, capture_output=True)
    assert load_model(out).settings.mode == "baseline"
    facts = model_facts(out)
    assert (facts.mpp, facts.size, facts.trained_on) == (0.5, 64, ("fold1", "donor 2"))
    listed = json.loads(Path(f"{out}.json").read_text())
    assert listed["used"]["query_embed.weight"] == "decoder.query_embed.weight"
    misspelt = subprocess.run(
        [*command, "x", "y", "--trained-on", "Fold1"], check=False, capture_output=True, text=True
    )
    assert misspelt.stderr.startswith("error: --trained-on: got ['Fold1'], expected fold1, fold2, fold3")
    failed = subprocess.run([*command, "none.pth", str(out), *seen], check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: none.pth: no such file")
