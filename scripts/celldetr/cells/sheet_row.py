"""From a row of the sheet of cells, or the options of the command, to the cells of its slide."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from celldetr.cells.find import FindSettings, Slide, find_cells, identity_of
from celldetr.cells.given import GivenCells, read_given_cells
from celldetr.cells.model import CellModel
from celldetr.cells.region import read_region
from celldetr.config.cells import CellSettings
from celldetr.config.sheets import CellRow
from celldetr.slides.damage import open_slide
from celldetr.slides.outline_check import Keys


class RowFiles(NamedTuple):
    """Local files in place of the sources of a row."""

    slide: str | os.PathLike[str]
    nuclei: str | os.PathLike[str] | None = None
    region: str | os.PathLike[str] | None = None


def find_cells_of_row(
    row: CellRow,
    settings: CellSettings,
    model: CellModel,
    out: str | os.PathLike[str],
    *,
    files: RowFiles,
    keys: Keys | None = None,
    job: tuple[int, int] = (1, 1),
    workers: int = 1,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Find the cells of a slide, or embed given ones, see `find_cells`.

    `keys` is what errors call the columns of the row. For errors see `find_cells`, `read_given_cells` and
    `read_region`.
    """
    model.require_types()
    slide, how, given, region = _read_row(row, settings, files, keys)
    find_cells(slide, model, out, how, given=given, region=region, job=job, workers=workers, identity=identity)


def identity_of_row(row: CellRow, settings: CellSettings, model: CellModel, *, files: RowFiles) -> dict[str, Any]:
    """Name what the cells that `find_cells_of_row` would find depend on, see `identity_of`."""
    slide, how, given, region = _read_row(row, settings, files, None)
    return identity_of(slide, model, how, given=given, region=region)


def _read_row(
    row: CellRow, settings: CellSettings, files: RowFiles, keys: Keys | None
) -> tuple[Slide, FindSettings, GivenCells | None, NDArray[Any] | None]:
    """Return the slide, how its cells are found, and its given cells and region if it has them."""
    slide = Slide(row.slide, Path(files.slide), row.mpp, row.group)
    given = region = None
    if files.nuclei is not None or files.region is not None:
        with open_slide(slide.file, row.mpp, row.slide, skip=settings.on_damage == "skip") as image:
            if files.region is not None:
                region = read_region(files.region, image, unit=row.region_unit, keys=keys)
            if files.nuclei is not None:
                given = read_given_cells(
                    files.nuclei,
                    image,
                    name=row.slide,
                    unit=row.nuclei_unit,
                    diameter_um=row.diameter_um,
                    nuclei_mpp=row.nuclei_mpp,
                    cell_outlines=row.cell_outlines,
                    check_outlines=row.check_outlines,
                    keys=keys,
                )
    how = FindSettings(
        margin_um=settings.margin_um,
        nucleus_threshold=settings.nucleus_threshold,
        batch_size=settings.batch_size,
        on_damage=settings.on_damage,
        embeddings=settings.embeddings,
    )
    return slide, how, given, region
