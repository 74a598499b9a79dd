"""What the two throughput benchmarks share: drawn patches, variants in turn, and what the device could do at most.

A ladder is a list of variants; each adds one improvement to those before it. All variants are measured in one process,
in rounds: a step (or batch) of each, then the next round. Ratios are medians of the rounds' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.experiment import Experiment
from celldetr.store import PatchStore, StoreWriter, open_store


@dataclass
class Variant:
    """One rung: what it adds, how to do one piece of work, and what was measured of it."""

    name: str
    work: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def options(description: str) -> argparse.ArgumentParser:
    """Options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--mode", default="sequential", choices=["baseline", "sequential", "parallel", "ssl", "st"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="px of a patch; default 256 on CUDA, 128 on a CPU")
    parser.add_argument("--batch", type=int, help="patches at once; default 16 on CUDA, 4 on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nuclei", type=int, default=24, help="mean number in a patch (PanNuke: 24)")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see whether the program runs")
    return parser


def experiment_of(args: argparse.Namespace) -> Experiment:
    """Give the paper's experiment of a stage."""
    mode = args.mode
    model = {"mode": {"ssl": "parallel", "st": "parallel"}.get(mode, mode), "classes": list(PANNUKE_CLASSES)}
    stage = "supervised"
    if mode == "ssl":
        stage, model = "ssl", {**model, "classes": [], "projection": 128, "representation": {"positions": False}}
    if mode == "st":
        stage, model = "st", {**model, "classes": list(ST_TYPES), "queries": 400}
    training = {"batch_size": args.batch, "precision": "fp32", "noise": {"share": 0.6}}
    if args.tiny:
        model |= {"d_model": 32, "heads": 2, "ffn": 16, "queries": 40, "encoder_layers": 1, "decoder_layers": 1}
        model["backbone"] = {"block": "basic", "layers": [1, 1, 1, 1], "width": 8}
    return Experiment.from_dict({"name": mode, "stage": stage, "model": model, "training": training})


def prepare(args: argparse.Namespace) -> None:
    """Fill in the sizes that depend on the device."""
    on_gpu = args.device.startswith("cuda")
    if args.tiny:
        args.size, args.batch, args.rounds, args.nuclei = 64, 2, 1, 4
    args.size = args.size or (256 if on_gpu else 128)
    args.batch = args.batch or (16 if on_gpu else 4)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if not on_gpu:
        torch.set_num_threads(args.threads)


def draw_store(folder: Path, patches: int, size: int, nuclei: int, classes: Sequence[str]) -> PatchStore:
    """Write a store of smooth noise with dark nuclei at random places."""
    random = np.random.default_rng(0)
    coarse = random.integers(90, 240, (patches, size // 8, size // 8, 3), dtype=np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    boxes, labels = [], []
    for image, count in zip(images, random.poisson(nuclei, patches), strict=True):
        half = random.uniform(size / 40, size / 20, (count, 2))
        centre = random.uniform(half, size - half)
        boxes.append(np.concatenate([centre - half, centre + half], axis=1).astype(np.float32))
        for left, top, right, bottom in boxes[-1].round().astype(int):
            image[top:bottom, left:right] = (70, 40, 120)
        labels.append(
            random.integers(0, len(classes), count).astype(np.int8) if classes else np.full(count, -1, np.int8)
        )
    columns = {name: ["drawn"] * patches for name in ("source", "group", "tissue")}
    columns |= {name: np.arange(patches) for name in ("x", "y")}
    with StoreWriter(folder, patch_size=size, classes=tuple(classes), mpp=0.25) as writer:
        writer.append(images, boxes, labels, patches=columns)
    return open_store(folder)


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Time a piece of work."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def climb(variants: Sequence[Variant], rounds: int, device: str, images: int) -> None:
    """Measure the variants in turn and print them."""
    peaks = {}
    for round_ in range(rounds + 2):  # two rounds warm up (and compile)
        for variant in variants:
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            seconds = seconds_of(variant.work, device)
            if round_ >= 2:
                variant.seconds.append(seconds)
            if device.startswith("cuda"):
                peaks[variant.name] = torch.cuda.max_memory_allocated() / 1e9
    first = variants[0].seconds
    for variant in variants:
        ratio = statistics.median(a / b for a, b in zip(first, variant.seconds, strict=True))
        rate = images / statistics.median(variant.seconds)
        memory = f"   peak {peaks[variant.name]:.2f} GB" if peaks else ""
        print(f"{variant.name:52}{rate:9.2f} images/s {ratio:7.2f}x{memory}", flush=True)


def ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(6))


class Parts:
    """Adds up the seconds spent in parts of a step; each part waits for the device, so that their sum is too long."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def watch(self, owner: object, method: str, name: str) -> None:
        """Wrap a method of an object (or a function of a module)."""
        original = getattr(owner, method)

        def timed(*given, **named):
            synchronize(self.device)
            start = time.perf_counter()
            result = original(*given, **named)
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, method, timed)

    def describe(self, total: float) -> str:
        """Shares of a time."""
        shares = [f"{name} {100 * seconds / total:.1f} %" for name, seconds in self.seconds.items()]
        return ", ".join([*shares, f"rest {100 * max(0.0, 1 - sum(self.seconds.values()) / total):.1f} %"])
