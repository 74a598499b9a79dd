"""Cells of a large slide without the model: seconds of each stage, memory, and the time that a model would need.

Usage: python tests/benchmarks/bench_cells.py FOLDER [--side PX] [--mpp UM] [--kind tif|svs] [--workers N] [--rate N]
                                              [--only STAGE ...]
A slide of 60,000 x 60,000 px with JPEG tiles and tissue on half of it is written to FOLDER once. In place of a model,
the same 15 nuclei are "found" in the core of every tile, with random embeddings; tiles and cores are those of the
product, as are finding, joining and writing. `--mpp` other than 0.25 makes reading resize. `--only` measures some
stages: tissue, plan, read, find, join, h5ad, geojson. Wall time on a shared machine means little: compare CPU time.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import tifffile

from celldetr.cells import find
from celldetr.cells.h5ad import write_h5ad
from celldetr.cells.join import join_cells
from celldetr.cells.model import CellModel
from celldetr.cells.qupath import write_geojson
from celldetr.cells.table import CellFile
from celldetr.cells.tiling import Tiles, Tiling
from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.inference.batch import FoundNuclei, GivenNuclei
from celldetr.slides.cutting import read_blocks
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import tissue_mask

TILE, STEP, MPP, WIDTH = 256, 4, 0.25, 256
SIZE, MARGIN_UM, BATCH = 256, 8.0, 64
GLASS, TISSUE, NUCLEUS = (243, 242, 243), (205, 150, 190), (95, 60, 135)


def draw_tile(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Draw tissue (256, 256, 3) with nuclei and the noise of a camera."""
    image = np.array(TISSUE) + rng.normal(0, 12, (8, 8, 3)).repeat(32, 0).repeat(32, 1)
    y, x = np.mgrid[:TILE, :TILE]
    for centre in rng.uniform(0, TILE, (26, 2)):
        image[np.hypot(x - centre[0], y - centre[1]) < radius] = NUCLEUS
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


def write_slide(path: Path, side: int) -> None:
    """Write levels of 1/1, 1/4, 1/16 ...; a disc of half the area is tissue, made of eight tiles."""
    rng = np.random.default_rng(0)
    options = {"subsampling": "420", "level": 85, "outcolorspace": "ycbcr", "colorspace": "rgb"}
    blank = imagecodecs.jpeg8_encode(np.full((TILE, TILE, 3), GLASS, np.uint8), **options)
    with tifffile.TiffWriter(path.with_suffix(".part"), bigtiff=True) as writer:
        down = 1
        while True:
            tissue = [imagecodecs.jpeg8_encode(draw_tile(rng, 14 / down), **options) for _ in range(8)]
            level = side // down
            across = -(-level // TILE)
            row, column = (np.mgrid[:across, :across] + 0.5) * TILE * down / side - 0.5
            kinds = np.where(np.hypot(row, column) < np.sqrt(0.5 / np.pi), rng.integers(0, 8, row.shape), 8)
            text = f"Aperio Image Library v11.2.1|AppMag = 40|MPP = {MPP}" if path.suffix == ".svs" else None
            writer.write(
                ((*tissue, blank)[kind] for kind in kinds.ravel()),
                shape=(level, level, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                description=text,
                metadata=None,
                resolution=(1e4 / (MPP * down),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=0 if down == 1 or text else 1,
            )
            if level < 2048:
                break
            down *= STEP
    os.replace(path.with_suffix(".part"), path)


class StandIn:
    """Finds the same nuclei in every tile; they repeat from core to core, so that neighbouring tiles agree."""

    def __init__(self, tiling: Tiling) -> None:
        rng = np.random.default_rng(0)
        places = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2)[:15] + 0.5
        core = places * tiling.core / 4 + rng.uniform(-8, 8, (15, 2))
        shifts = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 1, 2) * tiling.core
        centres = (core + shifts).reshape(-1, 2) + tiling.margin
        centres = centres[((centres > 0) & (centres < tiling.size)).all(axis=1)]
        self.boxes = np.concatenate([centres - 14, centres + 14], axis=1).astype(np.float32)
        self.pool = rng.normal(size=(BATCH * len(centres), WIDTH)).astype(np.float32)
        self.scores = rng.uniform(0, 1, (BATCH * len(centres), len(PANNUKE_CLASSES))).astype(np.float32)

    def read(
        self, batches: Iterable[tuple[object, np.ndarray, None]]
    ) -> Iterator[tuple[object, FoundNuclei, GivenNuclei]]:
        """Stand in for `celldetr.inference.predictor.Predictor.read`."""
        for key, images, _ in batches:
            yield key, *self.found(images)

    def found(self, images: np.ndarray) -> tuple[FoundNuclei, GivenNuclei]:
        """Nuclei of images."""
        nuclei, count = len(self.boxes), len(images) * len(self.boxes)
        own = self.scores[:count]
        found = FoundNuclei(
            np.repeat(np.arange(len(images)), nuclei),
            np.tile(np.arange(nuclei), len(images)),
            np.tile(self.boxes, (len(images), 1)),
            0.5 + own[:, 0] / 2,
            own,
            self.pool[:count],
        )
        return found, GivenNuclei(own[:0], self.pool[:0])


class Stages:
    """Measures stages of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    def measure(self, name: str, do: Callable[[], object], note: Callable[[], str]) -> None:
        """Run a stage and print what it took."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        wall, cpu = time.perf_counter(), sum(os.times()[:2])
        do()
        wall, cpu = time.perf_counter() - wall, sum(os.times()[:2]) - cpu
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(lines["VmHWM"].split()[0]) // 1024
        self.seconds[name] = wall, cpu
        print(f"{name:8} {wall:7.1f} s wall {cpu:7.1f} s CPU {peak:6} MiB peak  {note()}", flush=True)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=60_000)
    parser.add_argument("--mpp", type=float, default=MPP)
    parser.add_argument("--kind", choices=["tif", "svs"], default="tif")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1000, help="tiles/s of a model")
    parser.add_argument("--only", nargs="+", default=["tissue", "plan", "read", "find", "join", "h5ad", "geojson"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"slide_{options.side}.{options.kind}"
    if not path.exists():
        write_slide(path, options.side)
    out, table = options.folder / f"cells_{options.kind}", options.folder / "cells.parquet"
    tiling = Tiling.of(SIZE, MPP, MARGIN_UM)
    image = open_pyramid(path, options.mpp)
    state = SimpleNamespace(tissue=None, tiles=None)

    def plan() -> None:
        tiles = Tiles.over(tiling, image.size, options.mpp)
        state.tiles = tiles.select(tiles.tissue_mm2(state.tissue) > 0)

    def find_all() -> None:
        settings = SimpleNamespace(classes=PANNUKE_CLASSES, d_model=WIDTH, mode="parallel")
        model = CellModel(SimpleNamespace(settings=settings, baseline=False), MPP, SIZE, source={"file": "none"})
        how = find.FindSettings(MARGIN_UM, 0.4, BATCH)
        shutil.rmtree(out, ignore_errors=True)
        stand_in = StandIn(tiling)
        find.Predictor = lambda *_, **__: stand_in
        find.find_cells(find.Slide("bench", path, options.mpp), model, out, how, workers=options.workers)

    def read() -> Iterator[object]:
        return read_blocks(path, state.tiles.grid(0, len(state.tiles)), size=BATCH, workers=options.workers)

    stages = Stages()
    work: dict[str, tuple[Callable[[], object], Callable[[], str]]] = {
        "tissue": (lambda: setattr(state, "tissue", tissue_mask(image, options.mpp)),
                   lambda: f"{state.tissue.inside.mean():.0%} of {image.size[0]} x {image.size[1]} px"),
        "plan": (plan, lambda: f"{len(state.tiles)} tiles"),
        "read": (lambda: [None for _ in read()], lambda: "tissue and plan not included"),
        "find": (find_all, lambda: "tissue, plan and read included"),
        "join": (lambda: join_cells([out], table, class_threshold=0.4), lambda: f"{len(CellFile(table))} cells"),
        "h5ad": (lambda: write_h5ad(CellFile(table), options.folder / "cells.h5ad"), lambda: ""),
        "geojson": (lambda: write_geojson(CellFile(table), options.folder / "cells.geojson.gz"), lambda: ""),
    }  # fmt: skip
    for name in work:
        if name in options.only or (name in ("tissue", "plan") and "read" in options.only):
            stages.measure(name, *work[name])
    whole = [stages.seconds[name] for name in ("find", "join", "h5ad", "geojson") if name in stages.seconds]
    if len(whole) == 4:
        needed = len(state.tiles) / options.rate
        wall, cpu = (sum(column) for column in zip(*whole, strict=True))
        print(
            f"find to geojson: {wall:.1f} s wall, {cpu:.1f} s CPU; a model at {options.rate:g} tiles/s: {needed:.1f} s"
        )
        print(f"ratio: {wall / needed:.2f} wall, {cpu / 2 / needed:.2f} CPU on two cores")


if __name__ == "__main__":
    main()
