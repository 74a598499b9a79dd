"""HoVer maps: targets, the loss of their gradients, and the way back to nuclei."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.apps.pathology.losses import HoVerNetLoss
from monai.transforms import ComputeHoVerMaps
from numpy.random import default_rng
from planted_nuclei import agreement, touching_nuclei
from torch.nn import functional

from celldetr.segmentation.hover import gradient_loss, hover_maps, instances_of_maps


@given(st.integers(0, 1000))
def test_maps_are_those_of_monai(seed):
    random = default_rng(seed)
    images = random.choice([0, 0, 3, 4, 90], (3, 16, 16))
    images[0, 5], images[1, :, 5], images[2] = 7, 8, 0
    images[1, 2, 2] = 1
    maps = hover_maps(torch.from_numpy(images))
    expected = torch.stack([torch.Tensor(np.asarray(ComputeHoVerMaps()(image[None]))) for image in images])
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)


def test_maps_reach_from_minus_one_to_one_along_their_axis():
    image = touching_nuclei()
    horizontal, vertical = hover_maps(torch.from_numpy(image)[None])[0].numpy()
    for nucleus in np.unique(image)[1:]:
        y, x = np.nonzero(image == nucleus)
        for values, place in ((horizontal[y, x], x), (vertical[y, x], y)):
            assert (values.min(), values.max()) == (-1, 1)
            assert (np.diff(values[np.argsort(place, kind="stable")]) >= 0).all()
    assert not horizontal[image == 0].any()
    assert not vertical[image == 0].any()


def test_nuclei_come_back_from_their_maps():
    """Touching ones, and such that the border of the image cuts."""
    image = touching_nuclei()
    maps = hover_maps(torch.from_numpy(image)[None])[0].numpy()
    found = instances_of_maps(image > 0, maps, 0.25)
    assert len(np.unique(found)) == len(np.unique(image))
    assert agreement(image, found).min() > 0.9


def test_pixels_of_half_a_micrometre_give_the_same_nuclei():
    """As small as they are there, the kernels for 0.25 um would lose many of them."""
    image = np.ascontiguousarray(touching_nuclei(256)[::2, ::2])
    maps = hover_maps(torch.from_numpy(image)[None])[0].numpy()
    found = instances_of_maps(image > 0, maps, 0.5)
    assert found.shape == image.shape
    assert len(np.unique(found)) == len(np.unique(image))
    assert agreement(image, found).min() > 0.9
    assert (agreement(image, instances_of_maps(image > 0, maps, 0.25)) > 0.5).mean() < 0.8


@pytest.mark.parametrize(
    "damage",
    [
        lambda maps: maps[::-1],
        lambda maps: -maps,
        lambda maps: maps * np.float32([1, -1])[:, None, None],
        lambda maps: np.roll(maps, 8, axis=2),
        lambda maps: np.zeros_like(maps),
    ],
    ids=["swapped", "negated", "upside down", "moved", "empty"],
)
def test_nuclei_do_not_come_back_from_other_maps(damage):
    image = touching_nuclei()
    maps = hover_maps(torch.from_numpy(image)[None])[0].numpy()
    assert (agreement(image, instances_of_maps(image > 0, damage(maps), 0.25)) > 0.9).mean() < 0.7


def test_the_scale_of_maps_does_not_matter():
    image = touching_nuclei()
    maps = hover_maps(torch.from_numpy(image)[None])[0].numpy()
    np.testing.assert_array_equal(
        instances_of_maps(image > 0, maps * 0.25 + 1, 0.25), instances_of_maps(image > 0, maps, 0.25)
    )


@pytest.mark.parametrize("nuclear", [False, True])
def test_flat_maps_hold_no_nuclei(nuclear):
    assert not instances_of_maps(np.full((32, 32), nuclear), np.zeros((2, 32, 32), np.float32), 0.25).any()


def ramps(slope, size=24):
    """Give maps that rise along their axis, and a mask away from the border of the image."""
    steps = slope * torch.arange(float(size))
    inside = torch.zeros(1, size, size, dtype=torch.bool)
    inside[:, 5:15, 3:-3] = True
    return torch.stack([steps.expand(size, size), steps[:, None].expand(size, size)])[None], inside


def test_gradient_loss_of_a_slope_that_is_missed():
    maps, inside = ramps(0.1)
    assert float(gradient_loss(maps, torch.zeros_like(maps), inside)) == pytest.approx((12 * 0.1) ** 2, rel=1e-5)
    assert float(gradient_loss(maps.flip(1), torch.zeros_like(maps), inside)) == pytest.approx(0, abs=1e-6)
    assert float(gradient_loss(maps + 0.7, maps, inside)) == pytest.approx(0, abs=1e-6)


def test_gradient_loss_of_monai_is_144_times_smaller():
    maps, inside = ramps(0.1)
    one_hot = functional.one_hot(inside.long(), 2).movedim(-1, 1).float()
    of_monai = HoVerNetLoss(lambda_hv_mse=0, lambda_hv_mse_grad=1, lambda_np_ce=0, lambda_np_dice=0)(
        {"nucleus_prediction": one_hot, "horizontal_vertical": maps},
        {"nucleus_prediction": one_hot, "horizontal_vertical": torch.zeros_like(maps)},
    )
    assert float(gradient_loss(maps, torch.zeros_like(maps), inside)) == pytest.approx(144 * float(of_monai), rel=1e-4)


def test_gradient_loss_agrees_with_a_convolution():
    torch.manual_seed(0)
    maps, target, inside = torch.randn(2, 2, 20, 20), torch.randn(2, 2, 20, 20), torch.rand(2, 20, 20) < 0.5
    y, x = torch.meshgrid(torch.arange(-2.0, 3), torch.arange(-2.0, 3), indexing="ij")
    kernels = torch.stack([x, y]) / (x**2 + y**2).clamp(min=1)
    gradient = functional.conv2d(maps - target, kernels[:, None], padding=2, groups=2)
    expected = gradient.square()[inside[:, None].expand_as(gradient)].mean()
    torch.testing.assert_close(gradient_loss(maps, target, inside), expected)


def test_gradient_loss_without_nuclei_is_zero_and_trains_nothing():
    maps = torch.randn(1, 2, 16, 16, requires_grad=True)
    loss = gradient_loss(maps, torch.zeros(1, 2, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not maps.grad.any()
