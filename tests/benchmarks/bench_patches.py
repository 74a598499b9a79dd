"""Cutting a slide into patches, against reading and resampling it patch by patch in one process.

Usage: python tests/benchmarks/bench_patches.py [--side PX] [--workers N] [--repeats N]
The slide is a synthetic pyramid (JPEG tiles of 512 px, texture of tissue, 0.2738 um per px); patches are 256 px at
0.25 um per px. All ways run in turn as whole processes, in one run; ratios of medians. `extract` also writes the store.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

TILE, SLIDE_MPP, MPP, SIZE = 512, 0.2738, 0.25, 256

WAYS = {
    "extract": """
import numpy as np
from celldetr.slides.cutting import extract
nuclei = Nuclei(np.empty((0, 4)), np.empty((0, 2)), np.empty(0, np.int8))
extract(PATH, plan, nuclei, OUT, classes=("a",), source="s", group="g", tissue="t", attrs={}, workers=WORKERS)
""",
    "the same work, patch by patch": """
from celldetr.store import StoreWriter
with open_pyramid(PATH) as image, StoreWriter(OUT, patch_size=256, classes=("a",), mpp=MPP) as writer:
    for x, y in rows:
        region = Image.fromarray(image.read(0, int(x * ratio), int(y * ratio), side, side))
        pixels = np.asarray(region.resize((256, 256), Image.Resampling.BICUBIC))
        names = dict.fromkeys(("source", "group", "tissue"), ["s"])
        writer.append(pixels[None], [[]], [[]], patches={**names, "x": [x], "y": [y]})
""",
    "reading alone with OpenSlide, patch by patch": """
import openslide
slide = openslide.OpenSlide(PATH)
for x, y in rows:
    region = slide.read_region((int(x * ratio), int(y * ratio)), 0, (side, side)).convert("RGB")
    region.resize((256, 256), Image.Resampling.BICUBIC)
""",
    "reading alone with our reader, patch by patch": """
with open_pyramid(PATH) as image:
    for x, y in rows:
        region = Image.fromarray(image.read(0, int(x * ratio), int(y * ratio), side, side))
        region.resize((256, 256), Image.Resampling.BICUBIC)
""",
}
PREPARE = """
import math, resource, sys, time
import numpy as np
from PIL import Image
from celldetr.slides.grid import Nuclei, PatchSettings, plan_patches
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster
PATH, OUT, WORKERS, MPP, SLIDE_MPP = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
with open_pyramid(PATH) as image:
    size = image.size
settings = PatchSettings(min_tissue=0, min_nuclei=0, min_labelled=0)
none = Nuclei(np.empty((0, 4)), np.empty((0, 2)), np.empty(0, np.int8))
tissue = Raster(np.ones((10, 10), bool), max(size) / 10, 1.0)
plan = plan_patches(size, SLIDE_MPP, none, size=256, mpp=MPP, tissue=tissue, settings=settings, seed=0)
rows = sorted(plan.corners.tolist(), key=lambda corner: (corner[1], corner[0]))
ratio = MPP / SLIDE_MPP
side = math.ceil(256 * ratio)
start, cpu = time.perf_counter(), time.process_time()
"""
REPORT = """
used = resource.getrusage(resource.RUSAGE_SELF)
print(len(plan), time.perf_counter() - start, used.ru_maxrss, time.process_time() - cpu)
"""


def texture(seed: int) -> np.ndarray:
    """Return a tile with a field of stain, fibres and dark nuclei (512, 512, 3)."""
    rng = np.random.default_rng(seed)
    noise = [ndimage.gaussian_filter(rng.normal(size=(TILE, TILE)), s, mode="wrap") * s for s in (1, 4, 16)]
    image = np.array([215.0, 160.0, 200.0]) + (3 * noise[0] + 12 * noise[1] + 20 * noise[2])[..., None]
    seeds = rng.random((TILE, TILE)) < 0.0015
    nuclei = ndimage.binary_dilation(seeds, iterations=9)
    image[nuclei] = np.array([105.0, 75.0, 150.0]) + 10 * noise[0][nuclei][:, None]
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def write_slide(path: Path, sides: tuple[int, int]) -> None:
    """Write the pyramid tile by tile, three levels; tiles are drawn from a set, turned and mirrored."""
    stock = [turned for seed in range(12) for turned in (lambda t: (t, t[::-1], t[:, ::-1]))(texture(seed))]
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(3):
            width, height = (side >> (2 * level) for side in sides)
            count = -(-width // TILE) * -(-height // TILE)
            order = np.random.default_rng(level).integers(0, len(stock), count)
            kind = {"subifds": 2, "resolution": (1e4 / SLIDE_MPP,) * 2, "resolutionunit": "CENTIMETER"}
            writer.write(
                (stock[index] for index in order),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                **(kind if level == 0 else {"subfiletype": 1}),
            )


def measure(way: str, slide: Path, out: Path, workers: int) -> tuple[int, float, int, float]:
    """Patches, seconds, peak memory (kB) and seconds of processor time of one way."""
    arguments = [str(slide), str(out), str(workers), str(MPP), str(SLIDE_MPP)]
    command = [sys.executable, "-c", PREPARE + WAYS[way] + REPORT, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(output[0]), float(output[1]), int(output[2]), float(output[3])


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[int, float, int, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "slide.tif"
        start = time.perf_counter()
        write_slide(slide, (options.side, options.side))
        print(f"slide: {options.side} px each way, {slide.stat().st_size / 1e6:.0f} MB, "
              f"written in {time.perf_counter() - start:.0f} s; {options.workers} workers")  # fmt: skip
        for _ in range(options.repeats):
            for way, runs in found.items():
                runs.append(measure(way, slide, Path(folder) / "out.zarr", options.workers))
    seconds = {way: statistics.median(run[1] for run in runs) for way, runs in found.items()}
    for way, runs in found.items():
        rate, peak = runs[0][0] / seconds[way], max(run[2] for run in runs) * 1024 / 1e9
        work = statistics.median(run[3] for run in runs) / runs[0][0] * 1e3
        print(f"{way}: {rate:.0f} patches/s, {work:.2f} ms of processor time a patch, peak memory {peak:.2f} GB; "
              f"{seconds[way] / seconds['extract']:.2f} times the time of extract")  # fmt: skip


if __name__ == "__main__":
    main()
