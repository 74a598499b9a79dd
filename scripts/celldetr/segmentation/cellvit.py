"""CellViT (Hoerst et al. 2024, Medical Image Analysis 94, 103143), with the encoder ViT-256 or that of SAM ViT-B.

Published runs on PanNuke (`logs_paper/PanNuke/CellViTHV` of the repository TIO-IKIM/CellViT): 130 epochs of batches of
16, the encoder frozen in the first 25, AdamW with learning rate 3e-4, betas 0.85 and 0.95, weight decay 1e-4; sampling
of patches by classes and tissues with 0.85; the last weights. Its settings name a decay of the learning rate of
0.85 per epoch, but the logs of all runs show 0.95: the code reads the setting at another place and takes its default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer_sam import checkpoint_filter_fn
from torch import Tensor

from celldetr.config.segmentation import SystemSettings
from celldetr.model.weights import load_exactly, read_checkpoint
from celldetr.runtime.errors import InputError
from celldetr.segmentation.cellvit_losses import cellvit_losses
from celldetr.segmentation.cellvit_network import CellViTNetwork, Maps
from celldetr.segmentation.hover import instances_of_maps
from celldetr.segmentation.nuclei import nuclei_of_map
from celldetr.segmentation.system import SegmentedNuclei, System, Truth


class CellViT(System):
    """A Vision Transformer with three decoders: nuclei, HoVer maps, classes; the tissue helps in training."""

    encoder = "network.encoder"

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        self.network = CellViTNetwork(settings.segmentation, len(settings.classes), len(settings.tissues))

    def losses(self, images: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Weighted losses; images (B, 3, S, S) in [0, 1], S a multiple of 16."""
        return cellvit_losses(self.maps(images), truth)

    def maps(self, images: Tensor) -> Maps:
        """Predict the maps of images (B, 3, S, S) in [0, 1]."""
        maps: Maps = self.network(2 * images - 1)  # mean and standard deviation 0.5, as published for both encoders
        return maps

    @torch.no_grad()
    def segment(self, images: Tensor) -> list[SegmentedNuclei]:
        """Nuclei of images (B, 3, S, S) in [0, 1]."""
        return nuclei_of_maps(self.maps(images), self.settings)

    def load_pretrained(self, path: Path) -> list[str]:
        """Take over the encoder; return the names of the tensors that keep their random values.

        cellvit_256: vit256_small_dino.pth of HIPT (the teacher; Apache 2.0 with Commons Clause; 704,238,867 bytes,
        sha256 6960cd5a8657dc8bb214671aa0c6dbd3f5b698e84386884955836487ddc89e24), from
        https://media.githubusercontent.com/media/mahmoodlab/HIPT/780fafaed2e5b112bc1ed6e78852af1fe6714342/HIPT_4K/Checkpoints/vit256_small_dino.pth

        cellvit_sam_b: sam_vit_b_01ec64.pth of Segment Anything (Apache 2.0; 375,042,383 bytes,
        sha256 ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912), from
        https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth
        """
        content = read_checkpoint(path)
        sam = self.settings.segmentation.system == "cellvit_sam_b"
        load_exactly(self.network.encoder.vit, _sam(content, path) if sam else _vit_256(content, path), path)
        return [name for name in self.state_dict() if not name.startswith(f"{self.encoder}.")]


def nuclei_of_maps(maps: Maps, settings: SystemSettings) -> list[SegmentedNuclei]:
    """Nuclei of the maps of each image."""
    min_area, mpp = settings.segmentation.min_area, settings.mpp
    nucleus = maps.nuclei.float().softmax(1)[:, 1].cpu().numpy()
    classes = maps.classes.float().softmax(1)[:, 1:].cpu().numpy()
    hover = maps.hover.float().cpu().numpy()
    return [
        nuclei_of_map(instances_of_maps(probability >= 0.5, of_image, mpp), probability, of_classes, min_area)
        for probability, of_image, of_classes in zip(nucleus, hover, classes, strict=True)
    ]


def _vit_256(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Weights of the teacher of DINO, without its head; it has them as [module.]backbone.*, beside [module.]head.*."""
    teacher = content.get("teacher")
    if not isinstance(teacher, Mapping):
        raise _unexpected(path, content, "vit256_small_dino.pth of HIPT (teacher)", "cellvit_256")
    names = {str(name).removeprefix("module."): tensor for name, tensor in teacher.items()}
    return {name.removeprefix("backbone."): tensor for name, tensor in names.items() if not name.startswith("head.")}


def _sam(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Weights of the image encoder of Segment Anything, under the names of timm."""
    if "image_encoder.patch_embed.proj.weight" not in content:
        raise _unexpected(path, content, "sam_vit_b_01ec64.pth of Segment Anything (image_encoder.*)", "cellvit_sam_b")
    weights: dict[str, Tensor] = checkpoint_filter_fn(content, None)
    return weights


def _unexpected(path: Path, content: Mapping[str, Any], expected: str, system: str) -> InputError:
    return InputError(f"{path}: got keys {sorted(map(str, content))[:8]}, expected {expected} for {system}")
