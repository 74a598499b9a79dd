"""Cells near the borders of tiles against cells inside of tiles, by the width of the margin.

Usage: python tests/benchmarks/cell_borders.py MODEL.pt SLIDE [--mpp UM] [--nuclei FILE] [--margins UM ...] [--shifts N]

The slide is run several times for each margin, every time at another place under the tiles, so that a nucleus is near a
border (`--zone` um) in some runs and inside in others. What is counted for it in the ones minus in the others is the
effect of the border alone, whatever the model misses. Places are random: tiles whose corners differ by multiples of
the strides of the features agree more than others. The nuclei are those of a file (outlines, px of level 0); without
one, the cells of the first run in centred tiles: with a margin of 5/16 of a tile, each nucleus lies in the middle of
the tile that shows it. Cells and nuclei are paired one to one within 3 um.

Printed, % of nuclei, with standard errors:
  lost      nuclei without a cell, near borders, inside, and the difference; the model finds more of them at some places
            of a tile than at others
  joined    of nuclei near borders, how many more have a cell than are found in the tile whose core they lie in: what
            joining loses (-) or adds (+)
  twice     of nuclei near borders, how many more cells beyond the first lie within 3 um than in that tile
and, of the cell of a nucleus in a run and in each of its `--centred` centred tiles, near borders and inside:
  distance  mean cosine distance of the embeddings
  class     whether the classes with the highest score differ, %
and both between two centred tiles. With `--centred 0` they are left out, which is much faster.
The slide is held in memory, and a copy of it is written for each run.
"""

import argparse
import tempfile
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
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
    """How many were read."""
    findings: NDArray[np.float64]
    """Centres of what was found in the cores and around them (m, 2), and the columns and rows of the cores (m, 2)."""

    @property
    def centres(self) -> NDArray[np.float64]:
        """Centres of the boxes (n, 2)."""
        return centres_of(self.boxes)

    def core_of(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Column and row (m, 2) of the core that holds each point (m, 2)."""
        return np.floor((points + self.moved) / self.core)

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

    def run(self, margin: float, number: int) -> Cells:
        """Find the cells with a margin (um) on a copy that is moved to the right and down; another one per number."""
        px = round(margin / self.model.mpp)
        step = np.random.default_rng([px, number]).integers(self.model.size - 2 * px, size=2)
        file, out, joined = (self.folder / name for name in ("slide.tif", "parts", "cells.parquet"))
        pad = np.rint(step * self.model.mpp / self.mpp).astype(int)
        moved = np.pad(self.pixels, ((pad[1], 0), (pad[0], 0), (0, 0)), constant_values=255)
        per_cm = 1e4 / self.mpp
        options = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(file, moved, resolution=(per_cm, per_cm), **options)
        settings = FindSettings(margin, self.threshold, batch_size=16)
        find_cells(Slide("slide", file, self.mpp), self.model, out, settings)
        info = join_cells([out], joined)
        cells, shift = CellFile(joined), pad * self.mpp
        frame = cells.frame()
        centres = frame[["x_um", "y_um"]].to_numpy() - shift
        half = frame[["width_um", "height_um"]].to_numpy() / 2
        scores = frame[[f"score_{name}" for name in info.classes]].to_numpy()
        core = (self.model.size - 2 * px) * self.model.mpp
        return Cells(
            core,
            shift,
            np.hstack([centres - half, centres + half]),
            scores.argmax(axis=1),
            np.concatenate(list(cells.embeddings())),
            int(info.counts["tiles"]),
            _findings(out, core, px * self.model.mpp) - [*shift, 0, 0],
        )


def _findings(parts: Path, core: float, margin: float) -> NDArray[np.float64]:
    """Centres of rows of parts, and the columns and rows of their tiles; none of tiles with an empty core (m, 4)."""
    found = pd.concat(
        [pd.read_parquet(file, columns=["x_um", "y_um", "tile", "edge_um"]) for file in parts.glob("*.parquet")]
    )
    places = np.floor(found[["x_um", "y_um"]] / core).set_axis(["column", "row"], axis=1)
    inside = places.assign(tile=found["tile"])[found["edge_um"] >= margin].groupby("tile").first()
    return found.join(inside, on="tile", how="inner")[["x_um", "y_um", "column", "row"]].to_numpy()


def paired(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each point (N, d) the nearest (N,) of others (n, d) within 3 um, one to one, nearest first; -1: none."""
    near = cKDTree(one).sparse_distance_matrix(cKDTree(two), RADIUS, output_type="ndarray")
    result, free = np.full(len(one), -1), np.ones(len(two), dtype=bool)
    for first, second, _ in np.sort(near, order="v").tolist():
        if result[first] < 0 and free[second]:
            result[first], free[second] = second, False
    return result


@dataclass(frozen=True)
class Found:
    """What a run found of each nucleus (N)."""

    cell: NDArray[np.int64]
    """Its cell, -1: none."""
    more: NDArray[np.int64]
    """Further cells on it."""
    own: NDArray[np.bool_]
    """Whether the tile whose core it lies in has found it."""
    own_more: NDArray[np.int64]
    """Further findings of that tile on it."""

    @classmethod
    def of(cls, nuclei: NDArray[np.float64], cells: Cells) -> "Found":
        """Pair cells with nuclei, boxes (N, 4) in um."""
        centres = centres_of(nuclei)
        cell, more = _on(centres, cells.centres)
        # a place for each tile that may show the nucleus, its own first; what other tiles have found is far away
        core, shifts = cells.core_of(centres), sorted(product((-1, 0, 1), repeat=2), key=any)
        places = np.concatenate([np.hstack([centres, (core + shift) * 1e3]) for shift in shifts])
        finding, own_more = (values[: len(nuclei)] for values in _on(places, cells.findings * [1, 1, 1e3, 1e3]))
        return cls(cell, more, finding >= 0, own_more)


def _on(nuclei: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the point (N,) of others (n, d) on each nucleus (N, d), -1: none, and how many more there are (N,)."""
    first = paired(nuclei, others)
    left = np.setdiff1d(np.arange(len(others)), first)
    distance, on = cKDTree(nuclei).query(others[left])
    on = on[distance <= RADIUS]
    return first, np.bincount(on[first[on] >= 0], minlength=len(nuclei))


def with_error(values: NDArray[np.number]) -> str:
    """Mean of values (n,) and its standard error, %."""
    return f"{100 * values.mean():+5.2f} ± {100 * values.std() / np.sqrt(max(len(values), 1)):.2f}"


def difference(values: NDArray[np.number], near: NDArray[np.bool_]) -> str:
    """Show values (runs, N) in % near borders, inside, and what a border changes for a nucleus that was in both."""
    both = near.any(axis=0) & ~near.all(axis=0)
    ones, others = ((values * place).sum(axis=0)[both] / place.sum(axis=0)[both] for place in (near, ~near))
    return f"{100 * values[near].mean():5.2f} {100 * values[~near].mean():5.2f} {with_error(ones - others)}"


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
    parser.add_argument("--shifts", type=int, default=4, help="runs per margin, at least 2")
    parser.add_argument("--centred", type=int, default=4, help="runs in centred tiles; 0 (with --nuclei) or at least 2")
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
        centred = [bench.run(5 / 16 * model.size * model.mpp, number) for number in range(options.centred)]
        if options.nuclei is None:
            nuclei = centred[0].boxes
        else:
            nuclei = read_nucleus_file(options.nuclei, image_mpp=mpp, mpp=1.0).nuclei.boxes
        own = [Found.of(nuclei, cells).cell for cells in centred]
        print(f"{len(nuclei)} nuclei")
        if centred:
            pairs = combinations(zip(centred, own, strict=True), 2)
            distance, classes = np.nanmean([likeness(*one, *two) for one, two in pairs], axis=(0, 2))
            print(f"two centred tiles: distance {distance:.4f}, class {100 * classes:.2f} %")
        columns = f"{'lost: near, inside, difference':^32} | {'joined':^13} | {'twice':^13} | distance      | class"
        print(f"margin   tiles | {columns}")
        for margin in options.margins:
            runs = [bench.run(margin, number) for number in range(options.shifts)]
            found = [Found.of(nuclei, cells) for cells in runs]
            near = np.array([cells.from_border(centres_of(nuclei)) < options.zone for cells in runs])
            lost = np.array([one.cell < 0 for one in found])
            joined = np.array([(one.cell >= 0).astype(int) - one.own for one in found])
            twice = np.array([one.more - one.own_more for one in found])
            line = f"{margin:6g} {np.mean([cells.tiles for cells in runs]):7.0f}"
            line += f" | {difference(lost, near):>32} | {with_error(joined[near])} | {with_error(twice[near])}"
            if centred:
                alike = np.array(
                    [
                        [likeness(*other, cells, one.cell) for cells, one in zip(runs, found, strict=True)]
                        for other in zip(centred, own, strict=True)
                    ]
                )  # (centred, runs, 2, N)
                (near_d, near_c), (in_d, in_c) = (
                    [np.nanmean(alike[:, :, value][:, place]) for value in (0, 1)] for place in (near, ~near)
                )
                line += f" | {near_d:.4f} {in_d:.4f} | {100 * near_c:.2f} {100 * in_c:.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
