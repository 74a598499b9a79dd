"""Cells near the borders of tiles against cells inside of tiles, by the width of the margin.

Usage: python tests/benchmarks/cell_borders.py MODEL.pt SLIDE [--mpp UM] [--nuclei FILE] [--margins UM ...] [--shifts N]

The slide is run several times for each margin, every time at another place under the tiles, so that a nucleus is near a
border (`--zone` um) in some runs and inside in others. What is counted for it in the ones minus in the others is the
effect of the border alone, whatever the model misses. The nuclei are those of a file (outlines, px of level 0); without
one, the cells of the first run in centred tiles: with a margin of 5/16 of a tile, each nucleus lies in the middle of
the tile that shows it. Cells and nuclei are paired one to one within 3 um.

Printed, % of nuclei, near borders, inside, and the difference with its standard error:
  lost      nuclei without a cell
  twice     cells beyond the first of a nucleus (3 um, or boxes with an intersection over union above 0.5)
and, of the cell of a nucleus in a run and in a centred tile, near borders and inside:
  distance  mean cosine distance of the embeddings
  class     whether the classes with the highest score differ, %
The slide is held in memory, and a copy of it is written for each run.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
import tifffile
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.cells.find import FindSettings, Slide, find_cells
from celldetr.cells.join import join_cells
from celldetr.cells.model import CellModel
from celldetr.cells.table import CellFile
from celldetr.slides.boxes import centres_of
from celldetr.slides.outlines import read_nucleus_file
from celldetr.slides.pyramid import open_pyramid

RADIUS = 3.0  # um
STEPS = (37, 11), (11, 53), (59, 29), (23, 43), (47, 61), (5, 19)  # px of the model by which the other runs are moved


@dataclass(frozen=True)
class Cells:
    """Cells of a run (n), um on the slide."""

    core: float
    """Side of the cores."""
    moved: NDArray[np.float64]
    """By which the slide was moved to the right and down under the tiles (2,)."""
    boxes: NDArray[np.float64]
    classes: NDArray[np.intp]
    embeddings: NDArray[np.float32]
    tiles: int

    @property
    def centres(self) -> NDArray[np.float64]:
        """Centres of the boxes (n, 2)."""
        return centres_of(self.boxes)

    def from_border(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distance (m,) of points (m, 2) from the nearest border between two cores."""
        place = (points + self.moved) % self.core
        nearest: NDArray[np.float64] = np.minimum(place, self.core - place).min(axis=1)
        return nearest


@dataclass(frozen=True)
class Bench:
    """The slide in memory, and the model."""

    pixels: NDArray[np.uint8]
    mpp: float
    model: CellModel
    threshold: float
    folder: Path

    def run(self, margin: float, step: Sequence[int]) -> Cells:
        """Find the cells with a margin (um) on a copy that is moved to the right and down by px of the model."""
        file, out, joined = (self.folder / name for name in ("slide.tif", "parts", "cells.parquet"))
        pad = np.rint(np.array(step) * self.model.mpp / self.mpp).astype(int)
        moved = np.pad(self.pixels, ((pad[1], 0), (pad[0], 0), (0, 0)), constant_values=255)
        per_cm = 1e4 / self.mpp
        options = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(file, moved, resolution=(per_cm, per_cm), **options)
        settings = FindSettings(margin, self.threshold, batch_size=16)
        find_cells(Slide("slide", file, self.mpp), self.model, out, settings)
        info = join_cells([out], joined)
        cells = CellFile(joined)
        frame = cells.frame()
        centres = frame[["x_um", "y_um"]].to_numpy() - pad * self.mpp
        half = frame[["width_um", "height_um"]].to_numpy() / 2
        scores = frame[[f"score_{name}" for name in info.classes]].to_numpy()
        core = (self.model.size - 2 * round(margin / self.model.mpp)) * self.model.mpp
        boxes = np.hstack([centres - half, centres + half])
        embeddings = np.concatenate(list(cells.embeddings()))
        return Cells(core, pad * self.mpp, boxes, scores.argmax(axis=1), embeddings, int(info.counts["tiles"]))


@dataclass(frozen=True)
class Found:
    """What a run found of each nucleus (N)."""

    cell: NDArray[np.int64]
    """Its cell, -1: none."""
    more: NDArray[np.int64]
    """Further cells on it."""

    @classmethod
    def of(cls, nuclei: NDArray[np.float64], cells: Cells) -> "Found":
        """Pair cells with nuclei, boxes (N, 4) in um."""
        centres = centres_of(nuclei)
        near = cKDTree(centres).sparse_distance_matrix(cKDTree(cells.centres), RADIUS, output_type="ndarray")
        cell, free = np.full(len(nuclei), -1), np.ones(len(cells.boxes), dtype=bool)
        for nucleus, other, _ in np.sort(near, order="v").tolist():
            if cell[nucleus] < 0 and free[other]:
                cell[nucleus], free[other] = other, False
        left = np.flatnonzero(free)
        distance, on = cKDTree(centres).query(cells.centres[left])
        on[distance > RADIUS] = -1
        known, own = shapely.box(*nuclei.T), shapely.box(*cells.boxes[left].T)
        row, nucleus = shapely.STRtree(known).query(own, predicate="intersects")
        both = shapely.area(shapely.intersection(own[row], known[nucleus]))
        same = (both > 0.5 * shapely.area(shapely.union(own[row], known[nucleus]))) & (on[row] < 0)
        on[row[same]] = nucleus[same]
        return cls(cell, np.bincount(on[(on >= 0) & (cell[on] >= 0)], minlength=len(nuclei)))


def difference(values: NDArray[np.number], near: NDArray[np.bool_]) -> str:
    """Show values (runs, N) in % near borders, inside, and what a border changes for a nucleus that was in both."""
    both = near.any(axis=0) & ~near.all(axis=0)
    ones, others = ((values * place).sum(axis=0)[both] / place.sum(axis=0)[both] for place in (near, ~near))
    change = 100 * (ones - others)
    error = change.std() / np.sqrt(max(len(change), 1))
    return f"{100 * values[near].mean():5.2f} {100 * values[~near].mean():5.2f} {change.mean():+5.2f} ± {error:.2f}"


def likeness(one: Cells, first: NDArray[np.int64], two: Cells, second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distance of the embeddings and whether the classes differ (2, N), of cells of two runs; NaN without a cell."""
    result = np.full((2, len(first)), np.nan)
    both = (first >= 0) & (second >= 0)
    a, b = one.embeddings[first[both]], two.embeddings[second[both]]
    result[0, both] = 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    result[1, both] = one.classes[first[both]] != two.classes[second[both]]
    return result


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--mpp", type=float, help="um per px of level 0, if the file does not say it")
    parser.add_argument("--nuclei", type=Path, help="outlines of the nuclei, px of level 0")
    parser.add_argument("--margins", type=float, nargs="+", default=[0, 2, 4, 6, 8, 12, 16])
    parser.add_argument("--shifts", type=int, default=4, choices=range(2, len(STEPS) + 1))
    parser.add_argument("--zone", type=float, default=4.0, help="um from a border that count as near it")
    parser.add_argument("--nucleus-threshold", type=float, default=0.4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CellModel.load(options.model, device=options.device)
    with tempfile.TemporaryDirectory() as folder, open_pyramid(options.slide, options.mpp) as image:
        mpp = float(image.mpp or 0)
        bench = Bench(image.read(0, 0, 0, *image.size), mpp, model, options.nucleus_threshold, Path(folder))
        width = 5 / 16 * model.size * model.mpp
        centred, *others = (bench.run(width, step) for step in ((0, 0), *STEPS[:2]))
        nuclei = centred.boxes
        if options.nuclei is not None:
            nuclei = read_nucleus_file(options.nuclei, image_mpp=mpp, mpp=1.0).nuclei.boxes
        own = Found.of(nuclei, centred).cell
        again = np.hstack([likeness(centred, own, cells, Found.of(nuclei, cells).cell) for cells in others])
        distance, classes = np.nanmean(again, axis=1)
        print(f"{len(nuclei)} nuclei; two centred tiles: distance {distance:.4f}, class {100 * classes:.2f} %")
        columns = f"{'lost: near, inside, difference':^32} | {'twice':^32} | distance      | class"
        print(f"margin   tiles | {columns}")
        for margin in options.margins:
            runs = [bench.run(margin, step) for step in STEPS[: options.shifts]]
            found = [Found.of(nuclei, cells) for cells in runs]
            near = np.array([cells.from_border(centres_of(nuclei)) < options.zone for cells in runs])
            lost, twice = np.array([one.cell < 0 for one in found]), np.array([one.more for one in found])
            alike = np.stack(
                [likeness(centred, own, cells, one.cell) for cells, one in zip(runs, found, strict=True)], 1
            )
            (near_d, near_c), (in_d, in_c) = (np.nanmean(alike[:, place], axis=1) for place in (near, ~near))
            tiles = np.mean([cells.tiles for cells in runs])
            columns = f"{difference(lost, near):>32} | {difference(twice, near):>32}"
            print(
                f"{margin:6g} {tiles:7.0f} | {columns} | {near_d:.4f} {in_d:.4f} | {100 * near_c:.2f} {100 * in_c:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
