"""Mask R-CNN (He et al. 2017): torchvision's `maskrcnn_resnet50_fpn`, with its losses, set up for nuclei.

What differs from torchvision's defaults, which are made for photographs of 800 px:

- Patches are enlarged twofold, not to 800 px: nuclei of 8 to 60 px then span 4 to 30 px of the finest maps, and a step
  takes 1.8 times the time and 1.4 times the memory of patches as they are (256 px, one CPU thread). Anchors are half as
  large, 16 to 256 enlarged px; they keep their three shapes, so that COCO weights fit.
- A proposal is one nucleus. Its score is the sum of the class probabilities: a nucleus between two classes is still a
  nucleus. Its class scores are their shares in that sum. torchvision makes a detection of each class of a proposal and
  lets those of different classes stand side by side.
- Masks do not overlap: a pixel of several nuclei belongs to the one of the highest score.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms

from celldetr.config.segmentation import SystemSettings
from celldetr.model.backbone import group_norm
from celldetr.model.imports import IMAGENET_MEAN, IMAGENET_STD
from celldetr.model.weights import load_exactly, read_checkpoint
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.segmentation.system import SegmentedNuclei, System, Truth

_ASPECTS = (0.5, 1.0, 2.0)
_DIVISIBLE = 32  # px; enlarged images are padded to a multiple
_EPS = 1e-5
_COCO_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0."),
]
"""Names of torchvision's file of COCO weights, and those of its module today."""
_CLASS_HEADS: tuple[str, ...] = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
_ALL_BUT_BODY = ("backbone.fpn.", "rpn.", "roi_heads.")


class Detections(NamedTuple):
    """The n nuclei that the boxes of one image show, in falling order of their scores."""

    boxes: Tensor
    """(n, 4) xyxy px of the enlarged image."""
    score: Tensor
    """(n,) in [0, 1]."""
    classes: Tensor
    """(n, K): shares of the classes, which sum to 1."""


class MaskRCNN(System):
    """Mask R-CNN with a ResNet-50 and feature pyramid, or with a few narrow layers (size small)."""

    encoder = "backbone.body"
    backbone: Any  # torchvision has no types
    rpn: Any
    roi_heads: Any
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        small = settings.segmentation.size == "small"
        self.enlarged = 1 if small else 2
        built = (_small if small else _paper)(1 + len(settings.classes))
        self.backbone, self.rpn, self.roi_heads = built.backbone, built.rpn, built.roi_heads
        for name, value in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def losses(self, images: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Losses of torchvision, unweighted: objectness and box of proposals; class, box and mask of nuclei."""
        prepared, features = self._look(images)
        targets = box_targets(truth, self.enlarged)
        with _float32(images):
            proposals, of_proposals = self.rpn(prepared, features, targets)
            _, of_nuclei = self.roi_heads(features, proposals, prepared.image_sizes, targets)
        return {name.removeprefix("loss_"): loss for name, loss in (of_proposals | of_nuclei).items()}

    def segment(self, images: Tensor) -> list[SegmentedNuclei]:
        """Nuclei above the score threshold, at most `max_detections`, one where their boxes overlap by half."""
        prepared, features = self._look(images)
        with _float32(images):
            return self._nuclei(prepared, features, images.shape[-1])

    def _nuclei(self, prepared: ImageList, features: dict[str, Tensor], side: int) -> list[SegmentedNuclei]:
        """Nuclei of the maps of images whose side is `side` px before they were enlarged."""
        heads, sizes = self.roi_heads, prepared.image_sizes
        proposals, _ = self.rpn(prepared, features)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, sizes)))
        counts = [len(boxes) for boxes in proposals]
        boxes = heads.box_coder.decode(deltas, proposals).split(counts)
        probabilities = logits.softmax(dim=-1).split(counts)
        recipe = self.settings.segmentation
        found = [
            nuclei_of_proposals(clip_boxes_to_image(each, size), of_classes, recipe.score_threshold, heads.nms_thresh)
            for each, of_classes, size in zip(boxes, probabilities, sizes, strict=True)
        ]
        found = [Detections(*(values[: recipe.max_detections] for values in nuclei)) for nuclei in found]
        pooled = heads.mask_roi_pool(features, [nuclei.boxes for nuclei in found], sizes)
        masks = heads.mask_predictor(heads.mask_head(pooled)).sigmoid()
        best = torch.cat([nuclei.classes.argmax(dim=1) for nuclei in found])
        masks = masks[torch.arange(len(best), device=best.device), 1 + best]
        return [
            paint(nuclei, of_image, side, self.enlarged, recipe.min_area)
            for nuclei, of_image in zip(found, masks.split([len(nuclei.boxes) for nuclei in found]), strict=True)
        ]

    def _look(self, images: Tensor) -> tuple[ImageList, dict[str, Tensor]]:
        """Enlarged, normalised and padded images, and their maps in float32."""
        images = (images - self.image_mean) / self.image_std
        if self.enlarged > 1:
            images = F.interpolate(images, scale_factor=self.enlarged, mode="bilinear", align_corners=False)
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % _DIVISIBLE, 0, -height % _DIVISIBLE))
        features = {name: maps.float() for name, maps in self.backbone(images).items()}
        return ImageList(images, [(height, width)] * len(images)), features

    def load_pretrained(self, path: Path) -> list[str]:
        """Take over torchvision's COCO weights without their 91 classes, or its ResNet-50 trained on ImageNet.

        Either way the batch normalisation of the ResNet keeps the file's statistics from then on.

        Raises
        ------
        ConfigError
            Size small has no pretrained weights.
        InputError
            Another file.
        """
        if self.settings.segmentation.size == "small":
            raise ConfigError(f"got {path} for mask_rcnn of size small, which has no weights; set `initial: none`")
        content, fresh = read_checkpoint(path), _CLASS_HEADS
        if "backbone.body.conv1.weight" in content:
            given = _coco(content)
        elif "conv1.weight" in content:
            given = {f"{self.encoder}.{name}": tensor for name, tensor in content.items() if not name.startswith("fc.")}
            fresh = _ALL_BUT_BODY
        else:
            raise InputError(
                f"{path}: got keys {sorted(map(str, content))[:4]}, expected weights of torchvision: of its Mask R-CNN "
                "(maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth) or of a ResNet-50 (resnet50-0676ba61.pth)"
            )
        own = self.state_dict()
        given = {name: tensor for name, tensor in given.items() if not name.endswith(".num_batches_tracked")}
        given |= {name: torch.tensor(True) for name in own if name.endswith(".fixed")}
        kept = [name for name in own if name.startswith(fresh)]
        load_exactly(self, given | {name: own[name] for name in kept}, path)
        return kept


def _float32(images: Tensor) -> torch.autocast:
    """Compute in float32, also in training with bfloat16, whose 8 digits place a box to 2 px only."""
    return torch.autocast(images.device.type, enabled=False)


def _coco(content: Mapping[str, Any]) -> dict[str, Any]:
    """COCO weights under the names of today, without the heads of its classes."""
    given = {}
    for name, tensor in content.items():
        for pattern, replacement in _COCO_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".running_var"):
            tensor = tensor - _EPS  # it was trained with an epsilon of 0
        if not name.startswith(_CLASS_HEADS):
            given[name] = tensor
    return given


class _BodyNorm(nn.Module):
    """Batch norm without scale and shift to learn; `fixed` by pretrained weights, it keeps their statistics."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    fixed: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("fixed", torch.tensor(False))

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, unless the statistics are fixed."""
        return super().train(mode and not self.fixed)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps (B, channels, h, w)."""
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=self.training, eps=_EPS)


def _anchors(*sizes: int) -> AnchorGenerator:
    """One size (px) for each level of the pyramid."""
    return AnchorGenerator(tuple((size,) for size in sizes), (_ASPECTS,) * len(sizes))


def _paper(outputs: int) -> nn.Module:
    levels = {f"layer{level}": str(level - 1) for level in range(1, 5)}
    body = resnet50(weights=None, norm_layer=_BodyNorm)
    backbone = BackboneWithFPN(body, levels, [256, 512, 1024, 2048], 256)
    anchors = _anchors(16, 32, 64, 128, 256)
    built: nn.Module = TorchvisionMaskRCNN(
        backbone, outputs, rpn_anchor_generator=anchors, rpn_post_nms_top_n_train=1000
    )
    return built


def _small(outputs: int) -> nn.Module:
    """Build maps that are 4 and 8 px apart, of 32 channels, with few proposals."""
    body = nn.Sequential()
    for name, inputs, width, stride in (("stem", 3, 16, 2), ("layer1", 16, 32, 2), ("layer2", 32, 64, 2)):
        body.add_module(name, nn.Sequential(*_layer(inputs, width, stride), *_layer(width, width, 1)))
    maps = {"layer1": "0", "layer2": "1"}
    built: nn.Module = TorchvisionMaskRCNN(
        BackboneWithFPN(body, maps, [32, 64], 32),
        rpn_anchor_generator=_anchors(12, 24, 48),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
        rpn_batch_size_per_image=128,
        box_roi_pool=MultiScaleRoIAlign([*maps.values()], output_size=7, sampling_ratio=1),
        box_head=TwoMLPHead(32 * 7 * 7, 128),
        box_predictor=FastRCNNPredictor(128, outputs),
        box_batch_size_per_image=64,
        mask_roi_pool=MultiScaleRoIAlign([*maps.values()], output_size=14, sampling_ratio=1),
        mask_head=MaskRCNNHeads(32, (32, 32), 1),
        mask_predictor=MaskRCNNPredictor(32, 32, outputs),
    )
    return built


def _layer(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), group_norm(outputs), nn.ReLU(inplace=True)


def box_targets(truth: Truth, enlarged: int) -> list[dict[str, Tensor]]:
    """Return what torchvision trains on: of each image boxes (n, 4), labels (n,) from 1, masks (n, S', S') uint8.

    S' is the side of the enlarged image. Boxes are those of the masks, xyxy px, half-open. Nuclei without a pixel are
    left out. 300 masks of 512 px take 79 MB, and 315 MB as numbers while the loss of the image is computed.
    """
    return [_box_targets(*image, enlarged) for image in zip(truth.instances, truth.labels, strict=True)]


def _box_targets(instances: Tensor, labels: Tensor, enlarged: int) -> dict[str, Tensor]:
    area = torch.bincount(instances.flatten(), minlength=1 + len(labels))
    present = area[1:].nonzero()[:, 0]
    large = instances.repeat_interleave(enlarged, 0).repeat_interleave(enlarged, 1)
    masks = large == 1 + present[:, None, None]
    columns, rows = masks.any(dim=1).int(), masks.any(dim=2).int()
    low = [along.argmax(dim=1) for along in (columns, rows)]
    high = [along.shape[1] - along.flip(1).argmax(dim=1) for along in (columns, rows)]
    boxes = torch.stack([*low, *high], dim=1).float()
    return {"boxes": boxes, "labels": 1 + labels[present], "masks": masks.byte()}


def nuclei_of_proposals(boxes: Tensor, probabilities: Tensor, threshold: float, overlap: float) -> Detections:
    """Nuclei of one image; of those whose boxes overlap more, whatever their classes, the one of the highest score.

    Parameters
    ----------
    boxes
        (P, 1 + K, 4) xyxy px: of each proposal, as the background (unused) and as a nucleus of each class.
    probabilities
        (P, 1 + K), of the background and the classes.
    threshold
        Least score of a nucleus.
    overlap
        Largest intersection over union of two boxes.
    """
    classes = probabilities[:, 1:]
    score, best = classes.sum(dim=1), classes.argmax(dim=1)
    box = boxes[torch.arange(len(boxes), device=boxes.device), 1 + best]
    candidate = ((score >= threshold) & (box[:, 2:] > box[:, :2]).all(dim=1)).nonzero()[:, 0]
    kept = candidate[nms(box[candidate], score[candidate], overlap)]
    shares = classes[kept] / score[kept, None].clamp(min=torch.finfo(score.dtype).tiny)
    return Detections(box[kept], score[kept], shares)


def paint(nuclei: Detections, masks: Tensor, side: int, enlarged: int, min_area: int) -> SegmentedNuclei:
    """Paint masks into an image of `side` px, the highest score uppermost; what has fewer px than `min_area` is lost.

    `masks` (n, m, m) are the probabilities of being nucleus in the boxes.
    """
    boxes, masks = nuclei.boxes.cpu(), masks.cpu()
    instances = np.zeros((side, side), dtype=np.int32)
    for index in reversed(range(len(boxes))):
        place, probability = paste(masks[index], boxes[index], side, enlarged)
        instances[place][probability.numpy() > 0.5] = 1 + index
    area = np.bincount(instances.ravel(), minlength=1 + len(boxes))[1:]
    kept = np.flatnonzero(area >= max(min_area, 1))
    found = ndimage.find_objects(instances)
    places = [found[index] for index in kept]
    return SegmentedNuclei(
        boxes=np.array([(x.start, y.start, x.stop, y.stop) for y, x in places], dtype=np.float32).reshape(-1, 4),
        masks=[instances[place] == 1 + index for index, place in zip(kept, places, strict=True)],
        nucleus_score=nuclei.score.cpu().numpy()[kept],
        class_scores=nuclei.classes.cpu().numpy()[kept],
    )


def paste(mask: Tensor, box: Tensor, side: int, enlarged: int) -> tuple[tuple[slice, slice], Tensor]:
    """Sample a mask (m, m) of a box (4,) at the centres of the pixels in it; returns their place in the image, too.

    As in the targets of torchvision's mask loss, the mask is half an enlarged px before its box. (torchvision's own
    `paste_masks_in_image` makes masks of less than 14 px larger by 2 px.)
    """
    axes, place = [], []
    for low, high in ((box[0].item(), box[2].item()), (box[1].item(), box[3].item())):
        first, last = (min(max(math.ceil(edge / enlarged - 0.5), 0), side) for edge in (low, high))
        place.append(slice(first, last))
        at = (torch.arange(first, last) + 0.5) * enlarged - 0.5
        axes.append(2 * (at - low) / (high - low) - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)
    if not grid.numel():
        return (place[1], place[0]), grid[..., 0]
    values = F.grid_sample(mask[None, None], grid[None], padding_mode="border", align_corners=False)
    return (place[1], place[0]), values[0, 0]
