"""Images of planted nuclei for the systems that segment: dark discs on bright ground."""

import numpy as np
import torch

from celldetr.config.segmentation import SegmentationSettings, SystemSettings
from celldetr.segmentation.system import Truth


def system_settings(system, size="small", classes=("a", "b", "c"), **changes):
    """Return the settings of a system."""
    return SystemSettings(
        segmentation=SegmentationSettings(system=system, size=size, **changes), classes=classes, tissues=("x",)
    )


def discs(*circles, size=64):
    """Instance map (S, S) int64 of circles x, y, radius; a later one lies above an earlier one."""
    y, x = np.mgrid[:size, :size] + 0.5
    instances = np.zeros((size, size), dtype=np.int64)
    for index, (cx, cy, radius) in enumerate(circles):
        instances[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = 1 + index
    return instances


def planted(*maps, classes=3):
    """Images (B, 3, S, S) in [0, 1] and the truth of instance maps; classes take turns and have their colours."""
    instances = torch.from_numpy(np.stack(maps))
    most = max(1, int(instances.max()))
    labels = torch.arange(most).remainder(classes).repeat(len(maps), 1)
    labels[torch.arange(most) >= instances.amax(dim=(1, 2))[:, None]] = -1
    truth = Truth(instances, labels, torch.zeros(len(maps), dtype=torch.int64))
    colours = torch.tensor([[0.9, 0.8, 0.9], *([0.3 + 0.2 * k, 0.2, 0.6 - 0.2 * k] for k in range(classes))])
    return colours[truth.classes].permute(0, 3, 1, 2).contiguous(), truth


def check_nuclei(found, size, classes):
    """Check that the nuclei of an image are of the agreed form."""
    count = len(found.boxes)
    assert found.boxes.shape == (count, 4)
    assert found.class_scores.shape == (count, classes)
    assert found.nucleus_score.shape == (count,)
    assert len(found.masks) == count
    assert [values.dtype for values in (found.boxes, found.nucleus_score, found.class_scores)] == [np.float32] * 3
    for values in (found.nucleus_score, found.class_scores):
        assert ((values >= 0) & (values <= 1 + 1e-6)).all()
    painted = np.zeros((size, size), dtype=int)
    for (left, top, right, bottom), mask in zip(found.boxes.astype(int), found.masks, strict=True):
        assert mask.dtype == bool
        assert mask.shape == (bottom - top, right - left)
        assert all(line.any() for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1])), "the box is not of the mask"
        painted[top:bottom, left:right] += mask
    assert painted.max(initial=0) <= 1, "masks overlap"


def train_steps(system, images, truth, steps, lr=3e-3):
    """Train some steps on one batch; returns the sums of their losses."""
    optimizer = torch.optim.Adam(system.parameters(), lr=lr)
    sums = []
    for _ in range(steps):
        system.train()
        total = sum(system.losses(images, truth).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        sums.append(total.item())
    return sums
