"""The file of cells of one slide without a workflow: found once, continued after a break, never mixed with others."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celldetr.cells import sheet_row
from celldetr.cells.join import join_cells
from celldetr.cells.model import CellModel
from celldetr.cells.parts import read_summary
from celldetr.cells.sheet_row import RowFiles, find_cells_of_row, identity_of_row
from celldetr.cells.table import CellFile, NothingFound
from celldetr.config.cells import CellSettings
from celldetr.config.sheets import CellRow
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import making, remove, write_json
from celldetr.runtime.provenance import source_hash

log = logging.getLogger(__name__)

_OF_A_JOB = ("more", "job", "tiles")  # what parts depend on besides: the code, the job, the tiles that were planned


def cells_of_slide(
    row: CellRow, settings: CellSettings, model: CellModel, out: Path, *, files: RowFiles, workers: int = 1
) -> CellFile:
    """Return the file of cells in the folder `out`; it is made unless an earlier call for the same cells has made it.

    Beside it lies its metadata as JSON, with what the cells depend on (``identity``). A call that ends early leaves
    parts from which the next one goes on, or nothing.

    Raises
    ------
    InputError
        See `find_cells_of_row` and `join_cells`; or the folder holds other cells under this name, or files of them.
    """
    path, work = out / f"{row.slide}.parquet", out / f".{row.slide}.unfinished"
    record, part = path.with_suffix(".provenance.json"), work / "1"
    with making(work):
        if path.exists() and (record.exists() or not part.exists()):  # not between the two steps of `_finish`
            identity = {**identity_of_row(row, settings, model, files=files), **_joined_with(settings)}
            _refuse_others(path, _recorded(record), identity)
            log.info("%s: its cells are found already", path)
        else:
            if not path.exists():
                _refuse_leftovers(out, row.slide)
            code = {"code": source_hash(sheet_row.__file__)}
            find_cells_of_row(row, settings, model, part, files=files, workers=workers, identity=code)
            _finish(part, path, record, settings)
        remove(part)
    return CellFile(path)


def _joined_with(settings: CellSettings) -> dict[str, Any]:
    """Name what the cells depend on beside the search: what is applied when parts are joined."""
    return {"class_threshold": settings.class_threshold}


def _finish(part: Path, path: Path, record: Path, settings: CellSettings) -> None:
    """Write the file of cells, then its record; parts in which no cell was found are removed."""
    record.unlink(missing_ok=True)  # it may be of other cells, whose file was removed
    try:
        info = join_cells([part], path, **_joined_with(settings))
    except NothingFound:
        remove(part)
        raise
    found = {key: value for key, value in read_summary(part)["identity"].items() if key not in _OF_A_JOB}
    write_json(record, {**json.loads(info.to_json()), "identity": {**found, **_joined_with(settings)}})


def _recorded(record: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _refuse_others(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with, or to replace, cells that were found in another way."""
    if not found:
        raise InputError(
            f"{path}: nothing beside it says how its cells were found; give another --out or --name, or remove it"
        )
    one, other = ({**values, **values.get("settings", {})} for values in (found, wanted))
    if differs := [name for name in {**other, **one} if name != "settings" and one.get(name) != other.get(name)]:
        raise InputError(
            f"{path}: holds cells that were found with another {', '.join(differs)}; give another --out or --name, or "
            "remove it"
        )


def _refuse_leftovers(out: Path, name: str) -> None:
    """Refuse to find cells beside files of other cells that have the same name."""
    files = [out / f"{name}.{ending}" for ending in ("h5ad", "geojson.gz", "cellvit.geojson", "zarr", "html")]
    if left := [file.name for file in files if file.exists()]:
        raise InputError(
            f"{out}: holds {', '.join(left)} of cells whose file {name}.parquet is gone; give another --out or --name, "
            "or remove them"
        )
