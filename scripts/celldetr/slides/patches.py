"""Patches of a slide without cell types, with the boxes of its nuclei, for self-supervised pretraining (paper, 3.3)."""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from celldetr.config.slides import SlidePatchSettings
from celldetr.report import pages
from celldetr.report.patches import overview, write_report
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.slides.cutting import extract
from celldetr.slides.grid import Nuclei, Plan, plan_patches
from celldetr.slides.outlines import read_nucleus_file
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.reading import DamagedSlide, TolerantPyramid, open_overview, open_slide, read_blocks, told
from celldetr.slides.tissue import Raster, tissue_mask
from celldetr.store import PatchStore, StoreWriter

log = logging.getLogger(__name__)

_SCAN = 32  # patches of a block when damaged ones are looked for
_ON_SLIDE = 0.9  # share of the outlines, at least
_COARSE = 2.0  # a slide with pixels more than this times as large as those of the patches is told about


@dataclass(frozen=True)
class Slide:
    """A slide, as the sheet has it.

    Attributes
    ----------
    name
        Its name.
    file, nuclei
        The image, and the outlines of its nuclei.
    group, tissue
        Slide or donor, and organ.
    mpp
        Size of a level-0 pixel in um, where the file does not say it or says it wrongly.
    unit
        Of the outlines: ``px`` of level 0, or ``um``.
    """

    name: str
    file: Path
    nuclei: Path
    group: str
    tissue: str
    mpp: float | None = None
    unit: str = "px"


@dataclass(frozen=True)
class SlideExtraction:
    """What was cut out of a slide.

    Attributes
    ----------
    plan
        The patches.
    tissue
        Where there is tissue.
    nuclei
        Nuclei on the slide, px of the plan.
    counts
        (kind, name, count) of what was dropped, repaired, damaged and not taken.
    """

    plan: Plan
    tissue: Raster
    nuclei: Nuclei
    counts: list[tuple[str, str, int]]


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
        What is read.
    out
        Store to write; it has no classes, and its nuclei no labels.
    size, mpp
        Side of a patch in px, and size of its pixels in um.
    settings
        Which patches are taken.
    on_damage
        ``stop``: what cannot be decoded is an error. ``skip``: such patches are left out; a slide that cannot be opened
        gives a store without patches.
    seed
        Seed of the draw.
    workers
        Threads.

    Returns
    -------
    SlideExtraction or None
        None for a slide that cannot be opened.

    Raises
    ------
    InputError
        The slide or the outlines are damaged or do not belong together, nobody knows how large a pixel is, or no patch
        is taken.
    """
    skip = on_damage == "skip"
    try:
        with open_slide(slide.file, slide.mpp, slide.name) as image:
            image_mpp = float(image.mpp or 0)
    except DamagedSlide as error:
        if not skip:
            raise
        damage = {"slide": told(slide.name, [str(error)])}
        with StoreWriter(out, patch_size=size, classes=(), mpp=mpp, attrs={"damage": damage}):
            return None
    if image_mpp > _COARSE * mpp:
        log.warning("%s: its pixels are %.3g um wide; patches of %.3g um are blurred", slide.name, image_mpp, mpp)
    read = read_nucleus_file(slide.nuclei, image_mpp=image_mpp, mpp=mpp, unit=slide.unit)
    with open_overview(slide.file, image_mpp, skip=skip) as image:
        tissue = tissue_mask(image, image_mpp)
        lost = image.damage() if isinstance(image, TolerantPyramid) else []
        where = {"file": slide.file.name, "size": list(image.size), "mpp": image_mpp}
        nuclei, outside = _inside(slide, read.nuclei, image, image_mpp / mpp)
        rules = settings.rules()
        plan = plan_patches(image.size, image_mpp, nuclei, size=size, mpp=mpp, tissue=tissue, settings=rules, seed=seed)
    without_labels = {reason: count for reason, count in plan.passed_over.items() if "label" not in reason}
    plan = replace(plan, passed_over=without_labels)
    _check_taken(slide, plan, nuclei)
    dropped = {
        **read.dropped,
        "nuclei outside of the slide": outside,
        "nuclei in no patch that was taken": len(nuclei) - len(np.unique(plan.nuclei)),
    }
    attrs: dict[str, Any] = {"image": where, "dropped": dropped, "settings": {**settings.to_dict(), "seed": seed}}
    damage = {"overview": told(slide.name, lost)}
    plan, damaged = _extract(slide, plan, nuclei, out, attrs=attrs, damage=damage, skip=skip, workers=workers)
    counts = [
        *(("dropped", name, count) for name, count in dropped.items()),
        ("repaired", "outlines that cross themselves", read.repaired),
        ("damaged", "regions of the overview", len(lost)),
        ("damaged", "patches", damaged),
        *(("not taken", f"patches {name}", count) for name, count in plan.passed_over.items()),
    ]
    return SlideExtraction(plan, tissue, nuclei, counts)


def _check_taken(slide: Slide, plan: Plan, nuclei: Nuclei) -> None:
    if not len(plan):
        reasons = ", ".join(f"{count} {reason}" for reason, count in plan.passed_over.items())
        raise InputError(
            f"{slide.name}: got no patch; of the grid there were {reasons}; {len(nuclei)} nuclei lie on the slide: "
            "look at it and at its outlines, lower slides.patches.min_tissue or min_nuclei, or set use to no"
        )


def _inside(slide: Slide, nuclei: Nuclei, image: Pyramid, scale: float) -> tuple[Nuclei, int]:
    """Nuclei whose centre is on the slide, and the number of others; `scale` px of the nuclei are a level-0 px."""
    limit = np.asarray(image.size) * scale
    inside: NDArray[np.bool_] = np.asarray(((nuclei.centres >= 0) & (nuclei.centres < limit)).all(axis=1))
    if len(nuclei) and inside.mean() < _ON_SLIDE:
        raise InputError(
            f"{slide.name}: {slide.nuclei}: got {len(nuclei)} nuclei, of which {int(inside.sum())} lie on the slide "
            f"({image.size[0]} x {image.size[1]} px), expected nearly all; are they of this slide, and in "
            f"{'px of level 0' if slide.unit == 'px' else 'um'} (column nuclei_unit of the slides sheet)?"
        )
    return nuclei.keep(inside), int((~inside).sum())


def _extract(
    slide: Slide,
    plan: Plan,
    nuclei: Nuclei,
    out: str | os.PathLike[str],
    *,
    attrs: Mapping[str, Any],
    damage: Mapping[str, Any],
    skip: bool,
    workers: int,
) -> tuple[Plan, int]:
    """Write the patches; return those that were written and the number of damaged ones that were left out."""

    def write(chosen: Plan, damage: Mapping[str, Any]) -> None:
        extract(
            slide.file,
            chosen,
            nuclei,
            out,
            classes=(),
            source=slide.name,
            group=slide.group,
            tissue=slide.tissue,
            attrs={**attrs, "patches_passed_over": chosen.passed_over, "damage": damage},
            workers=workers,
        )

    try:
        write(plan, damage)
    except InputError:
        if not skip:
            raise
    else:
        return plan, 0
    # damage is rare: it is looked for only where it has been met
    damaged: dict[int, str] = {}
    for block in read_blocks(slide.file, plan, size=_SCAN, workers=workers, skip=True):
        damaged |= block.damaged
    good = without(plan, damaged)
    write(good, {**damage, "patches": told(slide.name, list(damaged.values()))})
    return good, len(damaged)


def without(plan: Plan, damaged: Collection[int]) -> Plan:
    """Plan without some of its patches."""
    kept = np.setdiff1d(np.arange(len(plan)), np.fromiter(damaged, dtype=np.int64, count=len(damaged)))
    members = [plan.nuclei[plan.ptr[patch] : plan.ptr[patch + 1]] for patch in kept]
    return replace(
        plan,
        corners=plan.corners[kept],
        nuclei=np.concatenate([np.empty(0, np.int64), *members]),
        ptr=np.concatenate([[0], np.cumsum([len(member) for member in members], dtype=np.int64)]).astype(np.int64),
        passed_over={**plan.passed_over, "damaged": len(damaged)},
    )


def write_picture(path: str | os.PathLike[str], slide: Slide, found: SlideExtraction | None, on_damage: str) -> None:
    """Write the slide with the outline of its tissue and its patches as PNG; a blank one if it cannot be opened."""
    if found is None:
        picture = Image.new("RGB", (640, 120), "white")
        ImageDraw.Draw(picture).text((20, 50), f"{slide.name}: {slide.file.name} cannot be opened", fill="black")
    else:
        with open_overview(slide.file, found.plan.image_mpp, skip=on_damage == "skip") as image:
            picture = overview(image, found.plan, found.tissue)
    with atomic(path) as temporary:
        picture.save(temporary, "PNG")


def write_page(
    path: str | os.PathLike[str],
    slide: Slide,
    found: SlideExtraction | None,
    store: PatchStore,
    rows: list[tuple[str, str, int]],
    on_damage: str,
) -> None:
    """Write the page of a slide: counts, the slide, and some patches with their boxes."""
    title = f"Patches of {slide.name} ({slide.tissue})"
    if found is None:
        body = "<p class='warning'>{{ file }} cannot be opened; no patches are taken from it.</p>"
        pages.write_page(path, body, {"title": title, "file": slide.file.name})
        return
    with open_overview(slide.file, found.plan.image_mpp, skip=on_damage == "skip") as image:
        write_report(path, store, title=title, image=image, plan=found.plan, tissue=found.tissue, rows=rows)


def summary_rows(found: SlideExtraction | None, store: PatchStore) -> list[tuple[str, str, int]]:
    """Rows (kind, name, count) of a slide's summary."""
    rows = [("total", "patches", len(store)), ("total", "nuclei in patches", len(store.labels))]
    if found is None:
        return [*rows, ("damaged", "slides that cannot be opened", 1)]
    return [*rows, ("total", "nuclei on the slide", len(found.nuclei)), *found.counts]
