"""Planted nuclei on a slide, and a model that finds them: what is dark, cut off at the edge of its tile."""

from types import SimpleNamespace

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from celldetr.cells.find import FindSettings, Slide, find_cells
from celldetr.cells.join import join_cells
from celldetr.cells.model import CellModel
from celldetr.cells.table import CellFile
from celldetr.model.boxes import xyxy_to_cxcywh
from celldetr.model.celldetr import Detections, Features

PINK, WHITE = (225, 170, 205), (245, 245, 245)
CLASSES = ("a", "b", "c")
_DARK = np.array([(20, 40, 120), (60, 40, 120), (100, 40, 120)])  # a colour for each class


def draw(width, height, seed=0):
    """Draw discs on pink; the image, their boxes (n, 4) and their classes (n,)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(22, width - 12, 22), np.arange(22, height - 12, 22)), -1)
    centres = grid.reshape(-1, 2) + rng.integers(-4, 5, (grid.size // 2, 2)) + 0.5
    image = np.full((height, width, 3), PINK, np.uint8)
    boxes, labels = [], rng.integers(0, 3, len(centres))
    for (x, y), label in zip(centres, labels, strict=True):
        r = int(rng.integers(3, 6))
        rows, columns = np.mgrid[int(y) - r : int(y) + r + 1, int(x) - r : int(x) + r + 1]
        inside = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= (r + 0.3) ** 2
        image[rows[inside], columns[inside]] = _DARK[label]
        boxes.append([columns[inside].min(), rows[inside].min(), columns[inside].max() + 1, rows[inside].max() + 1])
    return image, np.array(boxes, float), labels


class Planted(nn.Module):
    """Finds what is dark; class and embedding (4,) are the colours in a box, and the share of it that is dark."""

    def __init__(self):
        super().__init__()
        self.baseline, self.seen = False, []
        self.settings = SimpleNamespace(classes=CLASSES, d_model=4, mode="parallel")

    def encode(self, pixels):
        self.seen.extend((pixels.permute(0, 2, 3, 1) * 255).round().byte().numpy())
        return Features(pixels, ())

    def detect(self, features):
        found = []
        for image in features.memory.numpy():
            pieces, _ = ndimage.label(image[1] < 0.4, np.ones((3, 3)))
            spans = ndimage.find_objects(pieces)
            found.append(np.array([[x.start, y.start, x.stop, y.stop] for y, x in spans], np.float32).reshape(-1, 4))
        logits = torch.full((1, len(found), max(map(len, found)), 1), -torch.inf)
        boxes = torch.zeros(*logits.shape[:3], 4)
        for row, own in enumerate(found):
            logits[0, row, : len(own), 0] = torch.linspace(0.5, 1, len(own)).logit()
            boxes[0, row, : len(own)] = xyxy_to_cxcywh(torch.from_numpy(own)) / features.memory.shape[-1]
        return Detections(logits, boxes)

    def represent(self, features, boxes, valid):
        embeddings = torch.zeros(*boxes.shape[:2], 4)
        side = features.memory.shape[-1]
        for place in np.ndindex(*boxes.shape[:2]):
            if valid is None or valid[place]:
                x, y, width, height = (boxes[place] * side).tolist()
                rows, columns = (
                    slice(int(max(0, np.floor(c - s / 2 + 1e-3))), int(np.ceil(c + s / 2 - 1e-3)))
                    for c, s in ((y, height), (x, width))
                )
                inner = features.memory[place[0], :, rows, columns].flatten(1)
                dark = inner[1] < 0.4
                embeddings[place][:3] = inner[:, dark].mean(dim=1) if dark.any() else 0
                embeddings[place][3] = dark.float().mean()
        return embeddings

    def classify(self, embeddings):
        far = (embeddings[..., :1] * 255 - torch.from_numpy(_DARK[:, 0]).float()).abs()
        return 4 - far / 5


def find(path, out, *, net=None, size=64, mpp=1.0, margin_um=16.0, slide_mpp=1.0, **options):
    """Find the planted cells of a slide, batches of 4 tiles; some options are settings."""
    names = ("nucleus_threshold", "batch_size", "on_damage", "embeddings")
    defaults = {"nucleus_threshold": 0.4, "batch_size": 4}
    settings = FindSettings(margin_um, **defaults | {k: options.pop(k) for k in names if k in options})
    model = CellModel(net or Planted(), mpp, size, source={"file": "planted.pt", "trained_on": ["seen", "part@1a2b"]})
    group = options.pop("group", "")
    find_cells(Slide("s", path, slide_mpp, group), model, out, settings, **options)


def cells_of(path, folder, *, jobs=1, class_threshold=0.4, **options):
    """Find and join the planted cells of a slide: the open file."""
    folders = [folder / f"{number}" for number in range(1, jobs + 1)]
    for number, out in enumerate(folders, 1):
        find(path, out, job=(number, jobs), **options)
    join_cells(folders, folder / "cells.parquet", class_threshold=class_threshold)
    return CellFile(folder / "cells.parquet")


def boxes_of(cells):
    """Boxes (n, 4) of a file, px of level 0, in order of their corners."""
    frame = cells.frame()
    centre, half = frame[["x_um", "y_um"]].to_numpy(), frame[["width_um", "height_um"]].to_numpy() / 2
    boxes = np.concatenate([centre - half, centre + half], axis=1) / cells.info.mpp
    return in_order(boxes.round(4))  # the model says them as shares of a tile


def in_order(boxes):
    return boxes[np.lexsort(boxes.T[:2])]
