"""Slides to patches, against one process that reads patch by patch with OpenSlide; and a million outlines of nuclei.

Usage: python tests/benchmarks/bench_slides.py [--repeats N] [--workers N] [--polygons N] [--slide S --nuclei N]
Without a slide, a mosaic is drawn: 512 px fields of texture in a margin of glass, tiles of 256 px (JPEG or deflate),
levels of half the size, 0.25 um per px, round nuclei. All ways run in turn as whole processes; ratios of medians, but
of the fastest runs for the workers, whose ratio says nothing while other programs use the cores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import geopandas
import numpy as np
import shapely
import tifffile

FIELD, MARGIN, MPP = 512, 512, 0.25

PEAK = """
def peak():  # of this program alone, in kB
    lines = open("/proc/self/status").read().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("VmHWM"))
"""
PREPARE = """
import sys, time
from pathlib import Path
import numpy as np
import openslide
from celldetr.slides.outlines import read_nucleus_file
from celldetr.slides.cutting import cut_patches
from celldetr.slides.grid import patch_grid
from celldetr.slides.pyramid import open_pyramid
from celldetr.config.slides import SlidePatchSettings
from celldetr.slides.patches import Slide, extract_slide
from celldetr.slides.tissue import tissue_mask
from celldetr.store import StoreWriter, open_store
PATH, NUCLEI, OUT, WORKERS = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = SlidePatchSettings()
with open_pyramid(PATH) as image:
    mpp = image.mpp
    nuclei = read_nucleus_file(NUCLEI, image_mpp=mpp, mpp=0.25).nuclei
    grid = patch_grid(image.size, mpp, nuclei, size=256, mpp=0.25, tissue=tissue_mask(image, mpp),
                        settings=settings.rules(), seed=0)
ratio, side = 0.25 / mpp, round(256 * 0.25 / mpp)
rows = sorted(grid.corners.tolist(), key=lambda corner: (corner[1], corner[0]))
start, cpu = time.perf_counter(), time.process_time()
"""
REPORT = """
print(len(grid), time.perf_counter() - start, peak(), time.process_time() - cpu)
"""
READ = """
slide = openslide.OpenSlide(str(PATH))
def read(x, y):
    region = slide.read_region((round(x * ratio), round(y * ratio)), 0, (side, side)).convert("RGB")
    return np.asarray(region if side == 256 else region.resize((256, 256)))
"""
CUT = """
cut_patches(PATH, grid, nuclei.labels, OUT, classes=(), source="s", group="g", tissue="t", attrs={}, workers=WORKERS)
"""
WAYS = {
    "extraction (patches and boxes to a store)": CUT,
    "extraction, one worker": f"WORKERS = 1{CUT}",
    "the whole step (outlines, tissue, plan, extraction)": """
slide = Slide("s", PATH, NUCLEI, "g", "t", mpp)
extract_slide(slide, OUT, size=256, mpp=0.25, settings=settings, on_damage="stop", seed=0, workers=WORKERS)
""",
    "store: one patch after another, in no order": """
store = open_store(OUT)
start, cpu = time.perf_counter(), time.process_time()
for patch in np.random.default_rng(0).permutation(len(store)):
    store.images([patch])
""",
    "store: all patches": """
store = open_store(OUT)
start, cpu = time.perf_counter(), time.process_time()
store.images(range(len(store)))
""",
    "OpenSlide, one process: reading alone": f"""{READ}
for x, y in rows:
    read(x, y)
""",
    "OpenSlide, one process: reading and writing": f"""{READ}
with StoreWriter(OUT, patch_size=256, classes=(), mpp=0.25) as writer:
    for x, y in rows:
        names = dict.fromkeys(("source", "group", "tissue"), ["s"])
        writer.append(read(x, y)[None], [[]], [[]], patches={{**names, "x": [x], "y": [y]}})
""",
}
OUTLINES = """
import sys, time
from celldetr.slides.outlines import read_nucleus_file
before = int(peak())
start = time.perf_counter()
found = read_nucleus_file(sys.argv[1], image_mpp=0.25, mpp=0.25)
print(len(found.nuclei), time.perf_counter() - start, int(peak()) - before, 0)
"""


def field(rng: np.random.Generator) -> np.ndarray:
    """Draw a field (512, 512, 3) with the noise of a camera."""
    coarse = rng.normal(0, 1, (16, 16, 3)).repeat(32, 0).repeat(32, 1) * 10
    return np.clip(np.array([205, 150, 190]) + coarse + rng.normal(0, 6, (FIELD, FIELD, 3)), 0, 255).astype(np.uint8)


def draw_slide(path: Path, nuclei: Path, columns: int, rows: int, tiles: str) -> None:
    """Write the slide, its tiles compressed as ``jpeg`` or ``deflate``, and its outlines."""
    jpeg = {"photometric": "ycbcr", "subsampling": (2, 2), "compressionargs": {"level": 85}}
    rng = np.random.default_rng(0)
    slide = np.full((2 * MARGIN + rows * FIELD, 2 * MARGIN + columns * FIELD, 3), 243, np.uint8)
    fields = [field(rng) for _ in range(8)]
    for row in range(rows):
        for column in range(columns):
            y, x = MARGIN + row * FIELD, MARGIN + column * FIELD
            slide[y : y + FIELD, x : x + FIELD] = fields[(row * columns + column) % len(fields)]
    centres = rng.uniform(MARGIN, [MARGIN + columns * FIELD, MARGIN + rows * FIELD], (80 * rows * columns, 2))
    radii = rng.uniform(10, 20, len(centres))
    for (x, y), radius in zip(centres, radii, strict=True):
        area = slide[int(y - radius) : int(y + radius) + 2, int(x - radius) : int(x + radius) + 2]
        down, across = np.ogrid[: area.shape[0], : area.shape[1]]
        area[np.hypot(across + int(x - radius) + 0.5 - x, down + int(y - radius) + 0.5 - y) < radius] = (90, 60, 130)
    write_outlines(nuclei, centres, radii)
    with tifffile.TiffWriter(path) as writer:
        level, factor = slide, 1
        while True:
            writer.write(
                level,
                tile=(256, 256),
                compression=tiles,
                resolution=(1e4 / (MPP * factor),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=int(factor > 1),
                **(jpeg if tiles == "jpeg" else {"photometric": "rgb"}),
            )
            if min(level.shape[:2]) < 1024:
                return
            height, width = (side // 2 * 2 for side in level.shape[:2])
            level = level[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).astype(np.uint8)
            factor *= 2


def write_outlines(path: Path, centres: np.ndarray, radii: np.ndarray) -> None:
    """Write round nuclei of 32 corners as GeoParquet or GeoJSON."""
    angles = np.linspace(0, 2 * np.pi, 33)
    rings = centres[:, None] + radii[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    polygons = geopandas.GeoSeries(shapely.polygons(rings.round(2)), crs="EPSG:3857")  # GeoJSON wants one
    table = geopandas.GeoDataFrame({"class": "Neoplastic"}, geometry=polygons, index=polygons.index)
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_file(path, driver="GeoJSON")


def run(code: str, *arguments: object) -> tuple[int, float, int, float]:
    """Run code in a process; what it counted, seconds, memory in kB, and seconds of CPU time."""
    command = [sys.executable, "-c", PEAK + code, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(output[0]), float(output[1]), int(output[2]), float(output[3])


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--polygons", type=int, default=1_000_000)
    parser.add_argument("--tiles", choices=("jpeg", "deflate"), default="jpeg")
    parser.add_argument("--fields", type=int, nargs=2, default=(20, 12), help="columns and rows of the mosaic")
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--nuclei", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slide, nuclei = options.slide or Path(folder) / "s.tif", options.nuclei or Path(folder) / "n.parquet"
        if options.slide is None:
            draw_slide(slide, nuclei, *options.fields, options.tiles)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        used: dict[str, list[float]] = {name: [] for name in WAYS}
        peaks = dict.fromkeys(WAYS, 0)
        patches = 0
        for _ in range(options.repeats):
            for name, code in WAYS.items():
                out = Path(folder) / "out.zarr"
                patches, taken, peak, cpu = run(PREPARE + code + REPORT, slide, nuclei, out, options.workers)
                seconds[name].append(taken)
                used[name].append(cpu)
                peaks[name] = max(peaks[name], peak)
        median = {name: statistics.median(taken) for name, taken in seconds.items()}
        print(f"{patches} patches, {options.workers} workers, medians of {options.repeats}")
        for name in WAYS:
            busy = 1000 * statistics.median(used[name]) / patches
            print(
                f"  {name}: {patches / median[name]:.0f} patches/s, {busy:.2f} ms of CPU time a patch, peak "
                f"{peaks[name] / 1024:.0f} MiB"
            )
        many, one, *_ = (min(taken) for taken in seconds.values())
        print(f"{options.workers} workers / one: {one / many:.2f} times the patches/s")
        ours, *_, read, both = median.values()
        print(f"extraction / reading alone: {read / ours:.2f} times the patches/s; with writing: {both / ours:.2f}")
        rng = np.random.default_rng(0)
        for suffix in ("parquet", "geojson") if options.polygons else ():
            for count in (options.polygons // 10, options.polygons):
                path = Path(folder) / f"many.{suffix}"
                write_outlines(path, rng.uniform(0, 50_000, (count, 2)), rng.uniform(10, 20, count))
                found, taken, more, _ = run(OUTLINES, path)
                size = path.stat().st_size / 2**20
                print(
                    f"{suffix}: {found} outlines ({size:.0f} MiB) in {taken:.1f} s, {more / 1024:.0f} MiB more memory"
                )


if __name__ == "__main__":
    main()
