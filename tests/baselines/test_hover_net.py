"""HoVer-Net: losses, nuclei, pretrained weights."""

import numpy as np
import pytest
import torch
from monai.apps.pathology.losses import HoVerNetLoss
from monai.networks.nets import hovernet
from planted_nuclei import agreement, touching_nuclei
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18, resnet50

from celldetr.config.segmentation import SegmentationSettings, SystemSettings
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.segmentation.hover import hover_maps
from celldetr.segmentation.system import Truth
from celldetr.segmentation.systems import build_system

CLASSES = ("a", "b", "c")


def build(size="small", **settings):
    torch.manual_seed(0)
    recipe = SegmentationSettings(system="hover_net", size=size, **settings)
    return build_system(SystemSettings(segmentation=recipe, classes=CLASSES))


def planted(size=64):
    """Two images: in the first one nuclei are dark and of a colour by class; the second one is empty."""
    instances = torch.from_numpy(np.stack([touching_nuclei(size), np.zeros((size, size), np.int64)]))
    instances = torch.unique(instances, return_inverse=True)[1]
    labels = (torch.arange(int(instances.max())) % 3).expand(2, -1)
    truth = Truth(instances, labels, torch.full((2,), -1))
    images = 1 - 0.8 * functional.one_hot(truth.classes, 4)[..., 1:].movedim(-1, 1) * (truth.classes > 0)[:, None]
    return images.float(), truth


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_fall_and_nuclei_are_found(precision):
    system, (images, truth) = build(), planted()
    optimizer, sums = torch.optim.Adam(system.parameters(), 1e-2), []
    for _ in range(60):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses = system.losses(images, truth)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert {type(loss) for loss in losses.values()} == {torch.Tensor}
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        sums.append(float(total.detach()))
    assert np.isfinite(sums).all()
    assert sums[-1] < 0.5 * sums[0]
    system.eval()
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        found, empty = system.segment(images)
    assert len(found.boxes) > 0.5 * len(truth.labels[0])
    assert len(empty.boxes) == 0


def test_losses_are_those_of_monai_with_the_weights_of_the_authors():
    system, (images, truth) = build().eval(), planted()
    losses = system.losses(images, truth)
    nuclear, maps, classes = system.network(images)
    one_hot = [
        functional.one_hot(each, n).movedim(-1, 1).float()
        for each, n in ((truth.classes.clamp(max=1), 2), (truth.classes, 4))
    ]
    expected = HoVerNetLoss(lambda_hv_mse=1, lambda_hv_mse_grad=0)(
        {"nucleus_prediction": nuclear, "horizontal_vertical": maps, "type_prediction": classes},
        {
            "nucleus_prediction": one_hot[0],
            "horizontal_vertical": hover_maps(truth.instances),
            "type_prediction": one_hot[1],
        },
    )
    got = losses["nucleus"] + losses["maps"] + losses["class"]
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


class Planted(nn.Module):
    """A network that gives the truth."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, images):
        nuclear = functional.one_hot((self.truth.instances > 0).long(), 2).movedim(-1, 1) * 20.0
        classes = functional.one_hot(self.truth.classes, 4).movedim(-1, 1) * 20.0
        return [nuclear, hover_maps(self.truth.instances), classes]


def test_nuclei_of_perfect_outputs_are_the_truth():
    system, (images, truth) = build(), planted(128)
    system.network = Planted(truth)
    found, empty = system.segment(images)
    painted = np.zeros((128, 128), np.int64)
    for number, (box, mask) in enumerate(zip(found.boxes.astype(int), found.masks, strict=True), start=1):
        painted[box[1] : box[3], box[0] : box[2]][mask] = number
    instances = truth.instances[0].numpy()
    assert agreement(instances, painted).min() > 0.9
    of_found = [np.bincount(instances[painted == number]).argmax() for number in range(1, len(found.boxes) + 1)]
    assert sorted(of_found) == list(range(1, instances.max() + 1))
    assert found.class_scores.argmax(1).tolist() == truth.labels[0].numpy()[np.array(of_found) - 1].tolist()
    assert found.nucleus_score.min() > 0.99
    assert len(empty.boxes) == 0


def test_small_nuclei_are_dropped():
    system, (images, truth) = build(min_area=300), planted(128)
    system.network = Planted(truth)
    areas = np.bincount(truth.instances[0].flatten())[1:]
    assert len(system.segment(images)[0].boxes) == pytest.approx((areas >= 300).sum(), abs=1)


@torch.no_grad()
@pytest.mark.parametrize(("size", "pixels"), [("small", 50), ("paper", 36)])
def test_outputs_have_the_size_of_the_image_and_see_its_finest_levels(size, pixels):
    network, images = build(size).eval().network, torch.rand(1, 3, pixels, pixels)
    outputs = network(images)
    assert [output.shape for output in outputs] == [(1, channels, pixels, pixels) for channels in (2, 2, 4)]
    for block in (block for blocks in network.branches for block in blocks[:-1]):
        block.register_forward_hook(lambda _, __, output: output * 0)  # all but the shortcut from the finest level
    assert all(float(output.std(dim=(2, 3)).min()) > 1e-4 for output in network(images))


def test_a_frozen_encoder_normalises_by_the_batch():
    system, (images, truth) = build(), planted()
    encoder = system.get_submodule(system.encoder).eval().requires_grad_(False)
    statistics = [value.clone() for value in encoder.buffers()]
    system.losses(images, truth)
    assert not any(torch.equal(*pair) for pair in zip(statistics, encoder.buffers(), strict=True))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return {name: value for name, value in resnet50().state_dict().items() if "num_batches" not in name}


@pytest.fixture(scope="module")
def system():
    return build("paper")


def test_every_tensor_goes_where_monai_puts_it(weights, system, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.rand(value.shape, generator=generator) for name, value in weights.items()}
    torch.save(weights, tmp_path / "resnet50.pth")
    kept = system.load_pretrained(tmp_path / "resnet50.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hovernet, "download_url", lambda *_, **__: None)
    expected = hovernet._remap_standard_resnet_model("any")
    first = {"conv0": "0.0", "res_blocks.d0": "0.1", "res_blocks.d1": "1", "res_blocks.d2": "2", "res_blocks.d3": "3"}
    encoder, compared = system.network.encoder.state_dict(), 0
    for name, tensor in expected.items():
        for old, new in first.items():
            if name.startswith(f"{old}.") and (own := new + name.removeprefix(old)) in encoder:
                assert torch.equal(encoder[own], tensor), name
                compared += 1
    assert compared == len([name for name in encoder if not name.endswith("num_batches_tracked")])
    assert set(kept) == {name for name in system.state_dict() if not name.startswith("network.encoder.")}


def test_other_files_are_refused(weights, system, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": 1}, path)
    with pytest.raises(InputError, match=r"got keys \['model'\], expected torchvision's weights of a ResNet-50"):
        system.load_pretrained(path)
    torch.save(resnet18().state_dict(), path)
    with pytest.raises(InputError, match="expected torchvision's weights of a ResNet-50"):
        system.load_pretrained(path)
    torch.save({name: value for name, value in weights.items() if name != "layer3.2.bn1.weight"}, path)
    with pytest.raises(InputError, match="1 tensors differ"):
        system.load_pretrained(path)
    torch.save(weights | {"layer4.0.downsample.1.running_var": torch.full((2048,), torch.nan)}, path)
    with pytest.raises(InputError, match="not finite"):
        system.load_pretrained(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="is it complete"):
        system.load_pretrained(path)


def test_the_small_one_has_no_weights(tmp_path):
    with pytest.raises(ConfigError, match="size small, which has no weights; set `initial: none`"):
        build().load_pretrained(tmp_path / "any.pth")
