"""Patches of a registered Xenium sample: map its nuclei onto the H&E, label them by cell type, cut the patches."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from pandas import DataFrame, Index, Series

from celldetr.config.classes import ST_TYPES
from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei, place_outlines
from celldetr.slides.cutting import cut_patches
from celldetr.slides.grid import PatchGrid, patch_grid
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster, imaged, tissue_maps
from celldetr.store import NO_LABEL, class_counts
from celldetr.xenium.celltypes.labels import FRACTIONS, IMPRECISE, UNKNOWN, best, read_cells, read_metadata
from celldetr.xenium.output import dapi_path, read_nuclei
from celldetr.xenium.registration.affine import apply
from celldetr.xenium.registration.result import Registration, read_registration
from celldetr.xenium.unsegmented import visible_nuclei

log = logging.getLogger(__name__)

_FAILED = "in a region whose registration fails"
_MISPLACED = "with many nuclei where the H&E shows none (a fold, a tear)"
_MOST_MISPLACED = 0.2  # share of the nuclei of a patch
_MANY_ON_GLASS = 0.02  # share of the nuclei on the H&E
_MANY_UNSEGMENTED = 0.2  # share of the patches
_MANY_MISPLACED = 0.05  # share of the patches


@dataclass(frozen=True)
class Sample:
    """A sample: its names, output folder, H&E image, registration (JSON) and labelled cells (Parquet)."""

    name: str
    group: str
    tissue: str
    outs: Path
    he: Path
    registration: Path
    cells: Path


@dataclass(frozen=True)
class Extraction:
    """Patches of a sample."""

    grid: PatchGrid
    tissue: Raster
    rows: list[tuple[str, str, int]]  # kind, name, count: the summary
    warnings: list[str]


def extract_sample(
    sample: Sample,
    out: str | os.PathLike[str],
    *,
    size: int,
    mpp: float,
    settings: PatchSettings,
    seed: int,
    workers: int,
) -> Extraction:
    """Cut a registered, labelled sample into patches of `size` px of `mpp` um; the classes are the ten cell types.

    Raises InputError if a file is damaged, the files are of different samples, or no patch meets the thresholds.
    """
    registration = read_registration(sample.registration, sample.name)
    he_mpp = registration.he_mpp
    cells = read_cells(sample.cells)
    placed, dropped = place_nuclei(read_nuclei(sample.outs), cells, registration, mpp)
    dapi_image = open_pyramid(dapi_path(sample.outs), registration.pixel_size, plane=0)
    with open_pyramid(sample.he, he_mpp) as image, dapi_image as dapi:
        tissue, stained = tissue_maps(image, he_mpp)
        on_slide = placed.on_slide((image.size[0] * he_mpp / mpp, image.size[1] * he_mpp / mpp))
        nuclei = on_slide.select(stained.touches(on_slide.boxes * (mpp / he_mpp)))
        grid = patch_grid(
            image.size,
            he_mpp,
            nuclei,
            size=size,
            mpp=mpp,
            tissue=tissue,
            settings=settings,
            seed=seed,
            imaged=imaged(dapi, registration.pixel_size, tissue, registration.matrix),
        )
        where = {"file": sample.he.name, "size": list(image.size), "mpp": he_mpp}
    on_glass = len(on_slide) - len(nuclei)
    failed = _failed_patches(grid, registration)
    grid = grid.without(failed, _FAILED) if len(failed) else grid
    seen = visible_nuclei(sample.he, grid, nuclei, workers)
    misplaced = np.flatnonzero(seen.misplaced > _MOST_MISPLACED)
    if len(misplaced):
        grid, seen = grid.without(misplaced, _MISPLACED), seen.select(np.setdiff1d(np.arange(len(grid)), misplaced))
    if not len(grid):
        raise _no_patch(sample.name, grid, nuclei, on_glass)
    dropped |= {
        "nuclei outside of the H&E image": len(placed) - len(on_slide),
        "nuclei on blank glass of the H&E image": on_glass,
        **grid.dropped(len(nuclei)),
    }
    complete = seen.share <= settings.max_unsegmented
    warnings = [*registration.warnings, *_warnings(sample.name, on_glass, len(on_slide), len(misplaced), complete)]
    attrs = {
        "image": where,
        "dropped": dropped,
        "settings": {**settings.to_dict(), "seed": seed},
        "registration": {
            "matrix": registration.matrix.tolist(),
            "origin": registration.origin,
            "field": registration.field.digest if registration.field else None,
        },
    }
    cut_patches(
        sample.he,
        grid,
        nuclei.labels,
        out,
        classes=ST_TYPES,
        source=sample.name,
        group=sample.group,
        tissue=sample.tissue,
        attrs=attrs,
        complete=complete,
        workers=workers,
    )
    rows = _summary(grid, nuclei.labels, dropped, complete, int(seen.missing.sum()))
    return Extraction(grid, tissue, rows + type_rows(cells, read_metadata(sample.cells)), warnings)


def place_nuclei(
    polygons: DataFrame, cells: DataFrame, registration: Registration, mpp: float
) -> tuple[SlideNuclei, dict[str, int]]:
    """Map nuclei onto the H&E image and label them by their cells.

    `polygons` has ``cell_id`` and ``geometry`` (um of the Xenium frame), `cells` has ``cell_id`` and ``label``. Returns
    outlines in px of `mpp` um, and dropped cells and nuclei, reason -> count. Raises InputError if no nucleus belongs
    to any of the cells.
    """
    outlines = shapely.transform(polygons["geometry"].to_numpy(), registration.on_affine)
    placed, good = place_outlines(outlines, registration.um_to_he(), registration.he_mpp, mpp)
    label_of = Series(cells["label"].to_numpy(), index=cells["cell_id"].to_numpy().astype(str))
    owners = polygons["cell_id"].to_numpy().astype(str)
    index = label_of.index.get_indexer(Index(owners))
    if len(owners) and not (index >= 0).any():
        raise InputError(
            f"cells: got ids like {label_of.index[:3].tolist()}, but the nuclei have ids like "
            f"{owners[:3].tolist()}; expected both of the same sample: annotate it again"
        )
    labels = np.where(index >= 0, label_of.to_numpy()[index], NO_LABEL).astype(np.int8)
    dropped = {
        "cells without a nucleus outline": int((~label_of.index.isin(owners)).sum()),
        "nuclei with an outline of no area or fewer than 3 corners": int((~good).sum()),
    }
    return SlideNuclei(placed[good], labels[good]), dropped


def type_rows(cells: DataFrame, metadata: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Rows (kind, name, cells of the sample) on types without labels; arguments are those of `write_cells`."""
    first, reason = best(cells[list(FRACTIONS)]), cells["reason"].astype(str).to_numpy()
    unused = [
        (
            "not used for training",
            f"{name}: estimated precision {metadata['precision'][name]:.2f}",
            int(((reason == IMPRECISE) & (first == ST_TYPES.index(name))).sum()),
        )
        for name in metadata.get("unused_types", [])
    ]
    missing = [("not in the reference", name, 0) for name in metadata.get("missing_types", [])]
    unknown = int((reason == UNKNOWN).sum())
    return [*unused, *missing, *([("not in the reference", "cells of unknown types", unknown)] if unknown else [])]


def _failed_patches(grid: PatchGrid, registration: Registration) -> NDArray[np.int64]:
    """Patches whose centre lies in a region of the sample that does not pass on its own."""
    centres = (grid.corners + grid.size / 2) * (grid.mpp / grid.image_mpp)
    return np.flatnonzero(registration.failed(apply(registration.he_to_um(), centres)))


def _no_patch(name: str, grid: PatchGrid, nuclei: SlideNuclei, on_glass: int) -> InputError:
    return InputError(
        f"{name}: got no patch; the grid has "
        + ", ".join(f"{count} {reason}" for reason, count in grid.passed_over.items())
        + f"; {class_counts(nuclei.labels, ST_TYPES)} nuclei lie on the H&E, {on_glass} more on its blank "
        "glass: look at the registration and the cell types, or lower xenium.patches.min_tissue and min_labelled"
    )


def _warnings(name: str, on_glass: int, nuclei: int, misplaced: int, complete: NDArray[np.bool_]) -> list[str]:
    """Sentences for the user, also in the log, if many nuclei or patches are lost, or many patches are incomplete."""
    found, unsegmented, patches = [], int((~complete).sum()), len(complete)
    if on_glass > _MANY_ON_GLASS * nuclei:
        found.append(
            f"{on_glass:,} of {nuclei:,} nuclei ({on_glass / nuclei:.0%}) lie on blank glass of the H&E image and have "
            "no box: does the image lack a part of the section?"
        )
    if misplaced > _MANY_MISPLACED * (patches + misplaced):
        found.append(
            f"{misplaced:,} of {patches + misplaced:,} patches ({misplaced / (patches + misplaced):.0%}) are left out: "
            "where many of their nuclei should be the H&E shows none. Is it folded, torn or out of focus there, or the "
            "registration wrong? Look at registration.png"
        )
    if unsegmented > _MANY_UNSEGMENTED * patches:
        found.append(
            f"{unsegmented:,} of {patches:,} patches ({unsegmented / patches:.0%}) show many nuclei without a box, and "
            "are in no validation or test: Xenium did not segment them (xenium.patches.max_unsegmented), the "
            "registration is wrong there by 3 um or more, or dark spots there are no nuclei (ink, pigment): look at "
            "the red squares and at registration.png"
        )
    for text in found:
        log.warning("%s: %s", name, text)
    return found


def _summary(
    grid: PatchGrid, labels: NDArray[np.int8], dropped: Mapping[str, int], complete: NDArray[np.bool_], missing: int
) -> list[tuple[str, str, int]]:
    """Rows (kind, name, count); `labels` are those of all nuclei on the H&E, `missing` were seen without an outline."""
    inside = labels[grid.boxes.nuclei]
    return [
        ("total", "patches", len(grid)),
        ("total", "nuclei in patches", len(inside)),
        ("total", "cut nuclei in patches", int(grid.boxes.cut.sum())),
        ("total", "labelled nuclei in patches", int((inside != NO_LABEL).sum())),
        ("total", "patches in which Xenium did not segment many of the visible nuclei", int((~complete).sum())),
        ("total", "clearly visible in patches but not segmented", missing),
        ("total", "nuclei on the H&E", len(labels)),
        *(("class", name, count) for name, count in class_counts(inside, ST_TYPES).items()),
        *(("dropped", name, count) for name, count in dropped.items()),
        *(("not taken", f"patches {name}", count) for name, count in grid.passed_over.items()),
    ]
