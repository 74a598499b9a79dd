"""The nuclei of a slide without types and embeddings, for pretraining."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celldetr.cells.find import FindSettings, Slide, find_cells
from celldetr.cells.join import join_cells
from celldetr.cells.model import CellModel
from celldetr.cells.table import CellsInfo, NothingFound, cell_schema, writer
from celldetr.runtime.files import atomic, remove
from celldetr.slides.tiff import DamagedSlide

log = logging.getLogger(__name__)


def find_nuclei(
    slide: Slide,
    model: CellModel,
    path: str | os.PathLike[str],
    settings: FindSettings,
    *,
    workers: int = 1,
    identity: Mapping[str, Any] | None = None,
) -> int:
    """Write the file of the nuclei that any model finds, and return how many they are.

    A slide without tissue or nuclei has an empty file and a warning in the log: others still give patches. The same
    holds for one that cannot be opened if damage is skipped. For arguments and errors see `find_cells`.
    """
    out = Path(path)
    parts = out.with_name(f".{out.name}.parts")
    try:
        find_cells(slide, model, parts, settings, workers=workers, identity=identity)
        found = join_cells([parts], out, timed=False).counts["cells"]
    except (NothingFound, DamagedSlide) as error:
        if isinstance(error, DamagedSlide) and settings.on_damage != "skip":
            raise
        log.warning("%s: no nuclei: %s", slide.name, error)
        none = CellsInfo(slide.name, slide.file.name, slide.mpp or model.mpp, (0, 0), (0, 0), (), 0, given=False)
        with atomic(out) as temporary:
            writer(temporary, cell_schema(none)).close()
        found = 0
    remove(parts)
    return found
