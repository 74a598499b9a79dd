"""Registration and cell typing of Xenium samples against planted truth: one row for each thing that goes wrong.

Usage: python tests/benchmarks/xenium.py [--real FOLDER] [--counts FILE]
  [--labelled FILE] [--transcripts N] [--size W H] [--seed N] [--only NAME ...]

It measures the library that Python finds, so the table before a change comes from the same program:
  git worktree add ../before f500e62
  PYTHONPATH=../before/scripts python tests/benchmarks/xenium.py   # before
  PYTHONPATH=scripts python tests/benchmarks/xenium.py             # now
The oldest revision that it runs on is f500e62.

Registration: a section of `--size` um, drawn (as the example), or with `--real` a mosaic of real H&E tiles
(FOLDER/images; FOLDER/labels/NAME_label.png or labels.npz with names and instances). Its DAPI image is drawn from the
nuclei. Xenium outlines 9 of 10 nuclei, 0.2 um off. Columns:
  median, 95 %  um between where a nucleus is on the H&E and where it is put, of all nuclei that the H&E shows (beyond
                a fold none)
  IoU           mean intersection over union of their boxes
  red           share of the regions that do not pass on their own
  patches       of 128 um, as for training
  wrong         % of their boxes, uncut, whose centre is more than 3 um from those of all nuclei that the H&E shows
  missed        % of the nuclei that the H&E shows in them with no centre of a box within 3 um (Xenium misses 10 %)
  how           origin of the matrix, "+ field" with local displacements, or refused
  s             seconds of CPU time
Typing: cells with the planted expression of the example, or with `--counts` (cell_feature_matrix.h5) real cells, whose
type is that of their markers, half of them as reference. With `--labelled` (.h5ad of raw counts; obs: type, label,
batch) the cells are drawn from the mean profiles that the labels have in one batch, each batch in turn, and the real
cells of the others are the reference. Columns:
  labelled      share of all cells that has a label
  right         share of the labels that are right
  wrong         of the cells of the type that the reference lacks, share with a label: by the thresholds alone, and now
  lost          % of the right labels that the thresholds alone would give and that are withdrawn
  unused        types whose labels are too imprecise to train with
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy
import shapely
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from planted_section import (
    Planted,
    Section,
    blanked,
    cell_ids,
    drawn_section,
    fields,
    folded,
    in_margin,
    plant,
    real_section,
)
from xenium_scene import PIXEL, SWAP, wave

from celldetr.config.classes import ST_TYPES
from celldetr.config.slides import PatchSettings
from celldetr.config.xenium import CellTypeSettings, RegistrationSettings
from celldetr.example.xenium import expression
from celldetr.runtime.errors import InputError
from celldetr.store import open_store
from celldetr.xenium.celltypes.annotate import annotate
from celldetr.xenium.celltypes.labels import FRACTIONS, IMPRECISE, REASONS, UNKNOWN, UNLIKE, best, write_cells
from celldetr.xenium.celltypes.reference import prepare_reference
from celldetr.xenium.patches import Sample, extract_sample
from celldetr.xenium.registration.affine import affine, apply, inverse
from celldetr.xenium.registration.alignment import read_alignment
from celldetr.xenium.registration.register import register
from celldetr.xenium.registration.result import Registration

Matrix = NDArray[np.float64]
_NEAR = 3.0  # um; a box that is farther off does not hold its nucleus
_PATCH, _PATCH_MPP, _EDGE = 256, 0.5, 8.0  # px, um per px, um from the edge of a patch where nuclei may be cut
_DIRECTION = np.array([0.6, 0.8])  # of the errors of files
_KEYPOINTS, _KEYPOINT_NOISE, _KEYPOINT_ERROR = 12, 0.5, 150.0  # number; um; um of the wrong one
_TISSUE = dict(zip(ST_TYPES, (0.16, 0.10, 0.30, 0.04, 0.02, 0.12, 0.10, 0.06, 0.06, 0.04), strict=True))
_FEWEST = 40  # real cells of a type
_SPREAD = 300  # of Dirichlet draws around a profile, pseudo-counts
_GATE = 3, 0.7  # transcripts of the markers of a type, and their share of those of all markers, in a real cell


@dataclass(frozen=True)
class Variant:
    """One row: how the section is changed and planted, and the alignment file."""

    name: str
    file: Callable[[Planted], Matrix] | str | None = None  # matrix of the file; "keypoints"; None: no file
    change: Callable[[Section], Section] = lambda section: section
    plan: dict[str, object] | None = None  # see `plant`
    mpp: float = 1.0  # um per px that are stated, as a factor of what they are
    foreign: bool = False  # the Xenium output is that of another section


def off(distance: float) -> Callable[[Planted], Matrix]:
    """File that is wrong by a shift, um."""
    return lambda planted: affine(np.eye(2), distance / PIXEL * _DIRECTION) @ planted.matrix


def exact(planted: Planted) -> Matrix:
    """Right file."""
    return planted.matrix


def only_fields(section: Section) -> Section:
    """Fields of tissue of 60 to 120 um on glass."""
    middles, radii = fields(np.random.default_rng(5), section)

    def visible(x: Matrix, y: Matrix) -> NDArray[np.bool_]:
        found = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
        for (x0, y0), radius in zip(middles, radii, strict=True):
            found |= (x - x0) ** 2 + (y - y0) ** 2 < radius**2
        return found

    found = blanked(section, visible)
    return found.only(found.visible)  # the tissue ends there, for both images


def without_third(section: Section) -> Section:
    """H&E without the right third."""
    return blanked(section, lambda x, y: (x < section.extent[0] * 2 / 3) & (y > -1))


def variants(section: Section) -> list[Variant]:
    """Build the rows of registration for a section."""
    width = section.extent[0]
    half: dict[str, object] = {"segmented": lambda centres: np.arange(len(centres)) % 2 == 0}
    left: dict[str, object] = {"segmented": lambda centres: centres[:, 0] < width / 2}
    waves = [(largest, length) for length in (300, 1000) for largest in (2, 4, 6)]
    return [
        Variant("exact file", exact),
        *(Variant(f"file off by {distance:g} um", off(distance)) for distance in (0.5, 3, 30)),
        Variant("inverse matrix", lambda planted: inverse(planted.matrix)),
        Variant("x and y swapped", lambda planted: planted.matrix @ SWAP),
        Variant("keypoints, one wrong", "keypoints"),
        Variant("no file"),
        Variant("no file, mirrored", plan={"flip": True, "angle": -100.0}),
        Variant("no file, um/px stated 1.3 times", mpp=1.3),
        Variant("no file, margins of 500 um", change=lambda found: in_margin(found, 500)),
        Variant("fields of 60-120 um", exact, only_fields),
        Variant("no file, fields of 60-120 um", None, only_fields),
        Variant("half of the nuclei unsegmented", exact, plan=half),
        Variant("no file, half unsegmented", None, plan=half),
        Variant("half of the section unsegmented", exact, plan=left),
        Variant("a third missing", exact, without_third),
        Variant("a third missing, 4 um over 300 um", exact, without_third, {"bend": wave(4, 300)}),
        Variant("a fold of 30 um", exact, lambda found: folded(found, 0.75 * width, 30)),
        *(Variant(f"{most} um over {length} um", exact, plan={"bend": wave(most, length)}) for most, length in waves),
        Variant("no file, 4 um over 300 um", plan={"bend": wave(4, 300)}),
        Variant("another section", exact, foreign=True),
        Variant("another section, half unsegmented", exact, plan=half, foreign=True),
    ]


def write_file(folder: Path, variant: Variant, planted: Planted, size: Matrix, seed: int) -> Path:
    """Write the alignment file of a variant; `size` is that of the H&E, px."""
    path = folder / "alignment.csv"
    if callable(variant.file):
        np.savetxt(path, variant.file(planted), delimiter=",", fmt="%.12g")
        return path
    rng = np.random.default_rng(seed)
    points = rng.uniform(0.1, 0.9, (_KEYPOINTS, 2)) * size
    fixed = apply(planted.matrix, points) + _KEYPOINT_NOISE / PIXEL * rng.standard_normal(points.shape)
    fixed[3] += _KEYPOINT_ERROR / PIXEL * _DIRECTION
    header = "fixedX,fixedY,alignmentX,alignmentY"
    np.savetxt(path, np.hstack([fixed, points]), delimiter=",", fmt="%.6f", header=header, comments="")
    return path


def run_variant(variant: Variant, section: Section, other: Section, folder: Path, seed: int) -> str:
    """Register a variant: its row."""
    changed = variant.change(section)
    planted = plant(folder, changed, seed=seed, **(variant.plan or {}))  # type: ignore[arg-type]
    if variant.foreign:
        stranger = plant(folder / "other", other, seed=seed, **(variant.plan or {}))  # type: ignore[arg-type]
        planted = replace(planted, outs=stranger.outs, nuclei=stranger.nuclei)
    he, dapi = planted.open(planted.mpp * variant.mpp)
    path = write_file(folder, variant, planted, np.array(he.size, float), seed) if variant.file else None
    start = time.process_time()
    try:
        alignment = read_alignment(path) if path else None
        found = register(he, dapi, planted.nuclei, PIXEL, alignment, RegistrationSettings(), name="bench", seed=seed)
    except InputError:
        return f"{'':7} {'':6} {'':5} {'':5} {'':8} {'':6} {'':7} {time.process_time() - start:5.0f}  refused"
    finally:
        he.close()
        dapi.close()
    seconds = time.process_time() - start
    how = found.origin + (" + field" if found.field is not None else "")
    red = np.mean([not region.passed for region in found.quality.regions])
    if variant.foreign:
        return f"{'':7} {'':6} {'':5} {red:5.2f} {'':8} {'':6} {'':7} {seconds:5.0f}  PASSED: {how}"
    distance, share = (values[planted.in_place] for values in planted.boxes(found))
    figures = f"{np.median(distance):7.2f} {np.percentile(distance, 95):6.2f} {share.mean():5.2f} {red:5.2f}"
    return f"{figures} {cut(planted, found, folder)} {seconds:5.0f}  {how}"


def cut(planted: Planted, registration: Registration, folder: Path) -> str:
    """Cut the patches: their number, boxes without a nucleus, nuclei without a box, %."""
    registration.write(folder / "registration.json", "bench")
    names = cell_ids(planted.nuclei)
    cells = pd.DataFrame({"cell_id": names, "label": np.int8(0), "reason": "labelled"})
    cells[list(FRACTIONS)] = np.repeat(np.eye(1, len(FRACTIONS), dtype=np.float32), len(names), axis=0)
    write_cells(folder / "cells.parquet", cells, {})
    files = planted.outs, planted.he_path, folder / "registration.json", folder / "cells.parquet"
    options = {"size": _PATCH, "mpp": _PATCH_MPP, "settings": PatchSettings(), "seed": 0, "workers": 1}
    try:
        extract_sample(Sample("bench", "", "", *files), folder / "bench.zarr", **options)  # type: ignore[arg-type]
    except InputError:
        return f"{0:8} {'':6} {'':7}"
    store = open_store(folder / "bench.zarr")
    um, side = planted.mpp, _PATCH * _PATCH_MPP
    nuclei = shapely.get_coordinates(shapely.centroid(planted.shown[planted.visible])) * um
    corners = store.patches[["x", "y"]].to_numpy() * um
    owner = np.repeat(np.arange(len(store)), np.diff(store.box_ptr))
    middles = corners[owner] + (store.boxes[:, :2] + store.boxes[:, 2:]) / 2 * _PATCH_MPP
    whole = ((store.boxes[:, :2] > 0.1) & (store.boxes[:, 2:] < _PATCH - 0.1)).all(axis=1)
    away = nuclei[:, None] - corners
    inside = ((away >= _EDGE) & (away < side - _EDGE)).all(axis=2).any(axis=1)
    wrong = cKDTree(nuclei).query(middles[whole])[0] > _NEAR
    missed = cKDTree(middles).query(nuclei[inside])[0] > _NEAR
    return f"{len(store):8} {100 * wrong.mean():6.1f} {100 * missed.mean():7.1f}"


def drawn_cells(folder: Path, seed: int, cells: int = 4000) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Cells of the example's expression, obs["truth"], and the prepared reference."""
    rng = np.random.default_rng([seed, 23])
    expression.write_reference(folder / "reference.h5ad", seed=seed, cells=3000)
    reference, _ = prepare_reference(
        folder / "reference.h5ad",
        expression.REFERENCE_LABELS,
        label_column="cell_type",
        cells_per_type=2000,
        seed=seed,
    )
    kinds = rng.choice(list(_TISSUE), cells, p=list(_TISSUE.values()))
    own = {kind: {k: v.tissue for k, v in expression.SUBTYPES.items() if v.type == kind} for kind in _TISSUE}
    labels = np.array([rng.choice(list(own[kind]), p=list(own[kind].values())) for kind in kinds])
    counts = expression.draw_counts(rng, labels, rng.random((cells, 2)) * np.sqrt(cells) * 10)
    var = pd.DataFrame({"gene_ids": [expression.gene_id(gene) for gene in expression.PANEL]}, index=expression.PANEL)
    return _table(counts, kinds, var), reference


def real_cells(path: Path, seed: int) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Real cells whose markers are of one type: half as sample, obs["truth"], half as prepared reference.

    Malignant cells, which have no markers of their own kind, and types of few cells are left out.
    """
    rng = np.random.default_rng(seed)
    whole = scanpy.read_10x_h5(path)
    whole.var_names_make_unique()
    kinds = [kind for kind in ST_TYPES if kind != "Malignant"]
    markers = {kind: [gene for gene in expression.MARKERS[kind] if gene in whole.var_names] for kind in kinds}
    amount = np.stack([np.asarray(whole[:, markers[kind]].X.sum(axis=1)).ravel() for kind in kinds], axis=1)
    sure = (amount.max(axis=1) >= _GATE[0]) & (amount.max(axis=1) >= _GATE[1] * amount.sum(axis=1))
    truth = np.array(kinds)[amount.argmax(axis=1)]
    rows = [rng.permutation(np.flatnonzero(sure & (truth == kind)))[:1500] for kind in kinds]
    taken = np.concatenate([row for row in rows if len(row) >= _FEWEST])
    half = rng.random(len(taken)) < 0.5
    var = pd.DataFrame(index=whole.var_names)
    reference = _table(whole.X[taken[half]], truth[taken[half]], var)
    reference.obs["type"] = pd.Categorical(reference.obs["truth"], categories=ST_TYPES)
    reference.obs["label"] = reference.obs["truth"]
    reference.obs["held_out"] = rng.random(half.sum()) < 0.3
    reference.uns["composition"] = {kind: int((reference.obs["truth"] == kind).sum()) for kind in ST_TYPES}
    return _table(whole.X[taken[~half]], truth[taken[~half]], var), reference


def redrawn_cells(
    cells: anndata.AnnData, batch: str, transcripts: float, seed: int, number: int = 4000
) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Cells drawn from the mean profiles of a batch's labels, as many of each as it has; the real cells of the others.

    The depth of cells varies by a lognormal factor of 0.45.
    """
    rng = np.random.default_rng([seed, 5])
    own = (cells.obs["batch"] == batch).to_numpy()
    parts, truth = [], []
    for (kind, _), rows in cells.obs[own].groupby(["type", "label"], observed=True).groups.items():
        counts = cells[rows].X.toarray()
        profile = (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0) + 1e-7
        amount = round(number * len(rows) / own.sum())
        shares = rng.dirichlet(_SPREAD * profile / profile.sum(), amount)
        depths = rng.poisson(transcripts * rng.lognormal(0, 0.45, amount))
        parts += [rng.multinomial(depth, share / share.sum()) for depth, share in zip(depths, shares, strict=True)]
        truth += [kind] * amount
    others = cells[~own]
    reference = _table(others.X, others.obs["type"].to_numpy(dtype=str), cells.var)
    reference.obs["type"] = pd.Categorical(reference.obs["truth"], categories=ST_TYPES)
    reference.obs["label"] = others.obs["label"].to_numpy(dtype=str)
    reference.obs["held_out"] = rng.random(reference.n_obs) < 0.3
    reference.uns["composition"] = {kind: int((reference.obs["truth"] == kind).sum()) for kind in ST_TYPES}
    return _table(sparse.csr_matrix(np.stack(parts)), np.array(truth), cells.var), reference


def _table(counts: sparse.csr_matrix, truth: NDArray[np.str_], var: pd.DataFrame) -> anndata.AnnData:
    obs = pd.DataFrame({"truth": truth}, index=[f"cell{number}" for number in range(len(truth))])
    return anndata.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=obs, var=var)


def thinned(cells: anndata.AnnData, share: float, seed: int) -> anndata.AnnData:
    """Keep a share of the transcripts."""
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(cells.X, copy=True)
    counts.data = rng.binomial(counts.data.astype(int), share).astype(np.float32)
    counts.eliminate_zeros()
    return anndata.AnnData(counts, obs=cells.obs, var=cells.var)


def run_types(cells: anndata.AnnData, reference: anndata.AnnData, lacking: str, seed: int) -> str:
    """Annotate the cells by a reference without a type, or a complete one (""): the row."""
    if lacking:
        reference = reference[(reference.obs["type"] != lacking).to_numpy()].copy()
        reference.uns["composition"] = {**reference.uns["composition"], lacking: 0}
    truth = cells.obs["truth"].map(ST_TYPES.index).to_numpy()
    start = time.process_time()
    try:
        found = annotate(cells, reference, CellTypeSettings(), seed)
    except InputError:
        return "refused"
    seconds = time.process_time() - start
    label = found.table["label"].to_numpy()
    withdrawn = found.table["reason"].isin([REASONS[0], UNKNOWN, UNLIKE, IMPRECISE]).to_numpy()
    alone = np.where(withdrawn, best(found.table.filter(like="fraction_")), -1)
    lost = 1 - (label >= 0)[alone == truth].mean()
    own = cells.obs["truth"].to_numpy() == lacking
    wrong = f"{(alone >= 0)[own].mean():5.2f} {(label >= 0)[own].mean():5.2f}" if lacking else f"{'':11}"
    figures = f"{(label >= 0).mean():8.2f} {(label == truth)[label >= 0].mean():6.3f}  {wrong} {100 * lost:5.1f}"
    return f"{figures}  {seconds:5.0f}  {', '.join(found.unused)}"


def registrations(options: argparse.Namespace, wanted: Callable[[str], bool]) -> None:
    """Print the table of registration."""
    if options.real:
        section, other = (real_section(options.real, options.size, options.mpp, part=part) for part in (0, 1))
    else:
        section, other = (drawn_section(options.seed + index, options.size) for index in (0, 1))
    print(f"{len(section.outlines)} nuclei on {section.extent.round().astype(int).tolist()} um")
    columns = ("median", 7), ("95 %", 6), ("IoU", 5), ("red", 5), ("patches", 8), ("wrong", 6), ("missed", 7), ("s", 5)
    print(" " * 36, *(f"{name:>{width}}" for name, width in columns), " how")
    for variant in variants(section):
        if wanted(variant.name):
            with tempfile.TemporaryDirectory() as folder:
                row = run_variant(variant, section, other, Path(folder), options.seed)
            print(f"{variant.name:36} {row}", flush=True)


def typings(options: argparse.Namespace, wanted: Callable[[str], bool]) -> None:
    """Print the tables of cell typing."""
    made: dict[str, tuple[anndata.AnnData, anndata.AnnData]] = {}
    if options.labelled:
        labelled = anndata.read_h5ad(options.labelled)
        for batch in labelled.obs["batch"].unique():
            made[f"{batch}: "] = redrawn_cells(labelled, batch, options.transcripts, options.seed)
    elif options.counts:
        made[""] = real_cells(options.counts, options.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            made[""] = drawn_cells(Path(folder), options.seed)
    for start, (cells, reference) in made.items():
        print(f"\n{cells.n_obs} cells, {reference.n_obs} of the reference")
        print(f"{'':36} {'labelled':>8} {'right':>6}  {'wrong':>11} {'lost':>5}  {'s':>5}  unused")
        rows = [("complete reference", cells, "")]
        rows += [("counts x 0.12", thinned(cells, 0.12, options.seed), "")]
        rows += [(f"without {kind}", cells, kind) for kind in ST_TYPES if (reference.obs["type"] == kind).any()]
        for name, sample, lacking in rows:
            if wanted(start + name):
                print(f"{start + name:36} {run_types(sample, reference, lacking, options.seed)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Xenium registration and cell typing against planted truth.")
    parser.add_argument("--real", type=Path, help="folder of real H&E tiles and their instances")
    parser.add_argument("--mpp", type=float, default=0.25, help="um per px of the real tiles")
    parser.add_argument("--counts", type=Path, help="real cell_feature_matrix.h5")
    parser.add_argument("--labelled", type=Path, help="real counts (.h5ad) of several batches; obs: type, label, batch")
    parser.add_argument("--transcripts", type=float, default=60.0, help="per cell drawn from them")
    parser.add_argument("--size", type=float, nargs=2, default=(760.0, 560.0), help="width and height, um")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the rows")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)

    def wanted(name: str) -> bool:
        return not options.only or any(part in name for part in options.only)

    registrations(options, wanted)
    typings(options, wanted)


if __name__ == "__main__":
    main()
