"""Cells that a user already has: their ids and outlines, and which detections agree with them."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.cells.given_files import EXPECTED, CellObjects, numbers, read_objects
from celldetr.cells.label_image import read_label_image
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei, centres_of, place_outlines
from celldetr.slides.outline_check import Keys, require_fit
from celldetr.slides.outline_files import read_format
from celldetr.slides.outlines import LONGEST_UM, check_width, file_to_level0, is_polygonal, longest_sides, name_counts
from celldetr.slides.pyramid import Pyramid
from celldetr.store import NO_LABEL

log = logging.getLogger(__name__)

_LARGEST_UM = 200.0  # longest side of what may be a cell; larger outlines are of tissue
_MOST_LISTS = 50  # features of a file that has one for each type
_DETECTED = ["cell", "detection"]


@dataclass(frozen=True)
class GivenCells:
    """Cells of a user's own segmentation (N), in the order of their file."""

    ids: NDArray[np.object_]
    """Ids (N,) as text, each once."""
    outlines: NDArray[np.object_]
    """Valid Polygons or MultiPolygons (N,) with an area, px of level 0."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def boxes(self) -> NDArray[np.float64]:
        """Boxes (N, 4) xyxy, px of level 0."""
        bounds: NDArray[np.float64] = shapely.bounds(self.outlines)
        return bounds


def agreement(given_boxes: NDArray[np.floating], found_boxes: NDArray[np.floating], radius: float) -> NDArray[np.int64]:
    """Index of the found box for each given one (n,), -1 if none; boxes (n, 4) and (m, 4) are xyxy px.

    One-to-one: of all pairs of centres at most `radius` px apart, the nearest is taken first.
    """
    given, found = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (given_boxes, found_boxes))
    partner = np.full(len(given), -1, np.int64)
    if not len(given) or not len(found):
        return partner
    trees = (cKDTree(centres_of(boxes)) for boxes in (given, found))
    pairs = next(trees).sparse_distance_matrix(next(trees), radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"], pairs["v"]))]
    free = np.ones(len(found), dtype=bool)
    one, other = pairs["i"], pairs["j"]
    while len(one):  # few rounds: a pair is taken once it is the nearest of both of its boxes
        nearest = np.zeros((2, len(one)), dtype=bool)
        for side, boxes in zip(nearest, (one, other), strict=True):
            side[np.unique(boxes, return_index=True)[1]] = True
        taken = nearest.all(axis=0)
        partner[one[taken]] = other[taken]
        free[other[taken]] = False
        left = (partner[one] < 0) & free[other]
        one, other = one[left], other[left]
    return partner


def read_given_cells(
    path: str | os.PathLike[str],
    image: Pyramid,
    *,
    name: str,
    unit: str = "px",
    diameter_um: float | None = None,
    nuclei_mpp: float | None = None,
    cell_outlines: bool = False,
    check_outlines: bool = True,
    keys: Keys | None = None,
) -> GivenCells:
    """Read the cells of a file, and check that they lie on the nuclei of their slide.

    For files see `celldetr.cells.given_files` and `celldetr.cells.label_image`.

    Nothing is left out but what QuPath says is no cell: tiles, and annotations among detections; the log counts them.

    Parameters
    ----------
    image
        The slide `name`, with a known pixel size.
    unit
        Of the file's coordinates, see `celldetr.slides.outlines.file_to_level0`; what columns state goes before.
    diameter_um
        Diameter of cells whose position is a point.
    nuclei_mpp
        um per px of a label image; None: it has the pixels of level 0.
    cell_outlines
        Take the outline of a cell if there is none of its nucleus.
    check_outlines
        Refuse cells that do not lie on what hematoxylin stains.
    keys
        What errors call these settings; None: options of a command.

    Raises
    ------
    InputError
        The file is not one of cells; a cell has no readable outline, no area or the id of another one, or is too
        large; or the cells do not fit the slide.
    """
    file, mpp, keys = Path(path), float(image.mpp or 0), keys or Keys()
    objects, to_level0 = _read_file(file, image, mpp, unit, diameter_um, nuclei_mpp, keys)
    cells = _split_lists(_without_others(objects), to_level0[0, 0] * mpp)
    _require_areas(cells, cell_outlines, keys)
    outlines, solid = place_outlines(cells.shapes, to_level0, mpp, mpp)
    cells.refuse(~solid, "cells without area")
    repaired = int((~shapely.is_valid(cells.shapes)).sum())
    given = GivenCells(cells.ids, outlines)
    _require_sizes(cells, given.boxes, mpp, unit, keys)
    nuclei = SlideNuclei(outlines, np.full(len(given), NO_LABEL, np.int8))
    inside, _ = require_fit(
        image,
        nuclei,
        mpp,
        name=name,
        file=file,
        unit=cells.unit or unit,
        insist=check_outlines,
        circles=cells.circles,
        keys=keys,
    )
    log.info(
        "%s: %d cells of %s, %d of them outside of the slide; %d outlines cross themselves and were repaired",
        name,
        len(given),
        file,
        len(given) - len(inside),
        repaired,
    )
    return given


def _read_file(
    file: Path,
    image: Pyramid,
    mpp: float,
    unit: str,
    diameter_um: float | None,
    nuclei_mpp: float | None,
    keys: Keys,
) -> tuple[CellObjects, NDArray[np.float64]]:
    """Read the objects of a file, and the matrix (3, 3) from its coordinates to px of level 0."""
    to_level0 = file_to_level0(unit, mpp, image.origin)
    if read_format(file, f"{EXPECTED}, or a label image")[0] == "image":
        _refuse_with_labels(file, unit, diameter_um, keys)
        objects = read_label_image(file, image.size, mpp, nuclei_mpp=nuclei_mpp, most_um=_LARGEST_UM, keys=keys)
    elif nuclei_mpp is not None:
        raise InputError(
            f"{file}: got no label image, and {keys('nuclei_mpp')}{keys.where}, which is for label images; leave it out"
        )
    else:
        objects = read_objects(file, um=to_level0[0, 0] * mpp, diameter_um=diameter_um)
    if objects.word != "label" and np.array_equal(objects.ids, numbers(len(objects))):
        log.info("%s: the cells are numbered in the order of the file", file)
    if objects.unit:
        if {unit, objects.unit} == {"px", "um"} and unit != "px":
            raise InputError(
                f"{file}: got columns in {objects.unit}, and {keys('nuclei_unit')} {unit}{keys.where}; leave it out"
            )
        to_level0[:2, :2] = file_to_level0(objects.unit, mpp, (0, 0))[:2, :2]
    return objects, to_level0


def _refuse_with_labels(file: Path, unit: str, diameter_um: float | None, keys: Keys) -> None:
    """Refuse settings that a label image does not take."""
    changed = {"nuclei_unit": unit != "px", "diameter_um": diameter_um is not None}
    if wrong := [keys(name) for name, other in changed.items() if other]:
        raise InputError(
            f"{file}: got a label image and {' and '.join(wrong)}{keys.where}; leave {' and '.join(wrong)} out: "
            "label images begin at the corner of level 0"
        )


def _without_others(objects: CellObjects) -> CellObjects:
    """Leave out what QuPath says is no cell."""
    kinds = objects.kinds
    detections = np.isin(kinds, _DETECTED).any()
    cells = np.isin(kinds, [*_DETECTED, ""]) if detections else ~np.isin(kinds, ["tile", "tmaCore", "tma_core", "root"])
    if not cells.all():
        log.warning("%s: left out: %s", objects.path, name_counts(Counter(kinds[~cells].tolist())))
    if not cells.any():
        raise InputError(f"{objects.path}: got no cell in {len(objects)} {objects.word}s, expected at least one")
    return objects.select(cells)


def _split_lists(cells: CellObjects, um: float) -> CellObjects:
    """Make a cell of each part of the outlines if a file has one for each type, as CellViT does; they have no ids.

    `um` is um per unit of the file.
    """
    wide = longest_sides(shapely.bounds(cells.shapes)) * um > LONGEST_UM
    lists = wide & (shapely.get_num_geometries(cells.shapes) > 1) & ~np.isin(cells.kinds, _DETECTED)
    if cells.word != "feature" or len(cells) > _MOST_LISTS or not lists.any():
        return cells
    parts, owner = shapely.get_parts(cells.shapes, return_index=True)
    lost = np.ones(len(cells), dtype=bool)
    lost[owner] = False
    cells.refuse(lost, "no outlines")
    log.warning(
        "%s: %d features are lists of %d cells, which have no ids; they are numbered in the order of the file",
        cells.path,
        len(cells),
        len(parts),
    )
    return CellObjects(cells.path, parts, numbers(len(parts)), cells.kinds[owner], "cell")


def _require_areas(cells: CellObjects, cell_outlines: bool, keys: Keys) -> None:
    """Refuse ids that occur twice, and what is no readable outline of a nucleus."""
    cells.refuse(pd.Series(cells.ids).duplicated().to_numpy(), "ids that occur twice", "give each cell its own id")
    corners, owner = shapely.get_coordinates(cells.shapes, return_index=True)
    empty = shapely.is_missing(cells.shapes) | shapely.is_empty(cells.shapes)
    empty[owner[~np.isfinite(corners).all(axis=1)]] = True
    cells.refuse(empty, "empty or unreadable outlines")
    cells.refuse(~is_polygonal(cells.shapes), "points or lines", "give outlines, or a table of points with diameter_um")
    if not cell_outlines:
        remedy = f"set {keys('cell_outlines')} to yes to take those of the cells{keys.where}"
        cells.refuse(cells.kinds == "cell", "cells without an outline of the nucleus", remedy)


def _require_sizes(cells: CellObjects, boxes: NDArray[np.float64], mpp: float, unit: str, keys: Keys) -> None:
    """Refuse cells that are too large, and sizes that are impossible for nuclei; boxes (n, 4) are px of `mpp` um."""
    labels = cells.word == "label"
    about = f"{len(cells)} labels" if labels else f"{len(cells)} cells, if coordinates are {cells.unit or unit}"
    check_width(cells.path, boxes, mpp, about, keys, labels=labels)
    longest = longest_sides(boxes) * mpp
    cells.refuse(longest > _LARGEST_UM, f"outlines of more than {_LARGEST_UM:g} um", "remove what outlines no cell")
    if large := int((longest > LONGEST_UM).sum()):
        log.warning("%s: %d cells are longer than %g um; a tile shows them in part", cells.path, large, LONGEST_UM)
