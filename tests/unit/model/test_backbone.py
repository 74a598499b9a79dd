import copy

import pytest
import torch
from golden_weights import authors_shapes
from torch import nn

from celldetr.config.experiment import BackboneSettings
from celldetr.model.backbone import Backbone, FrozenBatchNorm, conv_norm, fold


def test_names_and_shapes_are_those_of_a_torchvision_resnet50():
    prefix = "detr.backbone.0.body."
    expected = {name.removeprefix(prefix): s for name, s in authors_shapes().items() if name.startswith(prefix)}
    assert {name: tuple(x.shape) for name, x in Backbone(BackboneSettings()).state_dict().items()} == expected


@pytest.mark.parametrize(("block", "stages"), [("bottleneck", (1, 2, 3, 4)), ("basic", (2, 3)), ("basic", (4,))])
def test_each_chosen_stage_has_its_stride_and_channels(block, stages):
    backbone = Backbone(BackboneSettings(block=block, layers=(1, 2, 1, 1), width=8, stages=stages, norm="group"))
    maps = backbone(torch.rand(2, 3, 64, 96))
    expansion = 4 if block == "bottleneck" else 1
    assert backbone.channels == [8 * 2 ** (stage - 1) * expansion for stage in stages]
    for stage, channels, x in zip(stages, backbone.channels, maps, strict=True):
        assert x.shape == (2, channels, 64 // 2 ** (stage + 1), 96 // 2 ** (stage + 1))
    assert not any(name.startswith(f"layer{max(stages) + 1}") for name, _ in backbone.named_modules())


def test_frozen_batch_norm_is_batch_norm_in_evaluation_and_is_never_trained():
    generator = torch.Generator().manual_seed(0)
    plain, frozen = nn.BatchNorm2d(6).eval(), FrozenBatchNorm(6)
    state = {name: torch.rand(6, generator=generator) + 0.1 for name in frozen.state_dict()}
    plain.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    frozen.load_state_dict(state)
    convolution = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 3, 9, 9, generator=generator)
    (layer,) = fold(nn.Sequential(convolution, frozen.train()))
    results = conv_norm(layer, x), plain(convolution(x))
    torch.testing.assert_close(*results)
    slopes = [torch.autograd.grad(result.square().sum(), convolution.weight)[0] for result in results]
    torch.testing.assert_close(*slopes)
    assert not list(frozen.parameters())
    assert torch.equal(frozen.running_mean, state["running_mean"])


@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
def test_every_convolution_has_the_norm_behind_it(norm):
    backbone = Backbone(BackboneSettings(layers=(2, 1, 1, 1), width=8, stages=(1, 2), norm=norm))
    names = {module: name for name, module in backbone.named_modules()}
    pairs = [(names[layer.convolution], names[layer.norm]) for layer in fold(backbone)]
    assert len(pairs) == 12
    for convolution, behind in pairs:
        assert behind == convolution.replace("conv", "bn").replace("downsample.0", "downsample.1")


def test_folded_norms_follow_new_values_types_and_copies():
    """Nothing that was computed from them may be kept."""
    torch.manual_seed(0)
    settings = BackboneSettings(block="basic", layers=(1, 1, 1, 1), width=8, stages=(1, 2))
    first, second, images = Backbone(settings), Backbone(settings), torch.rand(1, 3, 32, 32)
    for buffer in second.buffers():
        buffer.uniform_(0.5, 2)
    before, expected = first(images), second(images)
    copied = copy.deepcopy(first)
    first.load_state_dict(second.state_dict())
    assert all(map(torch.equal, first(images), expected))
    assert all(map(torch.equal, copied(images), before))
    doubled = first.double()(images.double())
    assert all(maps.dtype == torch.float64 for maps in doubled)
    for maps, single in zip(doubled, expected, strict=True):
        torch.testing.assert_close(maps.float(), single, rtol=1e-3, atol=1e-4)
