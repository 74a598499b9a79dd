import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import FIXTURES, authors_shapes, celldetr_shapes, deformable_detr_shapes, weights
from plain_deformable_detr import detect

from celldetr.config.experiment import BackboneSettings, ModelSettings, RepresentationSettings
from celldetr.model.celldetr import IMAGE_MEAN, IMAGE_STD, CellDETR
from celldetr.model.imports import IMAGENET_MEAN, IMAGENET_STD, import_checkpoint
from celldetr.model.weights import initial_weights, load_model, save_model
from celldetr.runtime.errors import ConfigError, InputError

SCRIPT = Path(__file__).parents[3] / "scripts" / "import_checkpoint.py"
SMALL = ModelSettings(
    mode="parallel",
    classes=("a", "b", "c"),
    d_model=32,
    heads=4,
    points=2,
    ffn=32,
    encoder_layers=1,
    decoder_layers=2,
    queries=6,
    backbone=BackboneSettings(layers=(1, 1, 1, 1), width=8, stages=(2, 3)),
    representation=RepresentationSettings(layers=2, global_tokens=1),
)


@pytest.fixture(scope="module")
def golden():
    with np.load(FIXTURES / "golden_model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("authors") / "parallel.pth"
    torch.save({"model_state_dict": weights(authors_shapes()), "epoch": 99, "loss": np.float64(0.5)}, path)
    return path


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def imported(request, authors_file):
    """Give the authors' model and the tolerances of boxes and of everything else."""
    kind = request.param
    model = import_checkpoint(authors_file, "authors", "parallel").model.to(kind)
    return model, *((5e-6, 5e-5) if kind == torch.float32 else (1e-6, 1e-6))


def golden_images(golden, kind):
    normalised = (golden["image_u8"] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return torch.from_numpy(normalised.astype(np.float32)).permute(0, 3, 1, 2).to(kind)


def taps(golden, name, tensor):
    assert list(tensor.shape) == golden[f"tap_{name}_shape"].tolist()
    flat = tensor.contiguous().flatten()
    picked = flat[torch.arange(512) * 1000003 % flat.numel()].double().numpy()
    return np.abs(picked - golden[f"tap_{name}_f64"]).max() / np.abs(golden[f"tap_{name}_f64"]).max()


def close(tensor, array, tolerance):
    np.testing.assert_allclose(tensor.detach().double().numpy(), array, rtol=0, atol=tolerance)


def test_imported_authors_model_reproduces_every_reference_array(imported, golden):
    model, box_tolerance, tolerance = imported
    kind = model.level_embed.dtype
    images = golden_images(golden, kind)
    seen = {}
    for part, layers in (("encoder", model.encoder.layers), ("decoder", model.decoder.layers)):
        for index, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda _, __, out, name=f"{part}{index}": seen.update({name: out[0] if isinstance(out, tuple) else out})
            )
    model.image_mean.zero_()
    model.image_std.fill_(1)
    with torch.no_grad():
        maps = model.backbone(images)
        projected = model.input_projection(maps)
        features = model.encode(images)
        found = model.detect(features)
        seen |= {f"resnet_layer{index + 1}": x for index, x in enumerate(maps)}
        seen |= {f"input_proj{index}": x for index, x in enumerate(projected)}
        for name, tensor in seen.items():
            assert taps(golden, name, tensor) < tolerance, name
        assert len(seen) == 4 + 4 + 6 + 3
        close(found.logits[..., 0], golden["det_logits_f64"], tolerance)
        close(found.boxes, golden["det_boxes_f64"], box_tolerance)

        model.representation.global_tokens = 0
        sequential = model.represent(features, found.boxes[-1])
        close(sequential[:, :16], golden["seq_embed_first16_f64"], tolerance)
        close(model.classify(sequential), golden["seq_class_logits_f64"], tolerance)

        boxes, valid = torch.full((2, 7, 4), torch.nan, dtype=kind), torch.arange(7) < torch.tensor([[7], [3]])
        boxes[valid] = torch.from_numpy(np.concatenate([golden["boxes_0"], golden["boxes_1"]])).to(kind)
        for tokens in (50, 0, 1):
            model.representation.global_tokens = tokens
            embeddings = model.represent(features, boxes, valid)[valid]
            close(embeddings, golden[f"par_embed_cls{tokens}_f64"], tolerance)
            close(model.classify(embeddings), golden[f"par_class_logits_cls{tokens}_f64"], tolerance)


def test_imported_sequential_model_predicts_the_reference_detections(authors_file, golden):
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


def test_every_tensor_of_the_authors_file_is_used_or_has_a_reason(authors_file):
    found = import_checkpoint(authors_file, "authors", "parallel")
    names = set(authors_shapes())
    assert set(found.used) | set(found.unused) == names
    assert not set(found.used) & set(found.unused)
    assert len(set(found.used.values())) == len(found.used)
    assert set(found.used.values()) | set(found.fresh) == set(found.model.state_dict())
    assert set(found.fresh) == {"image_mean", "image_std"}
    assert all(
        name.startswith(("detr.transformer.decoder.bbox_embed.", "decouple_decoder.inital_layer."))
        for name in found.unused
    )
    assert found.model.settings.representation.global_tokens == 50
    assert found.model.settings.queries == 900


def test_plain_reference_is_right_for_the_authors_model(golden):
    """The independent functions that imports from COCO are compared with reproduce the reference arrays themselves."""
    state = {name.removeprefix("detr."): tensor for name, tensor in weights(authors_shapes()).items()}
    with torch.no_grad():
        logits, boxes = detect(state, golden_images(golden, torch.float32), stages=(1, 2, 3, 4), offset=0.0)
    close(logits[..., 0], golden["det_logits_f64"], 5e-5)
    close(boxes, golden["det_boxes_f64"], 5e-6)


@pytest.fixture
def coco_file(tmp_path):
    path = tmp_path / "coco.pth"
    torch.save({"model": weights(deformable_detr_shapes()), "args": argparse.Namespace(lr=1e-4), "epoch": 49}, path)
    return path


@pytest.mark.parametrize("size", [(96, 96), (96, 64), (72, 100)])
def test_imported_coco_model_computes_what_the_original_does(coco_file, size):
    found = import_checkpoint(coco_file, "coco", "baseline")
    settings = found.model.settings
    assert (settings.backbone.stages, settings.backbone.extra_levels) == ((2, 3, 4), 1)
    assert (settings.queries, settings.decoder_layers, settings.position_offset) == (12, 3, 0.5)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    state = {name: tensor.double() for name, tensor in weights(deformable_detr_shapes()).items()}
    logits, boxes = detect(state, (images - mean) / std, stages=(2, 3, 4), offset=0.5)
    model = found.model.double()
    with torch.no_grad():
        ours = model.detect(model.encode(images))
    close(ours.logits, logits.numpy(), 1e-6)
    close(ours.boxes, boxes.numpy(), 1e-6)


def test_coco_checkpoint_of_full_size_gives_the_sizes_of_its_paper(tmp_path):
    shapes = deformable_detr_shapes(
        channels=256,
        ffn=1024,
        encoder_layers=6,
        decoder_layers=6,
        queries=300,
        classes=91,
        width=64,
        blocks=(3, 4, 6, 3),
    )
    torch.save({"model": {name: torch.zeros(shape) for name, shape in shapes.items()}}, tmp_path / "coco.pth")
    found = import_checkpoint(tmp_path / "coco.pth", "coco", "baseline")
    settings = found.model.settings
    assert (settings.d_model, settings.heads, settings.points, settings.ffn, len(settings.classes)) == (
        256,
        8,
        4,
        1024,
        91,
    )
    assert (settings.encoder_layers, settings.decoder_layers, settings.queries) == (6, 6, 300)
    assert settings.backbone.layers == (3, 4, 6, 3)
    assert set(found.used) | set(found.unused) == set(shapes)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_coco_checkpoint_starts_a_model_with_representation_decoder(coco_file, mode):
    found = import_checkpoint(coco_file, "coco", mode, classes=("x", "y"))
    assert set(found.used) | set(found.unused) == set(deformable_detr_shapes())
    assert found.unused["class_embed.0.weight"].startswith("logits of COCO's classes")
    assert {name.split(".")[0] for name in found.fresh} == {
        "representation", "class_head", "decoder", "image_mean", "image_std",
    }  # fmt: skip
    assert found.model.classify(torch.zeros(1, 32)).shape == (1, 2)


def _drop(state, pattern):
    return {name: tensor for name, tensor in state.items() if pattern not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: _drop(w, "decoder.bbox_embed."), "iterative box refinement"),
        (lambda w: w | {"transformer.enc_output.weight": torch.zeros(1)}, "two-stage"),
        (lambda w: w | {"transformer.level_embed": torch.zeros(1, 32)}, "single-scale"),
        (lambda w: _drop(w, "level_embed"), "level_embed"),
        (lambda w: w | {"transformer.extra.weight": torch.zeros(1)}, "transformer.extra.weight.* no place"),
        (lambda w: _drop(w, "encoder.layers.1.norm2.bias"), "encoder.layers.1.ffn.norm.bias: missing"),
        (lambda w: w | {"query_embed.weight": torch.zeros(12, 32)}, r"query_embed.weight: got \(12, 32\)"),
        (lambda w: w | {"bbox_embed.0.layers.0.bias": torch.ones(32)}, "is not equal to"),
        (lambda w: w | {"class_embed.0.bias": torch.full((7,), torch.nan)}, "class_embed.0.bias: holds values"),
        (lambda w: _drop(w, "layer4"), "blocks in the stages"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "other.pth"
    torch.save({"model": change(weights(deformable_detr_shapes()))}, path)
    with pytest.raises(InputError, match=message):
        import_checkpoint(path, "coco", "baseline")


@pytest.mark.parametrize(
    "name",
    [
        *("transformer.level_embed", "query_embed.weight", "class_embed.0.weight", "backbone.0.body.conv1.weight"),
        *("transformer.encoder.layers.0.self_attn.attention_weights.weight", "input_proj.0.0.weight"),
        *(
            "transformer.encoder.layers.0.linear1.weight",
            "backbone.0.body.layer1.0.conv3.weight",
            "bbox_embed.0.layers.0.bias",
        ),
    ],
)
def test_tensors_that_tell_the_settings_are_refused_when_they_are_odd(tmp_path, name):
    path, whole = tmp_path / "odd.pth", weights(deformable_detr_shapes())
    odd = [None, torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 0), torch.zeros(70_000, 2), torch.zeros(4, 3, 2, 1)]
    odd += [whole[name].to_sparse(), whole[name].to("meta"), whole[name] * torch.nan]
    for value in odd:
        torch.save({"model": _drop(whole, name) if value is None else whole | {name: value}}, path)
        with pytest.raises((InputError, ConfigError)) as error:
            import_checkpoint(path, "coco", "baseline")
        assert str(path) in str(error.value) or "heads" in str(error.value)


def test_source_mode_classes_and_heads_that_do_not_fit_are_refused(tmp_path, coco_file):
    path = tmp_path / "authors.pth"
    torch.save({"model_state_dict": weights(celldetr_shapes())}, path)
    assert import_checkpoint(path, "authors", "sequential").model.settings.representation.layers == 2
    with pytest.raises(InputError, match="expected sequential or parallel"):
        import_checkpoint(path, "authors", "baseline")
    with pytest.raises(InputError, match="expected 'model'"):
        import_checkpoint(path, "coco", "baseline")
    with pytest.raises(ConfigError, match="got 2 names, expected 5"):
        import_checkpoint(path, "authors", "parallel", classes=("a", "b"))
    with pytest.raises(ConfigError, match="heads: got 5"):
        import_checkpoint(coco_file, "coco", "baseline", heads=5)


def test_contrastive_head_of_the_authors_is_listed(tmp_path):
    shapes = celldetr_shapes() | {"contrastive_project.0.weight": (512, 32), "contrastive_project.0.bias": (512,)}
    torch.save({"model_state_dict": weights(shapes)}, tmp_path / "ssl.pth")
    found = import_checkpoint(tmp_path / "ssl.pth", "authors", "parallel", global_tokens=1)
    assert "contrastive" in found.unused["contrastive_project.0.weight"]
    assert found.model.representation.global_tokens == 1


def test_import_script_writes_a_model_file_and_the_list_of_tensors(tmp_path, coco_file):
    out = tmp_path / "model.pt"
    command = [sys.executable, str(SCRIPT), "--source", "coco", str(coco_file), str(out), "--mode", "baseline"]
    subprocess.run(command, check=True, capture_output=True)
    assert load_model(out).settings.mode == "baseline"
    listed = json.loads(Path(f"{out}.json").read_text())
    assert listed["used"]["query_embed.weight"] == "decoder.query_embed.weight"
    command[-1] = "parallel"
    command[command.index(str(coco_file))] = str(tmp_path / "none.pth")
    failed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_saved_model_comes_back_the_same(tmp_path):
    model = CellDETR(SMALL).eval()
    save_model(tmp_path / "model.pt", model, SMALL, {"epoch": 3})
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.settings == SMALL
    assert not loaded.training
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_model_file_that_does_not_fit_names_the_tensors(tmp_path):
    path = tmp_path / "model.pt"
    save_model(path, CellDETR(SMALL), SMALL)
    other = CellDETR(SMALL.model_copy(update={"classes": ("a", "b")}))
    with pytest.raises(InputError, match=r"class_head.weight: got \(3, 32\), expected \(2, 32\)"):
        initial_weights(other, path)
    kept = initial_weights(other, path, fresh=("class_head",))
    assert kept == ["class_head.weight", "class_head.bias"]
    content = torch.load(path, weights_only=True)
    torch.save(content | {"settings": content["settings"] | {"hedas": 3}}, path)
    with pytest.raises(InputError, match="hedas"):
        load_model(path)
    torch.save(content | {"format": 2}, path)
    with pytest.raises(InputError, match="format 2"):
        load_model(path)


def test_baseline_starts_from_a_parallel_model_when_told(tmp_path):
    path = tmp_path / "model.pt"
    source = CellDETR(SMALL)
    save_model(path, source, SMALL)
    baseline = CellDETR(SMALL.model_copy(update={"mode": "baseline"}))
    with pytest.raises(InputError, match="not in this model"):
        initial_weights(baseline, path)
    initial_weights(baseline, path, fresh=("representation", "class_head", "decoder.class_embed"))
    assert torch.equal(baseline.level_embed, source.level_embed)


def test_torchvision_weights_fill_the_backbone_alone(tmp_path):
    body = "backbone.0.body."
    shapes = {
        name.removeprefix(body): s for name, s in deformable_detr_shapes(blocks=(1, 1, 1, 1)).items() if body in name
    }
    given = weights({f"{body}{name}": shape for name, shape in shapes.items()})
    given = {name.removeprefix(body): tensor for name, tensor in given.items()}
    given |= {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10), "bn1.num_batches_tracked": torch.tensor(1)}
    torch.save(given, tmp_path / "resnet.pth")
    model = CellDETR(SMALL)
    before = model.level_embed.clone()
    kept = initial_weights(model, tmp_path / "resnet.pth")
    assert torch.equal(model.level_embed, before)
    assert not any(name.startswith("backbone.") for name in kept)
    assert torch.equal(model.backbone.get_parameter("layer2.0.conv1.weight"), given["layer2.0.conv1.weight"])
    assert torch.equal(model.backbone.get_buffer("bn1.running_var"), given["bn1.running_var"])
    del given["layer1.0.bn2.bias"]
    torch.save(given, tmp_path / "resnet.pth")
    with pytest.raises(InputError, match="backbone.layer1.0.bn2.bias: missing"):
        initial_weights(model, tmp_path / "resnet.pth")


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path, capsys):
    path = tmp_path / "model.pt"
    with pytest.raises(InputError, match="no such file"):
        load_model(path)
    torch.save({"format": 1, "settings": Hostile(), "state": {}}, path)
    with pytest.raises(InputError, match="could run code"):
        load_model(path)
    path.write_bytes(pickle.dumps({"format": Hostile()}, protocol=2))
    with pytest.raises(InputError, match="could run code"):
        load_model(path)
    assert "run" not in capsys.readouterr().out
    save_model(path, CellDETR(SMALL), SMALL)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=str(path)):
        load_model(path)
    path.write_text("no weights")
    with pytest.raises(InputError, match=str(path)):
        load_model(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(InputError, match="got a Tensor"):
        load_model(path)
