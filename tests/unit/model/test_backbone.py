import pytest
import torch
from golden_weights import authors_shapes
from torch import nn

from celldetr.config.experiment import BackboneSettings
from celldetr.model.backbone import Backbone, FrozenBatchNorm, conv_norm


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
    torch.testing.assert_close(conv_norm(convolution, frozen.train(), x), plain(convolution(x)))
    assert not list(frozen.parameters())
    assert torch.equal(frozen.running_mean, state["running_mean"])
