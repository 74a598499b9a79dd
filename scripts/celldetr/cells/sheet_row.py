"""From a row of the sheet of cells, or the options of the command, to the cells of its slide."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celldetr.cells.find import FindSettings, Slide, find_cells
from celldetr.cells.given import read_given_cells
from celldetr.cells.model import CellModel
from celldetr.cells.region import read_region
from celldetr.config.cells import CellSettings
from celldetr.config.sheets import CellRow
from celldetr.slides.damage import open_slide
from celldetr.slides.outline_check import Keys


def find_cells_of_row(
    row: CellRow,
    settings: CellSettings,
    model: CellModel,
    out: str | os.PathLike[str],
    *,
    file: str | os.PathLike[str],
    nuclei: str | os.PathLike[str] | None = None,
    region: str | os.PathLike[str] | None = None,
    keys: Keys | None = None,
    job: tuple[int, int] = (1, 1),
    workers: int = 1,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Find the cells of a slide, or embed given ones, see `find_cells`.

    `file`, `nuclei` and `region` are local files in place of the sources of the row; `keys` is what errors call its
    columns. For errors see `find_cells`, `read_given_cells` and `read_region`.
    """
    model.require_types()
    slide = Slide(row.slide, Path(file), row.mpp, row.group)
    given = polygons = None
    if nuclei is not None or region is not None:
        with open_slide(file, row.mpp, row.slide, skip=settings.on_damage == "skip") as image:
            if region is not None:
                polygons = read_region(region, image, unit=row.region_unit, keys=keys)
            if nuclei is not None:
                given = read_given_cells(
                    nuclei,
                    image,
                    name=row.slide,
                    unit=row.nuclei_unit,
                    diameter_um=row.diameter_um,
                    cell_outlines=row.cell_outlines,
                    check_outlines=row.check_outlines,
                    keys=keys,
                )
    how = FindSettings(
        margin_um=settings.margin_um,
        nucleus_threshold=settings.nucleus_threshold,
        class_threshold=settings.class_threshold,
        batch_size=settings.batch_size,
        on_damage=settings.on_damage,
        embeddings=settings.embeddings,
    )
    find_cells(slide, model, out, how, given=given, region=polygons, job=job, workers=workers, identity=identity)
