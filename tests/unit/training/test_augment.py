"""Augmentation: boxes follow the image, and every process sees its share of the same images."""

import kornia
import numpy as np
import pytest
import torch
from torch._inductor import metrics
from torch.nn.functional import grid_sample
from torch.utils._python_dispatch import TorchDispatchMode

from celldetr.config.experiment import AugmentationSettings
from celldetr.model.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from celldetr.model.celldetr import float_images
from celldetr.slides.stains import STAINS, UNMIXING
from celldetr.training import augment as augmentation
from celldetr.training.augment import augment_images, augment_targets, draw
from celldetr.training.data import Targets

NONE = {"elastic": 0.0, "flip": 0.0, "blur": 0.0, "jitter": 0.0, "hed": 0.0}
SIZE = 96


class Operators(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def only(**chosen):
    return AugmentationSettings(**{**NONE, **chosen})


def augment(pixels, targets, draws, settings):
    """Augment images and their nuclei."""
    return augment_images(pixels, draws, settings), augment_targets(targets, draws)


def whole_batch(pixels, draws, settings, function=augmentation.change_all):
    """Augment images as a GPU does, every change for all images."""
    kinds = tuple(kind for kind in augmentation.CHANGES if getattr(settings, kind) > 0)
    return function(pixels, torch.from_numpy(augmentation._table(draws, settings.blur_kernel)), kinds)


def smooth(batch, size):
    """Smooth coloured noise (B, S, S, 3) uint8."""
    coarse = torch.rand(batch, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0)) * 255
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return fine.byte().permute(0, 2, 3, 1).contiguous()


def scene(batch=6, seed=0):
    """Ellipses of a value of their own on black, as pixels, with their boxes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    pixels = np.zeros((batch, SIZE, SIZE, 3), np.uint8)
    boxes = np.zeros((batch, 4, 4), np.float32)
    for image in range(batch):
        for slot, centre in enumerate(((24, 24), (72, 24), (24, 72), (72, 72))):
            at, half = centre + rng.uniform(-8, 8, 2), rng.uniform(5, 11, 2)
            inside = ((x - at[0]) / half[0]) ** 2 + ((y - at[1]) / half[1]) ** 2 <= 1
            pixels[image, inside] = 63 * (slot + 1)
            boxes[image, slot] = [*(at - half), *(at + half)]
    labels, counts, complete = torch.arange(4).expand(batch, 4), torch.full((batch,), 4), torch.arange(batch) % 2 == 0
    return torch.from_numpy(pixels), Targets(xyxy_to_cxcywh(torch.from_numpy(boxes) / SIZE), labels, counts, complete)


def seen_boxes(image):
    """Boxes of the connected bright regions."""
    from scipy.ndimage import find_objects, label

    regions = find_objects(label(image[0].numpy() > 0.12)[0])
    boxes = [[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in regions if s is not None]
    return torch.tensor(boxes, dtype=torch.float32) / SIZE


def iou(first, second):
    """Intersection over union of xyxy boxes (..., 4), one with one."""
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    first, second = ((boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second))
    return sides.prod(-1) / (first + second - sides.prod(-1))


@pytest.mark.parametrize("settings", [only(elastic=1.0), only(elastic=1.0, flip=0.5)])
def test_boxes_follow_what_is_in_the_image(settings):
    images, targets = scene(12)
    changed, moved = augment(images, targets, draw(settings, 0, 3, len(images)), settings)
    gain = []
    for image in range(len(images)):
        seen = seen_boxes(changed[image])
        assert len(seen) == 4
        stayed, best = (
            torch.stack([iou(box.expand_as(seen), seen).max() for box in cxcywh_to_xyxy(boxes)])
            for boxes in (targets.boxes[image], moved.boxes[image])
        )
        assert (best > 0.75).all(), best  # a pixel more or less of ten
        gain.append(float((best - stayed).mean()))
    assert np.mean(gain) > 0.03


def test_elastic_moves_pixels_as_its_nodes_say_and_flips_them_then():
    settings = only(elastic=1.0, flip=0.5)
    pixels, draws = smooth(12, SIZE), draw(settings, 0, 3, 12)
    centres = (torch.arange(SIZE) + 0.5) / SIZE
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).expand(12, -1, -1, -1)
    moves = {"mode": "bicubic", "padding_mode": "border", "align_corners": True}
    shift = grid_sample(torch.from_numpy(draws.displacement), 2 * points - 1, **moves).permute(0, 2, 3, 1)
    expected = grid_sample(float_images(pixels), 2 * (points + shift) - 1, padding_mode="border", align_corners=False)
    for flipped, dimension in ((draws.flip_x, -1), (draws.flip_y, -2)):
        expected[flipped] = expected[flipped].flip(dimension)
    assert torch.allclose(augment_images(pixels, draws, settings), expected, atol=1e-5)


def test_elastic_loses_no_nucleus_at_the_edge_and_keeps_sizes_positive():
    settings = only(elastic=1.0)
    corners = torch.tensor([[0, 0, 1, 1], [95, 95, 96, 96], [0, 40, 3, 50], [0, 0, 96, 96]], dtype=torch.float32)
    boxes = xyxy_to_cxcywh(corners / SIZE).expand(20, 4, 4).clone()
    counts, complete = torch.full((20,), 4), torch.ones(20, dtype=torch.bool)
    targets = Targets(boxes, torch.zeros(20, 4, dtype=torch.long), counts, complete)
    _, moved = augment(scene(20)[0], targets, draw(settings, 1, 1, 20), settings)
    ends = cxcywh_to_xyxy(moved.boxes)
    assert (moved.boxes[..., 2:] > 0).all()
    assert (ends > -1e-6).all()
    assert (ends < 1 + 1e-6).all()
    assert (iou(cxcywh_to_xyxy(boxes[:, 3]), ends[:, 3]) > 0.98).all()


def test_flips_move_pixels_and_boxes_exactly():
    settings = only(flip=0.5)
    images, targets = scene(16)
    draws = draw(settings, 0, 0, 16)
    changed, moved = augment(images, targets, draws, settings)
    assert 0 < draws.flip_x.sum() < 16
    for image in range(16):
        flips = [axis for axis, on in ((-1, draws.flip_x[image]), (-2, draws.flip_y[image])) if on]
        assert torch.equal(changed[image], float_images(images)[image].flip(flips))
        expected = targets.boxes[image].clone()
        for axis in flips:
            expected[:, -1 - axis] = 1 - expected[:, -1 - axis]
        assert torch.allclose(moved.boxes[image], expected)
    assert torch.equal(moved.labels, targets.labels)


@pytest.mark.parametrize("kind", ["blur", "jitter", "hed"])
def test_colour_changes_leave_boxes_alone_and_images_in_range(kind):
    settings = only(**{kind: 1.0}, hed_alpha=0.5, hed_beta=0.2)
    pixels, targets = smooth(4, 40), scene(4)[1]
    changed, moved = augment(pixels, targets, draw(settings, 0, 0, 4), settings)
    assert torch.equal(moved.boxes, targets.boxes)
    assert 0 <= float(changed.min()) < float(changed.max()) <= 1
    assert all(not torch.allclose(a, b) for a, b in zip(changed, float_images(pixels), strict=True))


def test_colour_changes_of_strength_zero_change_nothing():
    settings = only(jitter=1.0, hed=1.0, brightness=0, contrast=0, saturation=0, hue=0, hed_alpha=0, hed_beta=0)
    pixels = smooth(4, 24).clamp(min=1)
    changed = augment_images(pixels, draw(settings, 0, 0, 4), settings)
    assert torch.allclose(changed, float_images(pixels), atol=1e-6)


def kornias(images, draws, settings):
    """Blur and change of colours by kornia, stain jitter by its definition; images (B, 3, S, S) that drew all of it."""
    kernel, sigma = (settings.blur_kernel,) * 2, torch.from_numpy(draws.sigma)
    images = kornia.filters.gaussian_blur2d(images, kernel, sigma[:, None].expand(-1, 2))
    brightness, contrast, saturation, hue = torch.from_numpy(draws.colour).T
    images = kornia.enhance.adjust_brightness_accumulative(images, brightness)
    images = kornia.enhance.adjust_contrast_with_mean_subtraction(images, contrast)
    images = kornia.enhance.adjust_saturation_with_gray_subtraction(images, saturation)
    images = kornia.enhance.adjust_hue(images, hue * 2 * torch.pi).clamp(0, 1)
    stains, unmixing, stain = (torch.from_numpy(table).double() for table in (STAINS, UNMIXING, draws.stain))
    amounts = torch.einsum("bchw,cs->bshw", -images.double().clamp(min=1 / 255).log10(), unmixing)
    amounts[:, :2] = amounts[:, :2] * stain[:, 0, :, None, None] + stain[:, 1, :, None, None]
    return (10 ** -torch.einsum("bshw,sc->bchw", amounts, stains)).clamp(0, 1)


def test_colours_are_those_of_kornia_and_of_the_definition_of_stains():
    settings = only(blur=1.0, jitter=1.0, hed=1.0, hed_alpha=0.5, hed_beta=0.2, hue=0.5, brightness=0.5)
    pixels, draws = torch.randint(0, 256, (8, 40, 40, 3), dtype=torch.uint8), draw(settings, 0, 0, 8)
    pixels[0, :8] = torch.tensor([0, 255, 77], dtype=torch.uint8).view(3, 1)[torch.arange(8) % 3][:, None]  # grey
    expected = kornias(float_images(pixels), draws, settings)
    assert torch.allclose(augment_images(pixels, draws, settings), expected.float(), atol=1e-5)


def test_a_gpu_computes_for_all_images_what_a_cpu_computes_for_those_that_drew_it():
    """One graph; its operators bound what a GPU launches without `torch.compile`."""
    settings = AugmentationSettings(elastic=0.5, blur=0.5, jitter=0.5, hed=0.5)
    pixels, draws = smooth(8, 64), draw(settings, 3, 5, 8)
    assert all(0 < chosen.sum() < 8 for chosen in draws[:6])
    expected = augment_images(pixels, draws, settings)
    with Operators() as operators:
        assert torch.allclose(whole_batch(pixels, draws, settings), expected, atol=1e-5)
    assert operators.count <= 100
    with torch._dynamo.config.patch(error_on_recompile=True):
        one_graph = torch.compile(augmentation.change_all, backend="eager", fullgraph=True, dynamic=False)
        for step in range(3):
            draws = draw(settings, 3, step, 8)
            found = whole_batch(pixels, draws, settings, one_graph)
            assert torch.allclose(found, augment_images(pixels, draws, settings), atol=1e-5)


@pytest.mark.slow
def test_few_kernels_are_compiled():
    settings = AugmentationSettings(hed=0.2)
    metrics.reset()
    compiled = torch.compile(augmentation.change_all, fullgraph=True, dynamic=False)
    pixels, draws = smooth(4, 64), draw(settings, 0, 0, 4)
    found = whole_batch(pixels, draws, settings, compiled)
    assert torch.allclose(found, augment_images(pixels, draws, settings), atol=1e-4)
    assert metrics.generated_kernel_count <= 16


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_see_their_share_of_the_same_images(parts):
    settings = AugmentationSettings(elastic=0.5, blur=0.5, jitter=0.5, hed=0.5)
    images, targets = scene(8)
    draws = draw(settings, 7, 11, 8)
    whole, boxes = augment(images, targets, draws, settings)
    size = 8 // parts
    for part in range(parts):
        mine = slice(part * size, (part + 1) * size)
        cut = Targets(*(values[mine] for values in vars(targets).values()))
        some, moved = augment(images[mine], cut, draws.of(mine), settings)
        assert torch.allclose(some, whole[mine], atol=1e-6)
        assert torch.allclose(moved.boxes, boxes.boxes[mine], atol=1e-6)


def test_probabilities_are_those_of_the_settings():
    draws = draw(AugmentationSettings(elastic=0.2, flip=0.5, blur=0.0, jitter=1.0), 0, 0, 4000)
    shares = [getattr(draws, name).mean() for name in ("elastic", "flip_x", "flip_y", "blur", "jitter")]
    assert shares == pytest.approx([0.2, 0.5, 0.5, 0, 1], abs=0.03)
