"""Cells of one slide without a workflow: `python -m celldetr.cells SLIDE --model MODEL.pt --out FOLDER`.

It finds the cells with a trained model, or embeds given ones, and writes the files that the rules write to
results/cells. The same command continues after a break.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from celldetr.cells import sheet_row
from celldetr.cells.h5ad import write_h5ad
from celldetr.cells.join import join_cells
from celldetr.cells.model import CellModel
from celldetr.cells.qupath import write_geojson
from celldetr.cells.sheet_row import find_cells_of_row
from celldetr.cells.spatialdata_zarr import write_spatialdata
from celldetr.cells.table import CellFile
from celldetr.config.base import Settings
from celldetr.config.cells import CellSettings
from celldetr.config.evaluation import InferenceSettings
from celldetr.config.sheets import CELLS_DEPEND_ON, CellRow, checked_row
from celldetr.model.device import best_device
from celldetr.report.cells import write_cells_page
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import held, remove, write_json
from celldetr.runtime.provenance import sha256, source_hash
from celldetr.runtime.rule import explain

log = logging.getLogger("celldetr.cells")

_HOW = ("margin_um", "nucleus_threshold", "class_threshold", "on_damage", "embeddings")
_OPTIONS: dict[type[Settings], tuple[str, ...]] = {
    CellRow: ("region", "nuclei", *CELLS_DEPEND_ON),
    CellSettings: (*_HOW, "batch_size", "outputs", "image"),
    InferenceSettings: ("precision",),
}
"""Columns and settings that are options of this command, with their checks, defaults and texts."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m celldetr.cells",
        description="Find the cells of a slide, with types and embeddings, or embed given cells; write NAME.parquet, "
        "NAME.html and the files of --outputs into a folder. The same command continues after a break.",
    )
    parser.add_argument("slide", type=Path, help="the slide: one file that OpenSlide reads, TIFF, PNG or JPEG")
    parser.add_argument("--model", type=Path, required=True, help="model file (.pt) with classes and embeddings")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--name", help="NAME of the files (default: the slide's file name without its ending)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: %(default)s)")
    parser.add_argument("--model-mpp", type=float, help="um per px of the model's patches, if its file lacks it")
    parser.add_argument("--model-size", type=int, help="side of the model's patches, px, if its file lacks it")
    for kind, names in _OPTIONS.items():
        for name in names:
            field = kind.model_fields[name]
            text = f"{field.description}{_default(field.default)}".replace("%", "%%").replace("URLs or paths", "a path")
            several = "*" if name == "outputs" else None
            parser.add_argument(f"--{name.replace('_', '-')}", help=text, nargs=several)
    return parser


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        value = " ".join(value)
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    return "" if value in (None, "") else f" (default: {value})"


def _settings(kind: type[Any], given: argparse.Namespace, **more: Any) -> Any:
    """Check the options of a class of settings."""
    values = {name: value for name in _OPTIONS[kind] if (value := getattr(given, name)) is not None}
    return checked_row("command line", values | more, kind)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; for its arguments see ``--help``.

    Raises
    ------
    InputError, ConfigError
        An argument or a file is not valid, or the folder holds other cells under this name.
    """
    given = _parser().parse_args(arguments)
    name = given.name or re.sub(r"[^A-Za-z0-9_.-]", "_", given.slide.stem).lstrip("_.-")
    nuclei = [] if given.nuclei is None else [given.nuclei]
    row: CellRow = _settings(CellRow, given, slide=name, use="yes", file=[str(given.slide)], nuclei=nuclei)
    settings: CellSettings = _settings(CellSettings, given)
    precision = _settings(InferenceSettings, given).precision
    for path in (given.slide, given.model, *map(Path, row.nuclei), *map(Path, filter(None, [row.region]))):
        if not path.exists():
            raise InputError(f"{path}: no such file")
    torch.set_num_threads(max(1, given.threads))
    model = CellModel.load(
        given.model, mpp=given.model_mpp, size=given.model_size, device=best_device(), precision=precision
    )
    for option, value, own in (("mpp", given.model_mpp, model.mpp), ("size", given.model_size, model.size)):
        if value not in (None, own):
            raise InputError(f"--model-{option}: got {value:g}, but {given.model} says {own:g}; leave it out")
    cells = _cells(given, row, settings, model)
    write = {
        "h5ad": lambda: write_h5ad(cells, given.out / f"{name}.h5ad", settings.embeddings),
        "geojson": lambda: write_geojson(cells, given.out / f"{name}.geojson.gz"),
        "spatialdata": lambda: write_spatialdata(
            cells,
            given.out / f"{name}.zarr",
            settings.embeddings,
            image=given.slide if settings.image == "write" else None,
        ),
    }
    for kind in settings.outputs:
        write[kind]()
    write_cells_page(given.out / f"{name}.html", cells, given.slide, title=f"Cells of {name}")
    log.info("%d cells: %s.*", len(cells), given.out / name)


def _cells(given: argparse.Namespace, row: CellRow, settings: CellSettings, model: CellModel) -> CellFile:
    """Return the file of cells; it is made unless an earlier call with the same arguments has made it."""
    path, work = given.out / f"{row.slide}.parquet", given.out / f".{row.slide}.unfinished"
    record, begun = path.with_suffix(".provenance.json"), work / "command.json"
    identity = _identity(given, row, settings, model)
    work.mkdir(parents=True, exist_ok=True)
    with held(work), _not_left_empty(work):
        if _read(begun) != identity:
            if path.exists():
                _refuse_others(path, _read(record).get("command", {}), identity)
                log.info("%s: its cells are found already", path)
                return CellFile(path)
            _refuse_leftovers(given.out, row.slide)
            for old in work.iterdir():
                remove(old)
            write_json(begun, identity)
        if not (part := work / "1").exists():
            find_cells_of_row(
                row,
                settings,
                model,
                part,
                file=given.slide,
                nuclei=row.nuclei[0] if row.nuclei else None,
                region=row.region or None,
                workers=max(1, given.threads),
                identity={"code": source_hash(sheet_row.__file__)},
            )
        record.unlink(missing_ok=True)  # it may be of other cells, whose file was removed
        info = join_cells([part], path)
        write_json(record, {**json.loads(info.to_json()), "command": identity})
        remove(work)
    return CellFile(path)


def _identity(given: argparse.Namespace, row: CellRow, settings: CellSettings, model: CellModel) -> dict[str, Any]:
    """Return what the cells depend on."""
    about = given.slide.stat()
    identity = {
        "slide file": [given.slide.name, about.st_size, about.st_mtime],
        "model": [(model.source or {}).get("sha256"), model.mpp, model.size],
        "precision": model.precision,
        **{name: sha256(path) for name, path in (("nuclei", "".join(row.nuclei)), ("region", row.region)) if path},
        **row.model_dump(mode="json", include={*CELLS_DEPEND_ON}),
        **settings.model_dump(mode="json", include={*_HOW}),
    }
    return dict(json.loads(json.dumps(identity)))


@contextlib.contextmanager
def _not_left_empty(work: Path) -> Iterator[None]:
    """Remove a folder in which nothing was found yet."""
    try:
        yield
    finally:
        if work.exists() and {item.name for item in work.iterdir()} <= {"command.json"}:
            remove(work)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _refuse_others(path: Path, found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to go on with, or to replace, cells that were found in another way."""
    if differs := [name for name in {**identity, **found} if found.get(name) != identity.get(name)]:
        raise InputError(
            f"{path}: holds cells that were found with another {', '.join(differs)}; give another --out or --name, or "
            "remove it"
        )


def _refuse_leftovers(out: Path, name: str) -> None:
    """Refuse to find cells beside files of other cells that have the same name."""
    files = [out / f"{name}.{ending}" for ending in ("h5ad", "geojson.gz", "zarr", "html")]
    if left := [file.name for file in files if file.exists()]:
        raise InputError(
            f"{out}: holds {', '.join(left)} of cells whose file {name}.parquet is gone; give another --out or --name, "
            "or remove them"
        )


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    except Exception as error:
        if (message := explain(error)) is None:
            traceback.print_exception(error)
        sys.exit(f"error: {message or error}")
