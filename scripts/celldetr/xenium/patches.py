"""Patches of a Xenium sample: its nuclei with the labels of their cells, laid over its H&E image, and cut out."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame, Index, Series

from celldetr.config.classes import ST_TYPES
from celldetr.config.slides import PatchSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideBoxes, boxes_from_polygons
from celldetr.slides.cutting import cut_patches
from celldetr.slides.grid import PatchGrid, patch_grid
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster, imaged, tissue_mask
from celldetr.store import NO_LABEL, class_counts
from celldetr.xenium.celltypes.labels import read_cells
from celldetr.xenium.output import dapi_path, read_nuclei
from celldetr.xenium.registration.result import Registration, read_registration


@dataclass(frozen=True)
class SampleFiles:
    """Files of a sample: output folder, H&E image, registration (JSON), labelled cells (Parquet)."""

    outs: Path
    he: Path
    registration: Path
    cells: Path


@dataclass(frozen=True)
class Extraction:
    """What was cut out of a slide.

    Attributes
    ----------
    grid
        The patches.
    tissue
        Where there is tissue.
    nuclei
        Nuclei with a box, px of the grid.
    dropped
        Reason -> nuclei or cells that are in no patch.
    """

    grid: PatchGrid
    tissue: Raster
    nuclei: SlideBoxes
    dropped: Mapping[str, int]


def extract_sample(
    files: SampleFiles,
    out: str | os.PathLike[str],
    *,
    sample: str,
    group: str,
    tissue: str,
    size: int,
    mpp: float,
    settings: PatchSettings,
    seed: int,
    workers: int,
) -> Extraction:
    """Cut a registered, labelled sample into patches.

    Parameters
    ----------
    files
        What is read.
    out
        Store to write; its classes are the ten cell types.
    sample, group, tissue
        Name of the sample, its slide or donor, and its organ.
    size, mpp
        Side of a patch in px, and size of its pixels in um.
    settings
        Which patches are taken.
    seed
        Seed of the draw.
    workers
        Threads.

    Raises
    ------
    InputError
        A file is damaged, the files are not of one sample, or no patch is taken.
    """
    registration = read_registration(files.registration)
    cells = read_cells(files.cells)
    nuclei, dropped = place_nuclei(read_nuclei(files.outs), cells, registration, mpp)
    with open_pyramid(files.he, registration.he_mpp) as image:
        tissue_raster = tissue_mask(image, registration.he_mpp)
        scale = registration.he_mpp / mpp
        placed, nuclei = nuclei, nuclei.on_slide((image.size[0] * scale, image.size[1] * scale))
        with open_pyramid(dapi_path(files.outs), registration.pixel_size, plane=0) as dapi:
            covered = imaged(dapi, registration.pixel_size, tissue_raster, registration.matrix)
        grid = patch_grid(
            image.size,
            registration.he_mpp,
            nuclei,
            size=size,
            mpp=mpp,
            tissue=tissue_raster,
            settings=settings,
            seed=seed,
            imaged=covered,
        )
        where = {"file": Path(files.he).name, "size": list(image.size), "mpp": registration.he_mpp}
    if not len(grid):
        raise InputError(
            f"{sample}: got no patch; of the grid there were "
            + ", ".join(f"{count} {reason}" for reason, count in grid.passed_over.items())
            + f"; {class_counts(nuclei.labels, ST_TYPES)} nuclei lie on the H&E: look at the registration and the cell "
            "types, or lower patches.min_tissue and patches.min_labelled"
        )
    dropped |= {
        "nuclei outside of the H&E image": len(placed) - len(nuclei),
        "nuclei in no patch that was taken": len(nuclei) - len(np.unique(grid.nuclei)),
    }
    attrs = {
        "image": where,
        "dropped": dropped,
        "settings": {**settings.to_dict(), "seed": seed},
        "registration": {"matrix": registration.matrix.tolist(), "origin": registration.origin},
    }
    cut_patches(
        files.he,
        grid,
        nuclei,
        out,
        classes=ST_TYPES,
        source=sample,
        group=group,
        tissue=tissue,
        attrs=attrs,
        workers=workers,
    )
    return Extraction(grid, tissue_raster, nuclei, dropped)


def place_nuclei(
    polygons: DataFrame, cells: DataFrame, registration: Registration, mpp: float
) -> tuple[SlideBoxes, dict[str, int]]:
    """Lay nuclei over the H&E image and give them the labels of their cells.

    Parameters
    ----------
    polygons
        ``cell_id`` and ``geometry`` (um of the Xenium frame), a row per nucleus.
    cells
        ``cell_id`` and ``label``, a row per cell.
    registration
        Of the sample.
    mpp
        Size of a pixel of the result in um.

    Returns
    -------
    tuple
        Nuclei in px of `mpp` um; and what was dropped: reason -> count.

    Raises
    ------
    InputError
        No nucleus belongs to any of the cells.
    """
    boxes, centroids = boxes_from_polygons(
        polygons["geometry"].to_numpy(), registration.um_to_he(), registration.he_mpp, mpp
    )
    label_of = Series(cells["label"].to_numpy(), index=cells["cell_id"].to_numpy().astype(str))
    owners = polygons["cell_id"].to_numpy().astype(str)
    place = label_of.index.get_indexer(Index(owners))
    if len(owners) and not (place >= 0).any():
        raise InputError(
            f"cells: got ids like {label_of.index[:3].tolist()}, but the nuclei have ids like "
            f"{owners[:3].tolist()}; expected both of one sample: annotate it again"
        )
    labels = np.where(place >= 0, label_of.to_numpy()[place], NO_LABEL).astype(np.int8)
    good: NDArray[np.bool_] = np.asarray(np.isfinite(boxes).all(axis=1))
    dropped = {
        "cells without a nucleus outline": int((~label_of.index.isin(owners)).sum()),
        "nuclei with an outline that has no area": int((~good).sum()),
    }
    return SlideBoxes(boxes, centroids, labels).keep(good), dropped


def summary_rows(found: Extraction, labels: NDArray[np.int8]) -> list[tuple[str, str, int]]:
    """Rows (kind, name, count) of a sample's summary; `labels` are those of the nuclei in the patches."""
    rows: list[tuple[str, str, Any]] = [
        ("total", "patches", len(found.grid)),
        ("total", "nuclei in patches", len(labels)),
        ("total", "labelled nuclei in patches", int((labels != NO_LABEL).sum())),
        ("total", "nuclei on the H&E", len(found.nuclei)),
        *(("class", name, count) for name, count in class_counts(labels, ST_TYPES).items()),
        *(("dropped", name, count) for name, count in found.dropped.items()),
        *(("not taken", f"patches {name}", count) for name, count in found.grid.passed_over.items()),
    ]
    return rows
