"""A segmentation system that learns in seconds with torch alone; it stands in for those of the baselines' packages."""

import numpy as np
import torch
from scipy import ndimage
from tiny_training import CLASSES, SIZE, write_store
from torch import nn
from torch.nn import functional

from celldetr.config.segmentation import SegmentationExperiment
from celldetr.segmentation.nuclei import nuclei_of_map
from celldetr.segmentation.system import System


class TinySystem(System):
    """Classifies pixels; touching nuclei are one."""

    encoder = "features"

    def __init__(self, settings):
        super().__init__(settings)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 1 + len(settings.classes), 1)
        self.tissue = nn.Linear(8, max(1, len(settings.tissues)))

    def losses(self, images, truth):
        features = self.features(images)
        tissues = functional.cross_entropy(self.tissue(features.mean((2, 3))), truth.tissues)
        return {"pixels": functional.cross_entropy(self.head(features), truth.classes), "tissues": 0.1 * tissues}

    def segment(self, images):
        found = []
        for scores in self.head(self.features(images)).softmax(1).cpu().numpy():
            nucleus = 1 - scores[0]
            found.append(nuclei_of_map(ndimage.label(nucleus > 0.5)[0], nucleus, scores[1:], 10))
        return found

    def load_pretrained(self, path):
        self.features.load_state_dict(torch.load(path))
        return [name for name in self.state_dict() if not name.startswith("features")]


def experiment_of(segmentation=None, **training):
    """Make an experiment whose system tests replace by `TinySystem`."""
    recipe = {"epochs": 6, "batch_size": 4, "lr": 0.03, "backbone_lr": 0.03, "warmup_steps": 0, "precision": "fp32"}
    recipe["augmentation"] = {"elastic": 0.5, "jitter": 0.0, "blur": 0.0}
    values = {"name": "tiny", "classes": list(CLASSES), "segmentation": {"system": "micro_net", **(segmentation or {})}}
    return SegmentationExperiment.from_dict({**values, "training": {**recipe, **training}})


def mapped_store(path, n_patches, seed=0, group="s"):
    """Write a store of round dark (class 0) and long red (class 1) nuclei with their instance maps; none touch."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:SIZE, :SIZE] + 0.5
    images = np.full((n_patches, SIZE, SIZE, 3), 225, np.uint8)
    maps, boxes, labels = np.zeros((n_patches, SIZE, SIZE), np.uint16), [], []
    for image, instances in zip(images, maps, strict=True):
        labels.append(rng.integers(2, size=rng.integers(0, 5)).astype(np.int8))
        corners = rng.permutation([(8, 8), (24, 8), (8, 24), (24, 24)]) + rng.uniform(-1, 1, (4, 2))
        for number, (label, centre) in enumerate(zip(labels[-1], corners, strict=False), start=1):
            half = (5.0, 5.0) if label == 0 else (3.0, 6.0)
            inside = ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 <= 1
            image[inside], instances[inside] = ((60, 30, 120) if label == 0 else (200, 60, 60)), number
        places = ndimage.find_objects(instances)
        boxes.append(np.array([(x.start, y.start, x.stop, y.stop) for y, x in places], np.float32).reshape(-1, 4))
    return write_store(path, images, boxes, labels, CLASSES, group, instances=maps)
