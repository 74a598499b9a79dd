"""Registration of a gigapixel H&E: time, peak memory and precision, and how they grow with the image.

Usage: python tests/benchmarks/bench_registration.py [--sides 10000 40000] [--angle 100] [--file]
Draws sections with nuclei at random places, writes H&E (JPEG tiles) and DAPI as pyramids, and registers each in a fresh
process: without a file over the full circle, or with --file from one that is off by 40 um and 1.5 degrees.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from celldetr.xenium.registration.affine import affine, apply, inverse, rotation, scaling

PIXEL, MPP = 0.2125, 0.2738  # um of a Xenium px, of an H&E px
BLOCK, STEP = 1024, 4  # px of a tile; factor between levels
DENSITY = 2500  # nuclei per mm2

REGISTER = """
import json, resource, sys, time
import numpy as np, shapely
from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.registration.register import register
folder = sys.argv[1]
scene = np.load(folder + "/scene.npz")
nuclei = shapely.polygons(scene["outlines"])
matrix = scene["alignment"] if sys.argv[2] == "file" else None
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
found = register(open_pyramid(folder + "/he.tif"), open_pyramid(folder + "/dapi.tif", plane=0), nuclei, 0.2125, matrix)
taken = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
he = scene["outlines"].mean(axis=1) @ scene["um_to_he"][:2, :2].T + scene["um_to_he"][:2, 2]
um = he @ found.he_to_um()[:2, :2].T + found.he_to_um()[:2, 2]
error = np.linalg.norm(um - scene["outlines"].mean(axis=1), axis=1)
print(json.dumps({"seconds": taken, "peak": peak * 1024, "before": base * 1024, "median": np.median(error),
    "worst": error.max(), "origin": found.origin, "distance": found.quality.distance}))
"""


def nuclei_of(rng: np.random.Generator, extent: float) -> np.ndarray:
    """Outlines (n, 12, 2), um, of nuclei in a square section of uneven density."""
    count = int(DENSITY * 2 * (extent / 1000) ** 2)
    points = rng.random((count, 2)) * extent
    hills = rng.random((12, 2)) * extent
    density = sum(np.exp(-(((points - hill) / (0.15 * extent)) ** 2).sum(axis=1)) for hill in hills)
    points = points[rng.random(count) < np.clip(density, 0.1, 1)]
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)[None] * rng.uniform(2.5, 4.5, (len(points), 1, 2))
    return points[:, None] + ring


def tiles(
    outlines: np.ndarray, side: int, empty: object, paints: list, small: np.ndarray, mode: str, noise: np.ndarray
) -> Iterator[np.ndarray]:
    """Draw tile after tile of a square image; averages go to `small`, the next level."""
    count = -(-side // BLOCK)
    cell = (outlines.mean(axis=1) // BLOCK).astype(int)
    members: dict[tuple[int, int], list[int]] = {}
    for index, (x, y) in enumerate(cell):
        for column, row in {(x + a, y + b) for a in (-1, 0, 1) for b in (-1, 0, 1)}:
            members.setdefault((column, row), []).append(index)
    for row in range(count):
        for column in range(count):
            picture = Image.new(mode, (BLOCK, BLOCK), empty)
            pen = ImageDraw.Draw(picture)
            for index in members.get((column, row), ()):
                corners = outlines[index] - (column * BLOCK, row * BLOCK)
                if corners.max() > -4 and corners.min() < BLOCK + 4:
                    pen.polygon(corners.ravel().tolist(), fill=paints[index % len(paints)])
            if mode == "RGB":
                tile = np.asarray(picture.filter(ImageFilter.BoxBlur(1)), dtype=np.int16)
                tile = np.clip(tile + noise, 0, 255).astype(np.uint8)
            else:
                tile = np.asarray(picture).astype(np.uint16)
            part = tile[::2, ::2].reshape(BLOCK // STEP, 2, BLOCK // STEP, 2, *tile.shape[2:]).mean(axis=(1, 3))
            area = small[row * BLOCK // STEP :, column * BLOCK // STEP :][: BLOCK // STEP, : BLOCK // STEP]
            area[...] = part[: area.shape[0], : area.shape[1]]
            yield tile


def write_levels(path: Path, outlines: np.ndarray, side: int, paints: list, *, gray: bool) -> None:
    """Write a pyramid with levels of 1, 1/4, 1/16, ..."""
    depth = () if gray else (3,)
    small = np.empty((side // STEP, side // STEP, *depth), np.uint16 if gray else np.uint8)
    levels = max(int(np.log(side / 1000) / np.log(STEP)), 1)
    options = {
        "tile": (BLOCK, BLOCK),
        "photometric": "minisblack" if gray else "rgb",
        "compression": "zlib" if gray else "jpeg",
        "compressionargs": {"level": 1} if gray else {"level": 85},
    }
    noise = np.random.default_rng(1).normal(0, 5, (BLOCK, BLOCK, 1)).astype(np.int16)
    drawn = tiles(outlines, side, 150 if gray else (231, 188, 211), paints, small, "I" if gray else "RGB", noise)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        mpp = PIXEL if gray else MPP
        file.write(
            drawn,
            shape=(side, side, *depth),
            dtype=small.dtype,
            subifds=levels,
            resolution=(1e4 / mpp, 1e4 / mpp),
            resolutionunit="CENTIMETER",
            **options,
        )
        for _ in range(levels):
            file.write(small, subfiletype=1, **options)
            edge = small.shape[0] // STEP * STEP
            cut = small[:edge, :edge]
            small = np.ascontiguousarray(cut[::STEP, ::STEP])


def write_scene(folder: Path, side: int, angle: float) -> int:
    """Write a scene whose H&E has `side` px; returns the number of nuclei."""
    rng = np.random.default_rng(side)
    extent = side * MPP / (abs(np.cos(np.radians(angle))) + abs(np.sin(np.radians(angle))))
    outlines = nuclei_of(rng, extent)
    linear = rotation(angle) @ np.array([[1, 0.01], [0, 1]]) * MPP
    to_um = affine(linear, np.full(2, extent / 2) - linear @ np.full(2, side / 2))
    he = apply(inverse(to_um), outlines.reshape(-1, 2)).reshape(outlines.shape)
    paints = [tuple(map(int, np.clip(rng.normal((108, 80, 150), 20), 0, 255))) for _ in range(64)]
    write_levels(folder / "he.tif", he, side, paints, gray=False)
    lights = [int(value) for value in rng.uniform(800, 4000, 64)]
    write_levels(folder / "dapi.tif", outlines / PIXEL, int(extent / PIXEL), lights, gray=True)
    turn = rotation(1.5)
    middle = np.full(2, extent / 2)
    wrong = scaling(1 / PIXEL) @ affine(turn, middle - turn @ middle + (30, -26)) @ to_um
    np.savez(folder / "scene.npz", outlines=outlines, um_to_he=inverse(to_um), alignment=wrong)
    return len(outlines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--angle", type=float, default=100.0)
    parser.add_argument("--file", action="store_true")
    options = parser.parse_args()
    results = []
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            count = write_scene(Path(folder), side, options.angle)
            command = [sys.executable, "-c", REGISTER, folder, "file" if options.file else "none"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        results.append(found)
        print(
            f"{side} x {side} px, {count} nuclei: {found['seconds']:.1f} s, peak {found['peak'] / 1e9:.2f} GB "
            f"({found['before'] / 1e9:.2f} GB before), error median {found['median']:.2f} um, largest "
            f"{found['worst']:.2f} um ({found['origin']}; nuclei {found['distance']:.2f} um apart)"
        )
    for side, found in zip(options.sides[1:], results[1:], strict=True):
        pixels = (side / options.sides[0]) ** 2
        print(
            f"{pixels:.0f} times the pixels: {found['seconds'] / results[0]['seconds']:.2f} times the time, "
            f"{found['peak'] / results[0]['peak']:.2f} times the memory"
        )


if __name__ == "__main__":
    main()
