"""Cells of one slide without a workflow: `python -m celldetr.cells SLIDE --model MODEL.pt --out FOLDER`.

It finds the cells with a trained model, or embeds given ones, and writes the files that the rules write to
results/cells. The same command continues after a break.
"""

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from celldetr.config.base import Mpp, Settings
from celldetr.config.cells import CellSettings
from celldetr.config.evaluation import InferenceSettings
from celldetr.config.sheets import CELLS_DEPEND_ON, CellRow, Name, checked_row
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.rule import explain

if TYPE_CHECKING:
    from celldetr.cells.model import CellModel
    from celldetr.cells.table import CellFile

log = logging.getLogger("celldetr.cells")


class _Own(Settings):
    """Options that only the command has."""

    name: Name | None = Field(None, description="NAME of the files; default: the slide's file name without its ending")
    threads: int = Field(os.cpu_count() or 1, ge=1, le=1024, description="threads")
    model_mpp: Mpp | None = Field(None, description="um per px of the model's patches, if its file lacks it")
    model_size: int | None = Field(
        None, ge=32, le=1024, multiple_of=32, description="side of the model's patches, px, if its file lacks it"
    )


_SEARCH = ("margin_um", "nucleus_threshold", "class_threshold", "on_damage", "batch_size")
_OPTIONS: dict[type[Settings], tuple[str, ...]] = {
    _Own: ("name", "threads", "model_mpp", "model_size"),
    CellRow: ("region", "nuclei", *CELLS_DEPEND_ON),
    CellSettings: (*_SEARCH, "outputs", "embeddings", "image"),
    InferenceSettings: ("precision", "compile"),
}
"""Columns and settings that are options of this command, with their checks, defaults and texts."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m celldetr.cells",
        description="Find the cells of a slide, with types and embeddings, or embed given cells; write NAME.parquet, "
        "NAME.html and the files of --outputs into a folder. The same command continues after a break.",
        allow_abbrev=False,
    )
    parser.add_argument("slide", type=_text, help="the slide: one file that OpenSlide reads, TIFF, PNG or JPEG")
    parser.add_argument("--model", type=_text, required=True, help="model file (.pt) with classes and embeddings")
    parser.add_argument("--out", type=_text, required=True, help="folder for the files")
    for kind, names in _OPTIONS.items():
        for name in names:
            field = kind.model_fields[name]
            text = f"{field.description}{_default(field.default)}".replace("%", "%%").replace("URLs or paths", "a path")
            several = "*" if name == "outputs" else None
            parser.add_argument(f"--{name.replace('_', '-')}", type=_text, help=text, nargs=several)
    return parser


def _text(value: str) -> str:
    if not value.strip():  # as of a variable of the shell that is not set
        raise argparse.ArgumentTypeError("got an empty text, expected a value")
    return value


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
    slide, out = Path(given.slide), Path(given.out)
    own: _Own = _settings(_Own, given)
    name = own.name or re.sub(r"[^A-Za-z0-9_.-]", "_", slide.stem).lstrip("_.-")[:100] or "slide"
    nuclei = [] if given.nuclei is None else [given.nuclei]
    row: CellRow = _settings(CellRow, given, slide=name, use="yes", file=[given.slide], nuclei=nuclei)
    settings: CellSettings = _settings(CellSettings, given)
    inference: InferenceSettings = _settings(InferenceSettings, given)
    if settings.image != "none" and "spatialdata" not in settings.outputs:
        raise ConfigError(
            f"command line: image: got {settings.image!r}, expected spatialdata among --outputs, which holds it"
        )
    for path in filter(None, (given.slide, given.model, given.nuclei, given.region)):
        if not Path(path).is_file():
            raise InputError(f"{path}: {'got a folder, expected a file' if Path(path).is_dir() else 'no such file'}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: got a file, expected --out to be a folder")
    log.info("%s: loading the model", name)
    # Here and in `_write`, as PyTorch, scanpy and SpatialData take seconds: not for --help, nor for a mistake above.
    from celldetr.cells.one_slide import cells_of_slide
    from celldetr.cells.sheet_row import RowFiles

    model = _model(Path(given.model), own, inference)
    files = RowFiles(slide, given.nuclei, given.region)
    cells = cells_of_slide(row, settings, model, out, files=files, workers=own.threads)
    _write(cells, slide, out / name, settings)
    log.info("%d cells: %s.*", len(cells), out / name)


def _model(path: Path, own: _Own, inference: InferenceSettings) -> "CellModel":
    """Load the model; `InputError` if it says of itself what an option says otherwise."""
    import torch

    from celldetr.cells.model import CellModel
    from celldetr.model.device import best_device

    torch.set_num_threads(own.threads)
    model = CellModel.load(
        path,
        mpp=own.model_mpp,
        size=own.model_size,
        device=best_device(),
        precision=inference.precision,
        compiling=inference.compile,
    )
    for option, value, found in (("mpp", own.model_mpp, model.mpp), ("size", own.model_size, model.size)):
        if value not in (None, found):
            raise InputError(f"--model-{option}: got {value:g}, but {path} says {found:g}; leave it out")
    return model


def _write(cells: "CellFile", slide: Path, start: Path, settings: CellSettings) -> None:
    """Write the files that are asked for; `start` is their path without its ending."""
    if "h5ad" in settings.outputs:
        from celldetr.cells.h5ad import write_h5ad

        write_h5ad(cells, f"{start}.h5ad", settings.embeddings)
    if "geojson" in settings.outputs:
        from celldetr.cells.qupath import write_geojson

        write_geojson(cells, f"{start}.geojson.gz")
    if "cellvit" in settings.outputs:
        from celldetr.cells.cellvit import write_cellvit

        write_cellvit(cells, f"{start}.cellvit.geojson")
    if "spatialdata" in settings.outputs:
        from celldetr.cells.spatialdata_zarr import write_spatialdata

        image, link = None if settings.image == "none" else slide, settings.image == "link"
        write_spatialdata(cells, f"{start}.zarr", settings.embeddings, image=image, link=link)
    from celldetr.report.cells import write_cells_page

    write_cells_page(f"{start}.html", cells, slide, title=f"Cells of {start.name}")


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
