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
from celldetr.slides.outline_check import require_fit
from celldetr.slides.outlines import name_counts, read_nucleus_file
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.tiff import DamagedSlide
from celldetr.slides.tissue import Raster, tissue_mask
from celldetr.store import PatchStore, StoreWriter

log = logging.getLogger(__name__)

_COARSE = 2.0  # warn if the slide's pixels are larger than those of the patches by more than this


@dataclass(frozen=True)
class Slide:
    """A row of the slides sheet, with the files on disk."""

    name: str
    file: Path
    nuclei: Path  # outlines
    group: str  # slide or donor
    tissue: str  # organ
    mpp: float | None = None  # um per level-0 px; None: as the file says
    unit: str = "px"  # of the outlines: px of level 0, um, or qupath
    cell_outlines: bool = False  # take the outline of a cell if there is none of its nucleus
    check_outlines: bool = True  # refuse outlines that do not fit the slide


@dataclass(frozen=True)
class SlideExtraction:
    """What was cut out of a slide."""

    grid: PatchGrid
    tissue: Raster
    nuclei: SlideNuclei  # on the slide, px of the grid
    counts: list[tuple[str, str, int]]  # kind, name, count: checked, dropped, repaired, damaged, not taken


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
    """Cut a slide into patches of `size` px of `mpp` um; the store has no classes, and its nuclei no labels.

    If something cannot be decoded, `on_damage` says whether to ``stop`` or to ``skip`` it: such patches are left out,
    and a slide that cannot be opened gives a store without patches, and None. `workers` are threads.

    Raises
    ------
    InputError
        The slide or the outlines are damaged or do not fit, the pixel size is unknown, or no patch is taken.
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
        plan = _plan(slide, image, size, mpp, settings, seed)
        lost = image.damage()
    attrs: dict[str, Any] = {
        "image": {"file": slide.file.name, "size": list(image.size), "mpp": plan.grid.image_mpp},
        "dropped": {name: count for kind, name, count in plan.counts if kind == "dropped"},
        "settings": {**settings.to_dict(), "seed": seed},
        "damage": {"overview": log_damage(slide.name, lost)},
    }
    written = cut_patches(
        slide.file,
        plan.grid,
        plan.nuclei.labels,
        out,
        classes=(),
        source=slide.name,
        group=slide.group,
        tissue=slide.tissue,
        attrs=attrs,
        workers=workers,
        skip=skip,
    )
    counts = [
        *plan.counts,
        ("damaged", "regions of the overview and the check", len(lost)),
        ("damaged", "patches", len(plan.grid) - len(written)),
        *(("not taken", f"patches {name}", count) for name, count in written.passed_over.items()),
    ]
    return replace(plan, grid=written, counts=counts)


def _plan(
    slide: Slide, image: Pyramid, size: int, mpp: float, settings: SlidePatchSettings, seed: int
) -> SlideExtraction:
    """Read and check the outlines, find the tissue, and choose patches."""
    image_mpp = float(image.mpp or 0)
    if image_mpp > _COARSE * mpp:
        log.warning("%s: pixels of %.3g um are too coarse: patches of %.3g um are blurred", slide.name, image_mpp, mpp)
    found = read_nucleus_file(
        slide.nuclei,
        image_mpp=image_mpp,
        mpp=mpp,
        unit=slide.unit,
        origin=image.origin,
        cells=slide.cell_outlines,
    )
    nuclei, fit = require_fit(
        image,
        found.nuclei,
        mpp,
        name=slide.name,
        file=slide.nuclei,
        unit=slide.unit,
        insist=slide.check_outlines,
    )
    tissue = tissue_mask(image, image_mpp)
    grid = patch_grid(
        image.size, image_mpp, nuclei, size=size, mpp=mpp, tissue=tissue, settings=settings.rules(), seed=seed
    )
    outside = {"nuclei outside of the slide": len(found.nuclei) - len(nuclei)}
    dropped = {**found.dropped, **outside, **grid.dropped(len(nuclei))}
    if not len(grid):
        raise InputError(
            f"{slide.name}: got no patch; the grid has {name_counts(grid.passed_over)}; {len(nuclei)} nuclei lie on "
            f"the slide (dropped: {name_counts(dropped)}): look at the slide and its outlines, lower "
            "slides.patches.min_tissue or min_nuclei, or set column use to no"
        )
    verdict = ("they fit" if fit.good else "they do not fit") if fit.judged else "too few to judge"
    counts = [
        ("checked", f"outlines against the stain: {verdict}", fit.nuclei),
        *(("dropped", name, count) for name, count in dropped.items()),
        ("repaired", "outlines that cross themselves", found.repaired),
    ]
    return SlideExtraction(grid, tissue, nuclei, counts)


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
