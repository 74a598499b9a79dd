"""Model files, backbones of torchvision, and files that are neither."""

import io
import pickle
import zipfile

import pytest
import torch
from small_model import small_settings

from celldetr.config.experiment import BackboneSettings
from celldetr.model import weights
from celldetr.model.backbone import Backbone
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import initial_weights, load_model, model_settings, save_model
from celldetr.runtime.errors import InputError

SMALL = small_settings("parallel", tokens=1, backbone=BackboneSettings(layers=(1, 1, 1, 1), width=8, stages=(2, 3)))


@pytest.fixture
def path(tmp_path):
    """Give a model file."""
    torch.manual_seed(0)
    save_model(tmp_path / "model.pt", CellDETR(SMALL), SMALL, {"epoch": 3})
    return tmp_path / "model.pt"


def change(path, **changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | {key: content[key] | value for key, value in changes.items()}, path)


def test_saved_model_comes_back_the_same(path):
    torch.manual_seed(0)
    state = CellDETR(SMALL).state_dict()
    loaded = load_model(path)
    assert loaded.settings == SMALL
    assert not loaded.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_does_not_see_other_pixels_than_it_was_trained_on(path):
    load_model(path, mpp=0.5)  # it does not say, as imported models
    change(path, extra={"mpp": 0.25})
    load_model(path, mpp=0.25)
    with pytest.raises(InputError, match=r"model\.pt: got a model that was trained at 0\.25 um per px, expected 0\.5"):
        load_model(path, mpp=0.5)


def test_settings_of_an_earlier_version_that_change_no_weights_are_dropped(path):
    change(path, settings={"fast": True})
    assert load_model(path).settings == SMALL
    representation = SMALL.representation.to_dict()
    del representation["positions"]  # earlier versions had it in the stage: of contrastive pretraining, false
    change(path, settings={"projection": 0, "representation": representation})
    assert load_model(path).settings == SMALL
    contrastive = model_settings(
        {"format": 1, "settings": {**SMALL.to_dict(), "projection": 8, "representation": representation}, "state": {}},
        path,
    )
    assert not contrastive.representation.positions
    change(path, settings={"hedas": 3})
    with pytest.raises(InputError, match="hedas"):
        load_model(path)


def test_model_file_that_does_not_fit_names_the_tensors(path):
    other = CellDETR(SMALL.model_copy(update={"classes": ("a", "b")}))
    with pytest.raises(InputError, match=r"class_head.weight: got \(3, 32\), expected \(2, 32\)"):
        initial_weights(other, path)
    assert initial_weights(other, path, fresh=("class_head",)) == ["class_head.weight", "class_head.bias"]


def test_weights_that_do_not_fit_are_refused(path):
    for value, message in (
        (torch.zeros(4, 3), r"level_embed: got \(4, 3\)"),
        (torch.zeros(2, 32, dtype=torch.int64), "level_embed: got torch.int64"),
        (torch.full((2, 32), torch.nan), "level_embed: holds values that are not finite"),
        (torch.zeros(1).expand(2, 32), "level_embed: holds fewer values than its shape"),
        ([0.0], "level_embed: got a list"),
        (torch.ones(2, 32).to_sparse(), "level_embed: got a Tensor"),
    ):
        change(path, state={"level_embed": value})
        with pytest.raises(InputError, match=message):
            load_model(path)


def test_baseline_starts_from_the_detector_of_a_parallel_model(path):
    source = load_model(path)
    baseline = CellDETR(SMALL.model_copy(update={"mode": "baseline"}))
    with pytest.raises(InputError, match="not in this model"):
        initial_weights(baseline, path)
    initial_weights(baseline, path, fresh=("representation", "class_head", "decoder.class_embed"))
    assert torch.equal(baseline.level_embed, source.level_embed)


def test_torchvision_weights_fill_the_backbone_alone(tmp_path):
    given = Backbone(SMALL.backbone.model_copy(update={"stages": (4,)})).state_dict()
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


def forged(value):
    """Bytes of a PyTorch file whose pickle is another one."""
    whole, made = io.BytesIO(), io.BytesIO()
    torch.save({}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(made, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(value, 2) if name.endswith("data.pkl") else source.read(name))
    return made.getvalue()


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def deflated(content):
    """Compress an archive: a small file that takes much memory."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return made.getvalue()


@pytest.mark.parametrize(("size", "value"), [("d_model", 8000), ("ffn", 16000), ("queries", 32000)])
def test_settings_of_a_larger_model_than_the_weights_take_no_memory(path, monkeypatch, size, value):
    change(path, settings={size: value})
    monkeypatch.setattr(weights, "CellDETR", None)
    with pytest.raises(InputError, match="describe a larger model than it has weights for"):
        load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        saved({"format": 1, "settings": Hostile(), "state": {}}),
        saved({"format": Hostile()}, _use_new_zipfile_serialization=False),
        pickle.dumps({"format": Hostile()}, protocol=2),
        forged({"format": Hostile()}),
    ],
    ids=["container", "old container", "pickle", "forged container"],
)
def test_no_file_runs_code(tmp_path, capsys, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match="it holds print, which could run code") as error:
        load_model(tmp_path / "model.pt")
    assert "weights_only" not in str(error.value)
    assert "run" not in capsys.readouterr().out


def test_files_that_are_no_model_files_are_refused(path):
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        flipped = bytearray(whole)
        flipped[largest.header_offset + largest.file_size] ^= 1
    for content, message in (
        (bytes(flipped), "wrong checksum"),
        (whole[:-5000], "cannot be read as a PyTorch file"),
        (b"", "cannot be read as a PyTorch file"),
        (b"no weights", "cannot be read as a PyTorch file"),
        (b"<html><body>404", r"cannot be read as a PyTorch file \(Unsupported operand 60\)"),
        (deflated(whole), "it is compressed"),
        (saved(torch.zeros(3)), "got a Tensor, expected a mapping"),
        (saved({"weights": 1}), r"got keys \['weights'\] and format None, expected a model file of format 1"),
        (saved({"format": 2, "settings": {}, "state": {}}), "format 2"),
        (saved({"format": 1, "settings": [], "state": {}}), "expected a model file"),
        (
            saved({"format": 1, "settings": {"projection": 8, "representation": 3}, "state": {}}),
            "representation: got 3",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load_model(path)
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        load_model(path.parent / "none.pt")
