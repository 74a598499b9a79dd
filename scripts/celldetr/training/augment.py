"""Augmentation in batches on the device; boxes follow the image.

All random numbers of a step are drawn for the global batch, and each process takes those of its images: any number of
processes sees the same images. Order: elastic deformation, flips, blur, colour jitter, stain jitter.
"""

from typing import NamedTuple

import numpy as np
import torch
from kornia import enhance, filters
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from celldetr.config.experiment import AugmentationSettings
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.device import cached_tensor
from celldetr.slides.stains import STAINS, UNMIXING
from celldetr.training.data import AUGMENTATION, Targets, random_stream

ELASTIC_NODES = 7
"""Nodes per side of the grid of displacements; those on the border do not move, so that nothing leaves the image."""
ELASTIC_SHIFT = 0.02
"""Largest displacement of a node, as a fraction of the image's side; folds would need more than 0.1."""
_ELLIPSE_POINTS = 16
_INVERSE_STEPS = 6

_STAINS, _UNMIXING = (tuple(map(tuple, table.tolist())) for table in (STAINS, UNMIXING))


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


def augment(images: Tensor, targets: Targets, draws: Draws, settings: AugmentationSettings) -> tuple[Tensor, Targets]:
    """Augment images (B, 3, S, S) float in [0, 1] and the boxes of their nuclei, of which none is dropped.

    `draws` are the random numbers of these B images; of `settings` only the size of the blur kernel is used.
    """
    images, boxes = _elastic(images, targets.boxes, draws)
    images, boxes = _flip(images, boxes, draws)
    for chosen, change in ((draws.blur, _blur), (draws.jitter, _jitter), (draws.hed, _stain_jitter)):
        index = np.flatnonzero(chosen)
        if len(index):
            rows = _device(index, images)
            images = images.index_copy(0, rows, change(images[rows], draws, index, settings))
    return images, Targets(boxes, targets.labels, targets.counts)


def _device(values: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)


def _flip(images: Tensor, boxes: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    for flipped, dimension, coordinate in ((draws.flip_x, -1, 0), (draws.flip_y, -2, 1)):
        if flipped.any():
            chosen = _device(flipped, images)
            images = torch.where(chosen[:, None, None, None], images.flip(dimension), images)
            centre = boxes[..., coordinate]
            boxes = boxes.clone()
            boxes[..., coordinate] = torch.where(chosen[:, None], 1 - centre, centre)
    return images, boxes


def _elastic(images: Tensor, boxes: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    index = np.flatnonzero(draws.elastic)
    if not len(index):
        return images, boxes
    rows = _device(index, images)
    nodes = _device(draws.displacement[index], images)
    size = images.shape[-1]
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    pixels = torch.stack([x, y], dim=-1).reshape(1, -1, 2).expand(len(index), -1, -1)
    source = pixels + _displacement(nodes, pixels)
    grid = source.view(-1, size, size, 2) * 2 - 1
    warped = functional.grid_sample(images[rows], grid, padding_mode="border", align_corners=False)
    return images.index_copy(0, rows, warped), boxes.index_copy(0, rows, _warp_boxes(boxes[rows], nodes))


def _displacement(nodes: Tensor, points: Tensor) -> Tensor:
    """Displacement (B, n, 2) at points (B, n, 2) in [0, 1] of the image, by bicubic interpolation of the nodes."""
    field = functional.grid_sample(
        nodes, points.unsqueeze(1) * 2 - 1, mode="bicubic", padding_mode="border", align_corners=True
    )
    return field[:, :, 0].transpose(1, 2)


def _warp_boxes(boxes: Tensor, nodes: Tensor) -> Tensor:
    """Boxes (B, R, 4) in the deformed image.

    A nucleus is modelled as the ellipse in its box: the new box encloses 16 points of it, each moved by the inverse of
    the displacement (fixed-point iteration). Without deformation the box stays the same.
    """
    angle = torch.arange(_ELLIPSE_POINTS, device=boxes.device) * (2 * torch.pi / _ELLIPSE_POINTS)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    start = (boxes[:, :, None, :2] + 0.5 * boxes[:, :, None, 2:] * circle).flatten(1, 2)
    points = start
    for _ in range(_INVERSE_STEPS):
        points = start - _displacement(nodes, points)
    points = points.clamp(0, 1).unflatten(1, (boxes.shape[1], _ELLIPSE_POINTS))
    corners = torch.cat([points.amin(dim=2), points.amax(dim=2)], dim=-1)
    warped = xyxy_to_cxcywh(corners)
    least = boxes[..., 2:].clamp(max=1e-4)
    return torch.cat([warped[..., :2], torch.maximum(warped[..., 2:], least)], dim=-1)


def _blur(images: Tensor, draws: Draws, index: NDArray[np.int64], settings: AugmentationSettings) -> Tensor:
    sigma = torch.from_numpy(draws.sigma[index])  # on the CPU, where kornia checks it
    kernel = (settings.blur_kernel, settings.blur_kernel)
    blurred: Tensor = filters.gaussian_blur2d(images, kernel, sigma[:, None].expand(-1, 2))
    return blurred


def _jitter(images: Tensor, draws: Draws, index: NDArray[np.int64], settings: AugmentationSettings) -> Tensor:
    brightness, contrast, saturation, hue = _device(draws.colour[index], images).T
    images = enhance.adjust_brightness_accumulative(images, brightness)
    images = enhance.adjust_contrast_with_mean_subtraction(images, contrast)
    images = enhance.adjust_saturation_with_gray_subtraction(images, saturation)
    images = enhance.adjust_hue(images, hue * (2 * torch.pi))
    return images.clamp(0, 1)


def _stain_jitter(images: Tensor, draws: Draws, index: NDArray[np.int64], settings: AugmentationSettings) -> Tensor:
    stains, unmixing = (cached_tensor(table, images.device) for table in (_STAINS, _UNMIXING))
    density = -torch.log10(images.clamp(min=1 / 255))
    amounts = torch.einsum("bchw,cs->bshw", density, unmixing)
    factor, shift = _device(draws.stain[index], images).unbind(dim=1)
    changed = amounts[:, :2] * factor[..., None, None] + shift[..., None, None]
    amounts = torch.cat([changed, amounts[:, 2:]], dim=1)
    return torch.pow(10, -torch.einsum("bshw,sc->bchw", amounts, stains)).clamp(0, 1)
