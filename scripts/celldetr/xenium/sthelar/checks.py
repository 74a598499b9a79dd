"""What a section of STHELAR must pass: maps lie on nuclei, cells are those of the maps, the pixel size is right."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.sthelar.section import SectionCells

log = logging.getLogger(__name__)

_JUDGED = 5  # patches with nuclei that a verdict on their maps needs
_UNKNOWN = 0.5  # share of the nuclei that may lack a row in the table of cells
_FEWEST = 30  # nuclei that a verdict on areas needs
_SMALLEST = 40  # px; smaller nuclei say little of a pixel's size
_TOLERANCE = 0.05  # of the pixel size, against the one measured
_LEAST_RELATED = 0.5  # correlation of the areas of nuclei; 0 for ids of another section
_COARSE = 1.75  # pixels that are this much larger than ours make blurred patches


@dataclass(frozen=True)
class Probe:
    """A patch that is looked at: its pixels (S, S, 3) and its map of ids (S, S)."""

    pixels: NDArray[np.uint8]
    ids: NDArray[np.int64]


def check_ids(probes: Sequence[Probe], cells: SectionCells, name: str) -> None:
    """Refuse a table of cells that lacks most of the cells of the maps; raises InputError."""
    ids = np.unique(np.concatenate([np.unique(probe.ids) for probe in probes]))
    ids = ids[ids > 0]
    without = int((cells.find(ids) < 0).sum())
    if without > _UNKNOWN * len(ids):
        raise InputError(
            f"STHELAR: {name}: {without} of {len(ids)} nuclei of the maps have no row in the table of cells "
            "(cell_id_int), expected few: the table is of another section or another revision; remove the folder of "
            "the section below results/raw/sthelar to get it again"
        )


def check_maps(probes: Sequence[Probe], name: str) -> None:
    """Refuse maps that do not lie on the nuclei of their images.

    Raises
    ------
    InputError
        Nuclei hold no more hematoxylin than the rest, or would hold more if the maps were transposed, mirrored, or
        those of other patches.
    """
    inside = [probe.ids > 0 for probe in probes]
    pairs = {
        "as they are": inside,
        "with x and y swapped": [mask.T for mask in inside],
        "mirrored": [mask[:, ::-1] for mask in inside],
        "upside down": [mask[::-1] for mask in inside],
        "turned by 180 degrees": [mask[::-1, ::-1] for mask in inside],
        "of the patch before": [*inside[-1:], *inside[:-1]],
    }
    judged = [index for index, mask in enumerate(inside) if mask.any() and not mask.all()]
    if len(judged) < _JUDGED:
        log.warning("%s: %d patches have nuclei; too few to check that maps and images fit", name, len(judged))
        return
    stain = [hematoxylin(probe.pixels) for probe in probes]
    contrast = {how: _contrast(stain, masks) for how, masks in pairs.items()}
    best = max(contrast, key=lambda how: contrast[how])
    own = contrast["as they are"]
    if best != "as they are" or own <= 0:
        better = "" if best == "as they are" else f"; {best} they would hold {contrast[best]:.3f}"
        raise InputError(
            f"STHELAR: {name}: the nuclei of the maps hold {own:.3f} more hematoxylin than the rest (optical density)"
            f"{better}; expected the most as they are: images and maps do not fit; leave the section out (use: no), or "
            "take another xenium.sthelar.revision"
        )


def _contrast(stain: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> float:
    """Mean hematoxylin in masks minus that outside of them."""
    values = [float(s[m].mean() - s[~m].mean()) for s, m in zip(stain, masks, strict=True) if m.any() and not m.all()]
    return float(np.mean(values)) if values else 0.0


def pixel_size(probes: Sequence[Probe], cells: SectionCells, given: float | None, name: str, mpp: float) -> float:
    """Return um per px of the patches: as `given`, else measured from the areas of whole nuclei in um^2 and in px.

    Raises
    ------
    InputError
        It is not known, differs from the measured one, or is much larger than `mpp`, or the areas are not related.
    """
    measured = None if cells.areas is None else _measure(probes, cells, name)
    if given is None and measured is None:
        raise InputError(
            f"STHELAR: {name}: its pixel size is not known, as its table of cells has no nucleus_area to measure "
            "it by, or too few nuclei; give um per px in column mpp of the sheet (PhysicalSizeX of its H&E image)"
        )
    if given is not None and measured is not None and abs(measured / given - 1) > _TOLERANCE:
        raise InputError(
            f"STHELAR: {name}: mpp: got {given:.4g} um per px, but by the areas of its nuclei it is {measured:.4g}; "
            "correct the sheet, or leave it empty"
        )
    size = float(given if given is not None else measured or 0)
    if size > _COARSE * mpp:
        raise InputError(
            f"STHELAR: {name}: got pixels of {size:.4g} um, expected at most {_COARSE * mpp:.4g}: patches of {mpp:g} "
            "um per px would be blurred; take the data set of the higher magnification (xenium.sthelar.repository)"
        )
    log.info("%s: %.4g um per px (%s)", name, size, "sheet" if given is not None else "measured")
    return size


def _measure(probes: Sequence[Probe], cells: SectionCells, name: str) -> float | None:
    assert cells.areas is not None
    um, px = [], []
    for probe in probes:
        rim = np.concatenate([probe.ids[[0, -1]].ravel(), probe.ids[:, [0, -1]].ravel()])
        ids, area = np.unique(probe.ids, return_counts=True)
        index = cells.find(ids)
        whole = (ids > 0) & (area >= _SMALLEST) & (index >= 0) & ~np.isin(ids, rim)
        um.append(cells.areas[index[whole]])
        px.append(area[whole])
    areas, pixels = np.concatenate(um), np.concatenate(px).astype(float)
    good = np.isfinite(areas) & (areas > 0)
    if good.sum() < _FEWEST:
        return None
    areas, pixels = np.log(areas[good]), np.log(pixels[good])
    related = float(np.corrcoef(areas, pixels)[0, 1])
    if not related >= _LEAST_RELATED:
        raise InputError(
            f"STHELAR: {name}: the areas of nuclei in the table of cells and in the maps are not related (correlation "
            f"{related:.2f}), expected at least {_LEAST_RELATED}: the table is of another section"
        )
    return float(np.exp(np.median(areas - pixels) / 2))
