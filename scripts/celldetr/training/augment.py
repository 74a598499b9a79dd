"""Augmentation of a batch: of the nuclei's boxes on the host, of the images on the device.

All random numbers of a step are drawn for the global batch, and each process takes those of its images: any number of
processes sees the same images. They reach the device as one table. Order: elastic deformation, flips, blur, colour
jitter, stain jitter.

A CPU computes each change for the images that drew it. Elsewhere every change is computed for all images and kept for
those that drew it: no shape depends on the random numbers, and `torch.compile` makes a few kernels of it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from celldetr.config.experiment import AugmentationSettings
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import float_images
from celldetr.model.device import constant_table, to_device
from celldetr.slides.stains import STAINS, UNMIXING
from celldetr.training.data import AUGMENTATION, Targets, random_stream

ELASTIC_NODES = 7
"""Nodes per side of the grid of displacements; those on the border do not move, so that nothing leaves the image."""
ELASTIC_SHIFT = 0.02
"""Largest displacement of a node, as a fraction of the image's side; folds would need more than 0.1."""
_ELLIPSE_POINTS = 16
_INVERSE_STEPS = 6
_TINY = 1e-12


class Draws(NamedTuple):
    """Random numbers of one step; the first dimension of each array is the image."""

    elastic: NDArray[np.bool_]  # whether the image gets it (B,), as the five after it
    flip_x: NDArray[np.bool_]
    flip_y: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    hed: NDArray[np.bool_]
    displacement: NDArray[np.float32]  # of the grid's nodes, x then y, as a fraction of the side (B, 2, 7, 7)
    sigma: NDArray[np.float32]  # standard deviation of the blur, px (B,)
    colour: NDArray[np.float32]  # factors of brightness, contrast, saturation; shift of the hue in turns (B, 4)
    stain: NDArray[np.float32]  # factors, then shifts, of hematoxylin and eosin (B, 2, 2)

    def of(self, rows: slice) -> "Draws":
        """Random numbers of some of the images."""
        return Draws._make(values[rows] for values in self)


def draw(settings: AugmentationSettings, seed: int, step: int, batch_size: int) -> Draws:
    """Draw the random numbers of a step for the whole global batch."""
    random = random_stream(seed, step, AUGMENTATION)
    chosen = random.random((6, batch_size))
    inner = random.uniform(-ELASTIC_SHIFT, ELASTIC_SHIFT, (batch_size, 2, ELASTIC_NODES - 2, ELASTIC_NODES - 2))
    spread = np.array([settings.brightness, settings.contrast, settings.saturation, settings.hue])
    low, high = settings.blur_sigma
    stain = np.array([settings.hed_alpha, settings.hed_beta])[:, None]
    return Draws(
        elastic=chosen[0] < settings.elastic,
        flip_x=chosen[1] < settings.flip,
        flip_y=chosen[2] < settings.flip,
        blur=chosen[3] < settings.blur,
        jitter=chosen[4] < settings.jitter,
        hed=chosen[5] < settings.hed,
        displacement=np.pad(inner, ((0, 0), (0, 0), (1, 1), (1, 1))).astype(np.float32),
        sigma=random.uniform(low, high, batch_size).astype(np.float32),
        colour=(random.uniform(-1, 1, (batch_size, 4)) * spread + [1, 1, 1, 0]).astype(np.float32),
        stain=(random.uniform(-1, 1, (batch_size, 2, 2)) * stain + [[1], [0]]).astype(np.float32),
    )


def augment_targets(targets: Targets, draws: Draws) -> Targets:
    """Move the boxes, on the host, as `augment_images` moves what is in the images; none is dropped."""
    boxes = targets.boxes.clone()
    if draws.elastic.any():
        rows = torch.from_numpy(np.flatnonzero(draws.elastic))
        boxes[rows] = _warp_boxes(boxes[rows], torch.from_numpy(draws.displacement)[rows])
    for flipped, coordinate in ((draws.flip_x, 0), (draws.flip_y, 1)):
        boxes[torch.from_numpy(flipped), :, coordinate] = 1 - boxes[torch.from_numpy(flipped), :, coordinate]
    return replace(targets, boxes=boxes)


def augment_images(pixels: Tensor, draws: Draws, settings: AugmentationSettings, *, compiled: bool = False) -> Tensor:
    """Turn images (B, S, S, 3) uint8 into augmented images (B, 3, S, S) float32 in [0, 1].

    `draws` are the random numbers of these B images. `compiled` is for other devices than a CPU.
    """
    kinds = tuple(kind for kind in CHANGES if getattr(settings, kind) > 0)
    table = to_device(torch.from_numpy(_table(draws, settings.blur_kernel)), pixels.device)
    if pixels.device.type == "cpu":
        return _change_drawn(pixels, table, draws, kinds)
    return (_compiled() if compiled else change_all)(pixels, table, kinds)


def augment_instances(instances: Tensor, draws: Draws) -> Tensor:
    """Move instance maps (B, S, S) int16 as `augment_images` moves what is in the images, pixel by pixel."""
    table = to_device(torch.from_numpy(_table(draws, 1)), instances.device)
    chosen = Numbers.of(table).chosen[:, :, None, None].unbind(1)
    for flipped, dimension in ((chosen[1], 2), (chosen[2], 1)):
        instances = torch.where(flipped, instances.flip(dimension), instances)
    if not draws.elastic.any():
        return instances
    grid = _grid(instances.shape[-1], Numbers.of(table))
    ids = instances.float()[:, None]  # exact up to 2^24
    warped = functional.grid_sample(ids, grid, mode="nearest", padding_mode="border", align_corners=False)
    return torch.where(chosen[0], warped[:, 0].to(instances.dtype), instances)


def _table(draws: Draws, blur_kernel: int) -> NDArray[np.float32]:
    """Random numbers of the images as a table (B, P); `Numbers` takes it apart."""
    nodes = draws.displacement.copy()  # images are flipped before they are deformed: the grids are mirrored
    for flipped, axis, component in ((draws.flip_x, 3, 0), (draws.flip_y, 2, 1)):
        nodes[flipped] = np.flip(nodes[flipped], axis)
        nodes[flipped, component] *= -1
    factors = np.ones((len(nodes), 3))  # the third stain stays as it is
    factors[:, :2] = draws.stain[:, 0]
    mixing = (UNMIXING * factors[:, None]) @ STAINS
    shift = -math.log(10) * draws.stain[:, 1] @ STAINS[:2]
    offsets = np.arange(blur_kernel) - blur_kernel // 2
    weights = np.exp(-0.5 * (offsets / draws.sigma[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    parts = (np.stack(draws[:6], axis=1), nodes, draws.colour, mixing, shift, weights)
    return np.concatenate([part.reshape(len(nodes), -1) for part in parts], axis=1, dtype=np.float32)


class Numbers(NamedTuple):
    """Random numbers of n images on the device."""

    chosen: Tensor  # whether the image is flipped in x and y, deformed, blurred, jittered in colour and stain (n, 6)
    nodes: Tensor  # displacement of the flipped image's nodes (n, 2, 7, 7)
    colour: Tensor  # as in `Draws` (n, 4)
    mixing: Tensor  # (n, 3, 3): logarithms of the colours before by those afterwards
    shift: Tensor  # of these logarithms (n, 3)
    weights: Tensor  # of the blur (n, K)

    @classmethod
    def of(cls, table: Tensor) -> "Numbers":
        """Take a table apart."""
        grid = 2 * ELASTIC_NODES**2
        chosen, nodes, colour, mixing, shift, weights = table.split([6, grid, 4, 9, 3, table.shape[1] - grid - 22], 1)
        nodes = nodes.unflatten(1, (2, ELASTIC_NODES, ELASTIC_NODES))
        return cls(chosen > 0, nodes, colour, mixing.unflatten(1, (3, 3)), shift, weights)


def _change_drawn(pixels: Tensor, table: Tensor, draws: Draws, kinds: tuple[str, ...]) -> Tensor:
    """Compute each change for the images that drew it."""
    pixels = pixels.clone()
    for flipped, dimension in ((draws.flip_x, 2), (draws.flip_y, 1)):
        rows = torch.from_numpy(np.flatnonzero(flipped))
        pixels[rows] = pixels[rows].flip(dimension)
    images = float_images(pixels)
    for kind in kinds:
        rows = torch.from_numpy(np.flatnonzero(getattr(draws, kind)))
        if len(rows):
            images[rows] = CHANGES[kind](images[rows], Numbers.of(table[rows]))
    return images


def change_all(pixels: Tensor, table: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Compute each change for all images."""
    numbers = Numbers.of(table)
    chosen = dict(zip(Draws._fields, numbers.chosen[:, :, None, None, None].unbind(1), strict=False))
    for flipped, dimension in (("flip_x", 2), ("flip_y", 1)):
        pixels = torch.where(chosen[flipped], pixels.flip(dimension), pixels)
    images = float_images(pixels)
    for kind in kinds:
        images = torch.where(chosen[kind], CHANGES[kind](images, numbers), images)
    return images.contiguous(memory_format=torch.channels_last)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(change_all, fullgraph=True, dynamic=False)


@constant_table
def _spline(size: int, device: torch.device) -> Tensor:
    """Weights (S, 7) float64 of the nodes at each pixel of a row, for bicubic interpolation."""
    nodes = torch.eye(ELASTIC_NODES, dtype=torch.float64).view(1, ELASTIC_NODES, 1, ELASTIC_NODES)
    pixels = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    points = torch.stack([pixels, torch.full_like(pixels, 0.5)], dim=-1).view(1, 1, size, 2)
    return _interpolate(nodes, points)[0, :, 0].T.contiguous().to(device, non_blocking=True)


def _interpolate(nodes: Tensor, points: Tensor) -> Tensor:
    """Bicubic interpolation (B, C, n, m) of nodes (B, C, h, w) at points (B, n, m, 2) in [0, 1] of the image."""
    return functional.grid_sample(nodes, points * 2 - 1, mode="bicubic", padding_mode="border", align_corners=True)


def _warp(images: Tensor, numbers: Numbers) -> Tensor:
    """Deform images, with bilinear interpolation."""
    grid = _grid(images.shape[-1], numbers)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _grid(size: int, numbers: Numbers) -> Tensor:
    """Points (n, S, S, 2) of the image at which each pixel of the deformed image looks, in [-1, 1].

    The displacements are a product in float64, which no GPU rounds to TF32.
    """
    spline = _spline(size, numbers.nodes.device)
    x, y = (spline @ numbers.nodes.double() @ spline.T).float().unbind(1)  # (n, S, S) each
    centres = (2 * torch.arange(size, device=x.device) + 1) / size - 1
    return torch.stack([centres + 2 * x, centres[:, None] + 2 * y], dim=-1)


def _warp_boxes(boxes: Tensor, nodes: Tensor) -> Tensor:
    """Boxes (B, R, 4) in the deformed image.

    A nucleus is modelled as the ellipse in its box: the new box encloses 16 points of it, each moved by the inverse of
    the displacement (fixed-point iteration). Without deformation the box stays the same.
    """
    angle = torch.arange(_ELLIPSE_POINTS) * (2 * torch.pi / _ELLIPSE_POINTS)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    start = boxes[:, :, None, :2] + 0.5 * boxes[:, :, None, 2:] * circle  # (B, R, 16, 2)
    points = start
    for _ in range(_INVERSE_STEPS):
        points = start - _interpolate(nodes, points).permute(0, 2, 3, 1)
    points = points.clamp(0, 1)
    warped = xyxy_to_cxcywh(torch.cat([points.amin(dim=2), points.amax(dim=2)], dim=-1))
    least = boxes[..., 2:].clamp(max=1e-4)
    return torch.cat([warped[..., :2], torch.maximum(warped[..., 2:], least)], dim=-1)


def _blur(images: Tensor, numbers: Numbers) -> Tensor:
    """Gaussian blur of rows, then of columns; beyond the border the image is mirrored."""
    size, weights = images.shape[-1], numbers.weights[..., None, None, None].unbind(1)
    radius = len(weights) // 2
    for dimension, padding in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        padded = functional.pad(images, padding, mode="reflect")
        images = padded.narrow(dimension, 0, size) * weights[0]
        for shift, weight in enumerate(weights[1:], start=1):
            images = torch.addcmul(images, padded.narrow(dimension, shift, size), weight)
    return images


def _jitter(images: Tensor, numbers: Numbers) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order."""
    brightness, contrast, saturation, hue = numbers.colour[..., None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    images = torch.lerp(_gray(images).mean(dim=(-2, -1), keepdim=True), images, contrast).clamp(0, 1)
    images = torch.lerp(_gray(images), images, saturation).clamp(0, 1)
    high, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    span = high - low
    of_green = torch.where(high == green, blue - red + 2 * span, red - green + 4 * span)
    sextant = torch.where(high == red, green - blue, of_green) / span.clamp(min=_TINY) + 6 * hue
    from_top = (sextant + torch.arange(5, 0, -2, device=images.device)[:, None, None]) % 6  # of each colour
    return high - span * torch.minimum(from_top, 4 - from_top).clamp(0, 1)


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _stain_jitter(images: Tensor, numbers: Numbers) -> Tensor:
    """Change the amounts of hematoxylin and eosin: a linear map of the logarithms of the colours."""
    logarithms = images.clamp(min=1 / 255).log()
    changed = numbers.shift[..., None, None]
    for colour, mixing in enumerate(numbers.mixing[..., None, None].unbind(1)):
        changed = torch.addcmul(changed, mixing, logarithms[:, colour : colour + 1])
    return changed.exp().clamp(0, 1)


CHANGES: dict[str, Callable[[Tensor, Numbers], Tensor]] = {
    "elastic": _warp,
    "blur": _blur,
    "jitter": _jitter,
    "hed": _stain_jitter,
}
"""Changes of images (n, 3, S, S) in their order, by their probability in the settings; also names in `Draws`."""
