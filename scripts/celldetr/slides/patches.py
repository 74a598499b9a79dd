"""Patches of a slide without cell types, with the boxes of its nuclei, for self-supervised pretraining (paper, 3.3)."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from celldetr.config.slides import SlidePatchSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei
from celldetr.slides.cutting import cut_patches
from celldetr.slides.damage import log_damage, open_slide
from celldetr.slides.grid import PatchGrid, patch_grid
from celldetr.slides.outlines import NucleusFile, read_nucleus_file
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.tiff import DamagedSlide
from celldetr.slides.tissue import Raster, tissue_mask
from celldetr.store import PatchStore, StoreWriter

log = logging.getLogger(__name__)

_ON_SLIDE = 0.9  # smallest fraction of the outlines that must lie on the slide
_COARSE = 2.0  # warn if the slide's pixels are larger than those of the patches by more than this


@dataclass(frozen=True)
class Slide:
    """A row of the slides sheet, with the files on disk."""

    name: str
    file: Path
    nuclei: Path
    """Outlines of the nuclei."""
    group: str
    """Slide or donor."""
    tissue: str
    """Organ."""
    mpp: float | None = None
    """Size of a level-0 pixel in um; None: as the file says."""
    unit: str = "px"
    """Of the outlines: ``px`` of level 0, or ``um``."""


@dataclass(frozen=True)
class SlideExtraction:
    """What was cut out of a slide."""

    grid: PatchGrid
    tissue: Raster
    nuclei: SlideNuclei
    """Nuclei on the slide, px of the grid."""
    counts: list[tuple[str, str, int]]
    """(kind, name, count) of what was dropped, repaired, damaged and not taken."""


def extract_slide(
    slide: Slide,
    out: str | os.PathLike[str],
    *,
    size: int,
    mpp: float,
    settings: SlidePatchSettings,
    on_damage: str,
    seed: int,
    workers: int,
) -> SlideExtraction | None:
    """Cut a slide into patches.

    Parameters
    ----------
    slide
        Slide and outlines to read.
    out
        Store to write; it has no classes, and its nuclei have no labels.
    size, mpp
        Side of a patch in px, and size of its pixels in um.
    settings
        Which patches are taken.
    on_damage
        ``stop``: raise an error if something cannot be decoded. ``skip``: leave such patches out; a slide that cannot
        be opened gives a store without patches.
    seed
        Seed of the draw.
    workers
        Threads.

    Returns
    -------
    SlideExtraction or None
        None if the slide cannot be opened.

    Raises
    ------
    InputError
        The slide or the outlines are damaged or do not match, the pixel size is unknown, or no patch is taken.
    """
    skip = on_damage == "skip"
    try:
        image = open_slide(slide.file, slide.mpp, slide.name, skip=skip)
    except DamagedSlide as error:
        if not skip:
            raise
        damage = {"slide": log_damage(slide.name, [str(error)])}
        with StoreWriter(out, patch_size=size, classes=(), mpp=mpp, attrs={"damage": damage}):
            return None
    with image:
        found, tissue, nuclei, grid = _lay_grid(slide, image, size, mpp, settings, seed)
        lost = image.damage()
        where = {"file": slide.file.name, "size": list(image.size), "mpp": grid.image_mpp}
    dropped = {
        **found.dropped,
        "nuclei outside of the slide": len(found.nuclei) - len(nuclei),
        **grid.dropped(len(nuclei)),
    }
    attrs: dict[str, Any] = {"image": where, "dropped": dropped, "settings": {**settings.to_dict(), "seed": seed}}
    written = cut_patches(
        slide.file,
        grid,
        nuclei.labels,
        out,
        classes=(),
        source=slide.name,
        group=slide.group,
        tissue=slide.tissue,
        attrs={**attrs, "damage": {"overview": log_damage(slide.name, lost)}},
        workers=workers,
        skip=skip,
    )
    counts = [
        *(("dropped", name, count) for name, count in dropped.items()),
        ("repaired", "outlines that cross themselves", found.repaired),
        ("damaged", "regions of the overview", len(lost)),
        ("damaged", "patches", len(grid) - len(written)),
        *(("not taken", f"patches {name}", count) for name, count in written.passed_over.items()),
    ]
    return SlideExtraction(written, tissue, nuclei, counts)


def _lay_grid(
    slide: Slide, image: Pyramid, size: int, mpp: float, settings: SlidePatchSettings, seed: int
) -> tuple[NucleusFile, Raster, SlideNuclei, PatchGrid]:
    """Read the outlines, find the tissue, and choose patches: the file's nuclei, tissue, nuclei on the slide, grid."""
    image_mpp = float(image.mpp or 0)
    if image_mpp > _COARSE * mpp:
        log.warning("%s: pixels of %.3g um are too coarse: patches of %.3g um are blurred", slide.name, image_mpp, mpp)
    found = read_nucleus_file(slide.nuclei, image_mpp=image_mpp, mpp=mpp, unit=slide.unit)
    tissue = tissue_mask(image, image_mpp)
    nuclei = _on_slide(slide, found.nuclei, image, image_mpp / mpp)
    grid = patch_grid(
        image.size, image_mpp, nuclei, size=size, mpp=mpp, tissue=tissue, settings=settings.rules(), seed=seed
    )
    grid = replace(grid, passed_over={name: count for name, count in grid.passed_over.items() if "label" not in name})
    if not len(grid):
        reasons = ", ".join(f"{count} {reason}" for reason, count in grid.passed_over.items())
        raise InputError(
            f"{slide.name}: got no patch; the grid has {reasons}; {len(nuclei)} nuclei lie on the slide: look at the "
            "slide and its outlines, lower slides.patches.min_tissue or min_nuclei, or set column use to no"
        )
    return found, tissue, nuclei, grid


def _on_slide(slide: Slide, nuclei: SlideNuclei, image: Pyramid, scale: float) -> SlideNuclei:
    """Nuclei that lie on the slide; `scale` converts level-0 px to px of the nuclei.

    Raises
    ------
    InputError
        Many lie outside the slide.
    """
    width, height = image.size
    inside = nuclei.on_slide((width * scale, height * scale))
    if len(inside) < _ON_SLIDE * len(nuclei):
        unit = "px of level 0" if slide.unit == "px" else "um"
        raise InputError(
            f"{slide.name}: {slide.nuclei}: got {len(nuclei)} nuclei, of which {len(inside)} lie on the slide "
            f"({width} x {height} px), expected nearly all; are they from this slide, and in {unit} (column "
            "nuclei_unit of the slides sheet)?"
        )
    return inside


def summary_rows(found: SlideExtraction | None, store: PatchStore) -> list[tuple[str, str, int]]:
    """Rows (kind, name, count) of a slide's summary."""
    rows = [("total", "patches", len(store)), ("total", "nuclei in patches", len(store.labels))]
    if found is None:
        return [*rows, ("damaged", "slides that cannot be opened", 1)]
    cut = int(found.grid.boxes.cut.sum())
    rows += [
        ("total", "cut nuclei in patches", cut),
        ("total", "nuclei on the slide", len(found.nuclei)),
    ]
    return [*rows, *found.counts]
