"""A step of contrastive pretraining: a batch whose padding is filled with anchors, against one image at a time.

Usage: python tests/benchmarks/bench_ssl.py [--full] [--repeats N] [--images N] [--nuclei LOW HIGH] [--device D]. Random
images and boxes, the reduced model or (--full) that of the paper. Both ways see the same boxes: each image its nuclei
and as many anchors as fill the slots of the batch. A step is forward, matching, losses, backward and AdamW; one image
at a time, gradients are summed over the images before AdamW. The two ways take turns in one process; medians.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from celldetr.config.experiment import LossSettings, ModelSettings, NoiseSettings, RepresentationSettings
from celldetr.model.celldetr import CellDETR
from celldetr.training.contrastive import Views, contrastive_loss, make_views, project_views
from celldetr.training.data import Targets
from celldetr.training.losses import detection_losses, weighted
from celldetr.training.matching import match

SIZE = {True: 256, False: 128}
WEIGHTS = LossSettings(nucleus=1.0)


def build(full: bool) -> CellDETR:
    """Model of the paper, or the reduced one of the embedded example."""
    representation = RepresentationSettings(offset_init="spread", global_tokens=1)
    if full:
        return CellDETR(ModelSettings(mode="parallel", classes=(), projection=128, representation=representation))
    reduced = {
        "mode": "parallel",
        "classes": [],
        "projection": 32,
        "d_model": 64,
        "heads": 4,
        "ffn": 128,
        "dropout": 0.0,
        "encoder_layers": 1,
        "queries": 60,
        "backbone": {"block": "basic", "layers": [1, 1, 1, 1], "width": 16, "stages": [2, 3], "norm": "group"},
        "representation": {**representation.to_dict(), "layers": 2},
    }
    return CellDETR(ModelSettings.from_dict(reduced))


def draw(counts: list[int]) -> tuple[Targets, Views]:
    """Nuclei of each image at random places, and their views."""
    slots = max(counts)
    boxes = torch.cat((torch.rand(len(counts), slots, 2) * 0.8 + 0.1, torch.full((len(counts), slots, 2), 0.1)), dim=-1)
    targets = Targets(boxes, torch.full((len(counts), slots), -1), torch.tensor(counts))
    return targets, make_views(targets, torch.rand(len(counts), 2 * slots, 9), NoiseSettings(), once=False)


def loss_of(model: CellDETR, images: torch.Tensor, targets: Targets, views: Views, n_images: int) -> torch.Tensor:
    """Loss of some of the images of a batch of `n_images`, as their share of the mean."""
    features = model.encode(images)
    logits, boxes = model.detect(features)
    matches = match(logits.detach(), boxes.detach(), targets, WEIGHTS)
    losses = detection_losses(logits, boxes, targets, matches, float(targets.counts.sum()) * n_images / len(images))
    contrast = contrastive_loss(project_views(model, features, views), views, 0.1, "image") / n_images
    return weighted(losses, WEIGHTS) + contrast


def step(model, optimiser, images, targets, views, *, together: bool) -> float:
    """Wall seconds of one step."""
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    count = len(images)
    for part in [slice(0, count)] if together else [slice(k, k + 1) for k in range(count)]:
        own = Targets(targets.boxes[part], targets.labels[part], targets.counts[part])
        if not together:
            real = int(own.counts[0])
            own = Targets(own.boxes[:, :real], own.labels[:, :real], own.counts)
        loss_of(model, images[part], own, Views(*(values[part] for values in views)), count).backward()
    optimiser.step()
    optimiser.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--nuclei", type=int, nargs=2, default=(5, 45))
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    torch.manual_seed(0)
    if told.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    counts = torch.randint(told.nuclei[0], told.nuclei[1] + 1, (told.images,)).tolist()
    targets, views = draw(counts)
    model = build(told.full).to(told.device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    size = SIZE[told.full]
    images = torch.rand(told.images, 3, size, size, device=told.device)
    targets = Targets(targets.boxes.to(told.device), targets.labels.to(told.device), targets.counts)
    views = Views(*(values.to(told.device) for values in views))
    walls: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(told.repeats + 1):
        for together in (True, False):
            wall = step(model, optimiser, images, targets, views, together=together)
            if repeat:  # the first round warms up
                walls[together].append(wall)
    batch, single = (statistics.median(walls[key]) for key in (True, False))
    ratio = statistics.median(b / a for a, b in zip(walls[True], walls[False], strict=True))
    kind = "full" if told.full else "reduced"
    print(
        f"torch {torch.__version__}, {told.device}, {kind} model, {told.images} images of {size} px, "
        f"{sum(counts)} nuclei, {int(views.anchor.sum())} anchors"
    )
    print(
        f"padded batch {told.images / batch:.2f} images/s   one image at a time {told.images / single:.2f} images/s   "
        f"ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
