"""The paper's model at full size: inference and a training step, fast against plain `grid_sample` form of the sampling.

Usage: python tests/benchmarks/bench_model.py [--repeats N] [--modes MODE ...]. One thread, one patch of 256 px, random
weights with spread offsets; the forms in turn in one process; medians. A training step is forward, matching, losses,
backward and AdamW with 30 nuclei.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.experiment import LossSettings, ModelSettings, RepresentationSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.deformable_attention import DeformableAttention
from celldetr.model.sampling import choose
from celldetr.training.data import Targets
from celldetr.training.losses import class_loss, detection_losses, weighted
from celldetr.training.matching import match

NUCLEI = 30


def build(mode: str) -> CellDETR:
    """Model of the paper whose sampling points are spread as after training."""
    torch.manual_seed(0)
    tokens = RepresentationSettings(global_tokens=50 if mode == "parallel" else 0)
    model = CellDETR(ModelSettings(mode=mode, classes=PANNUKE_CLASSES, representation=tokens))
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            torch.nn.init.normal_(module.sampling_offsets.weight, std=0.03)
    return model


def use(model: CellDETR, form: str) -> None:
    """Let every attention of a model sample by a form: reference, fast or compiled."""
    sample = choose("cpu", fast=form != "reference", compiled=form == "compiled").function
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.sample = sample


def inference(model: CellDETR, images: torch.Tensor, threshold: float) -> float:
    """Wall seconds of predicting one patch, with about 30 detections."""
    start = time.perf_counter()
    model.predict(images, threshold)
    return time.perf_counter() - start


def training_step(model: CellDETR, images: torch.Tensor, targets: Targets, optimiser: torch.optim.Optimizer) -> float:
    """Wall seconds of one step."""
    start = time.perf_counter()
    weights, mode = LossSettings(), model.settings.mode
    features = model.encode(images)
    logits, boxes = model.detect(features)
    matches = match(logits.detach(), boxes.detach(), targets, weights)
    losses = detection_losses(logits, boxes, targets, matches, NUCLEI)
    if mode == "sequential":
        last = matches.last(NUCLEI)
        classes = model.classify(model.represent(features, boxes[-1])[last.image, last.query])
        losses["classes"] = class_loss(classes, targets.labels[last.image, last.box], NUCLEI)
    elif mode == "parallel":
        classes = model.classify(model.represent(features, targets.boxes, targets.valid))
        losses["classes"] = class_loss(classes, targets.labels, NUCLEI)
    optimiser.zero_grad()
    weighted(losses, weights).backward()
    optimiser.step()
    return time.perf_counter() - start


def measure(mode: str, forms: list[str], repeats: int) -> None:
    """Print seconds per patch of the plain form, and how many times faster the others are."""
    model, images = build(mode), torch.rand(1, 3, 256, 256)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    centres = torch.rand(1, NUCLEI, 2) * 0.8 + 0.1
    boxes = torch.cat((centres, torch.full((1, NUCLEI, 2), 0.1)), dim=-1)
    targets = Targets(boxes, torch.randint(0, 5, (1, NUCLEI)), torch.tensor([NUCLEI]))
    found = model.predict(images, 0.0)[0].nucleus_score.sort(descending=True).values
    threshold = float(found[NUCLEI])
    for name in ("inference", "training step"):
        times: dict[str, list[float]] = {form: [] for form in forms}
        for repeat in range(repeats + 1):
            for form in forms:
                use(model, form)
                step = name == "training step"
                model.train(step)
                wall = training_step(model, images, targets, optimiser) if step else inference(model, images, threshold)
                if repeat:  # the first round warms up (and compiles)
                    times[form].append(wall)
        plain = times.pop("reference")
        line = f"{mode:12}{name:15} plain {statistics.median(plain):6.2f} s"
        for form, walls in times.items():
            ratio = statistics.median(a / b for a, b in zip(plain, walls, strict=True))
            line += f"   {form} {statistics.median(walls):6.2f} s = {ratio:.2f}x"
        print(line, flush=True)


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["sequential", "parallel", "baseline"])
    told = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if (
        len(told.modes) > 1
    ):  # a process each: training leaves a heap in which the plain form is faster than in a new one
        for mode in told.modes:
            subprocess.run([sys.executable, __file__, "--repeats", str(told.repeats), "--modes", mode], check=True)
        return
    compiler = shutil.which("gcc") or shutil.which("clang")
    print(f"torch {torch.__version__}, one thread, one patch; compiler: {'yes' if compiler else 'none'}")
    measure(told.modes[0], ["reference", "fast", *(["compiled"] if compiler else [])], told.repeats)


if __name__ == "__main__":
    main()
