"""Sheets (TSV) with a row per Xenium sample, scRNA-seq reference, or slide for pretraining or cells.

Cells may hold several sources, separated by `` | `` and tried in order. Lines that begin with # are comments.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from celldetr.config.base import Bytes, Count, Mpp, Settings
from celldetr.config.cells import CellSettings
from celldetr.config.xenium import XeniumSettings
from celldetr.runtime.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


def _sources(cell: Any) -> Any:
    return [part.strip() for part in cell.split("|") if part.strip()] if isinstance(cell, str) else cell


Name = Annotated[str, Field(pattern=NAME, max_length=100)]
Sources = Annotated[tuple[str, ...], BeforeValidator(_sources)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None
_TAKEN = {
    "sample": {"split.tsv", "split_summary.tsv", "split_summary.html", "test.zarr", "spatialdata"},
    "slide": {"split.tsv", "summary.tsv"},
}
"""Names of files of the workflow beside the folders of samples and of slides, or inside them."""


class XeniumRow(Settings):
    """A Xenium sample: its output, H&E image and alignment."""

    sample: Name = Field(description="name of the sample and of its folders")
    use: bool = Field(description="yes: part of the run; no: left out")
    tissue: str = Field(min_length=1, description="organ or tissue")
    group: str = Field(min_length=1, description="slide or donor; patches of a group are in one part of the split")
    version: str = Field("", description="version of the Xenium software; not used")
    reference: Name = Field(description="row of the sheet of references that gives the cell types")
    outs: Sources = Field(min_length=1, description="Xenium output, zip archive or folder: URLs or paths")
    outs_bytes: Bytes | None = Field(None, description="size of the archive, bytes")
    outs_sha256: Sha256 = Field(None, description="SHA-256 of the archive; checked if the whole archive is downloaded")
    he: Sources = Field(min_length=1, description="H&E image: URLs or paths")
    he_bytes: Bytes | None = Field(None, description="size of the H&E image, bytes")
    he_sha256: Sha256 = Field(None, description="SHA-256 of the H&E image")
    he_mpp: Mpp | None = Field(None, description="um per px of the H&E image, if the file lacks it or is wrong")
    alignment: Sources = Field(
        (), description="alignment file of Xenium Explorer, 3x3 matrix or keypoints (CSV); empty: estimated"
    )
    alignment_sha256: Sha256 = Field(None, description="SHA-256 of the alignment file")
    licence: str = Field("", description="licence of the data; not used")
    note: str = Field("", description="free text; not used")


class ReferenceRow(Settings):
    """An annotated scRNA-seq reference (.h5ad)."""

    reference: Name = Field(description="name of the reference")
    file: Sources = Field((), description="the .h5ad: URLs or paths")
    cellxgene_collection: str = Field("", description="id of a CELLxGENE collection, instead of file")
    cellxgene_dataset: str = Field("", description="version id, id or title of the dataset in that collection")
    bytes: Bytes | None = Field(None, description="size of the file, bytes")
    sha256: Sha256 = Field(None, description="SHA-256 of the file")
    cells: Count | None = Field(None, description="number of cells in the file; another number is refused")
    label_column: str = Field(min_length=1, description="column of obs with the labels")
    mapping: str = Field(min_length=1, description="table (TSV) with the cell type of each label, or - to leave it out")
    licence: str = Field("", description="licence of the data; not used")
    note: str = Field("", description="free text; not used")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.file) == bool(self.cellxgene_collection and self.cellxgene_dataset):
            raise ValueError("expected either file, or cellxgene_collection and cellxgene_dataset")
        return self

    def source(self) -> dict[str, Any]:
        """Return what decides which file is downloaded."""
        keys = {"file", "cellxgene_collection", "cellxgene_dataset", "bytes", "sha256"}
        return self.model_dump(mode="json", include=keys)


_SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".dcm")  # formats that keep a slide in several files


class _SlideFile(Settings):
    """What rows of all sheets of slides have: the file of a slide and the file of its outlines."""

    slide: Name = Field(description="name of the slide and of its results")
    use: bool = Field(description="yes: part of the run; no: left out")
    group: str = Field(min_length=1, description="slide or donor; a group is held out for validation as a whole")
    file: Sources = Field((), description="the slide: URLs or paths")
    bytes: Bytes | None = Field(None, description="size of the slide, bytes")
    sha256: Sha256 = Field(None, description="SHA-256 of the slide")
    mpp: Mpp | None = Field(None, description="um per px of level 0, if the file lacks it or is wrong")
    nuclei: Sources = ()
    nuclei_sha256: Sha256 = Field(None, description="SHA-256 of the file of outlines")
    nuclei_unit: Literal["px", "um", "qupath"] = Field(
        "px",
        description="unit of the outlines: px of level 0; um; qupath: px from the corner of what was scanned",
    )
    cell_outlines: bool = Field(
        False, description="yes: take the outline of a cell where a file (QuPath) has none of its nucleus"
    )
    check_outlines: bool = Field(True, description="no: take outlines that do not lie on what hematoxylin stains")
    licence: str = Field("", description="licence of the data; not used")
    note: str = Field("", description="free text; not used")

    @model_validator(mode="after")
    def _in_one_file(self) -> Self:
        several = [source for source in self.file if source.lower().endswith(_SEVERAL_FILES)]
        if several:
            raise ValueError(
                f"expected slides in one file, got {several[0]!r}, which is one of several; convert the slide to a "
                "pyramidal TIFF (e.g. vips tiffsave --tile --pyramid)"
            )
        return self


class SlideRow(_SlideFile):
    """A whole slide without cell types, and the source of its nuclei."""

    nuclei: Sources = Field(
        min_length=1,
        description="outlines of nuclei (GeoParquet, GeoJSON, Parquet of HEST, cells.json of CellViT): URLs or paths; "
        "hest: those of HEST-1k; detect: found by the model of slides.detection",
    )
    tissue: str = Field(min_length=1, description="organ; each organ gets an equal share of the patches")
    hest: Annotated[str, Field(pattern=r"^([A-Z]+[0-9]+)?$")] = Field(
        "", description="id in HEST-1k (e.g. TENX105), instead of file; needs a Hugging Face token"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.file) == bool(self.hest):
            raise ValueError("expected either file or hest")
        words = {"hest", "detect"} & set(self.nuclei)
        if words and len(self.nuclei) > 1:
            raise ValueError(f"expected nuclei to be {sorted(words)[0]!r} alone, or sources of outlines")
        if self.nuclei == ("hest",) and not self.hest:
            raise ValueError("expected an id in column hest, as nuclei is 'hest'")
        if words and self.nuclei_unit != "px":
            raise ValueError("expected nuclei_unit to be px, as it is of outlines from a file")
        if self.nuclei == ("detect",) and (self.nuclei_sha256 or self.cell_outlines or not self.check_outlines):
            raise ValueError("expected no nuclei_sha256, cell_outlines and check_outlines, as nuclei is 'detect'")
        return self

    @property
    def detect(self) -> bool:
        """Whether a trained model finds its nuclei."""
        return self.nuclei == ("detect",)


class CellRow(_SlideFile):
    """A slide whose cells get types and embeddings: cells that a model finds, or cells of a file."""

    group: str = Field("", description="slide or donor; results state whether the model has seen this group")
    file: Sources = Field(min_length=1, description="the slide: URLs or paths")
    nuclei: Sources = Field(
        (),
        description="your own cells (outlines, label image, boxes or points): URLs or paths; empty: the model finds "
        "the cells",
    )
    region: str = Field("", description="polygons to read (GeoJSON or GeoParquet), a path; empty: all tissue")
    region_unit: Literal["px", "um", "qupath"] | None = Field(
        None,
        description="unit of the region, as nuclei_unit; needed if the scanned part begins elsewhere than the slide",
    )
    diameter_um: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="diameter of a cell whose position is a point, um"
    )
    nuclei_mpp: Mpp | None = Field(
        None, description="um per px of a label image in nuclei; empty: it has the pixels of level 0"
    )

    @model_validator(mode="after")
    def _given_or_found(self) -> Self:
        if words := {"hest", "detect"} & set(self.nuclei):
            raise ValueError(f"expected nuclei to be a file, or empty: the model finds them; got {sorted(words)[0]!r}")
        if self.region_unit and not self.region:
            raise ValueError("expected a value in region, as there is one in region_unit")
        about = {"nuclei_sha256", "nuclei_unit", "nuclei_mpp", "diameter_um", "cell_outlines", "check_outlines"}
        changed = [name for name in sorted(about) if getattr(self, name) != type(self).model_fields[name].default]
        if changed and not self.nuclei:
            raise ValueError(f"expected a value in nuclei, as there is one in {', '.join(changed)}")
        return self


CELLS_DEPEND_ON = (
    "mpp",
    "group",
    "region_unit",
    "nuclei_unit",
    "nuclei_mpp",
    "diameter_um",
    "cell_outlines",
    "check_outlines",
)
"""Columns of `CellRow` that decide about the cells, beside the files."""

Row = TypeVar("Row", bound=Settings)
UsableRow = TypeVar("UsableRow", XeniumRow, SlideRow, CellRow)


def read_sheet(path: str | os.PathLike[str], kind: type[Row], key: str) -> dict[str, Row]:
    """Read a sheet: a TSV file in UTF-8 with a line of column names; an empty cell takes the default.

    Parameters
    ----------
    kind
        Settings of a row.
    key
        Column that names the rows.

    Returns
    -------
    dict
        Name -> row, in the order of the sheet.

    Raises
    ------
    ConfigError
        The file cannot be read, columns are unknown or missing, a value is not valid, or a name occurs twice (also in
        another case: some disks do not distinguish them). It names the file, the row and the column.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); expected a TSV file in UTF-8") from error
    table = [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    columns = ", ".join(kind.model_fields)
    if not table:
        raise ConfigError(f"{file}: got an empty sheet, expected a line with the columns {columns}")
    names = [name.strip() for name in table[0]]
    unknown = [name for name in names if name not in kind.model_fields]
    missing = [name for name, field in kind.model_fields.items() if field.is_required() and name not in names]
    if unknown or missing or len(set(names)) < len(names):
        raise ConfigError(
            f"{file}: columns: unknown {unknown or 'none'}, missing {missing or 'none'}; expected each once, of: "
            f"{columns}; is the file separated by tabs?"
        )
    rows, taken = dict[str, Row](), set[str]()
    for number, cells in enumerate(table[1:], start=1):
        where = f"{file}: row {number}"
        if len(cells) > len(names):
            raise ConfigError(f"{where}: got {len(cells)} cells, expected at most {len(names)}")
        values = {name: cell.strip() for name, cell in zip(names, cells, strict=False) if cell.strip()}
        row = checked_row(where, values, kind)
        name = str(getattr(row, key))
        if name.lower() in taken:
            raise ConfigError(f"{where}: {key}: got {name!r} twice, expected a name of its own")
        if name.lower() in _TAKEN.get(key, ()):
            raise ConfigError(f"{where}: {key}: got {name!r}, which is a file of the workflow; expected another name")
        taken.add(name.lower())
        rows[name] = row
    return rows


def checked_row(where: str, values: Mapping[str, Any], kind: type[Row]) -> Row:
    """Build settings from texts; `ConfigError` with `where` and the column if a value is not valid."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        words = re.sub(r"^(Value error, |Input should be |String should )", "", problem["msg"])
        if problem["type"] == "bool_parsing":
            words = "yes or no"
        expected = words if words.startswith("expected") else f"expected {words}"
        if problem["loc"]:
            column = str(problem["loc"][0])
            empty = problem["type"] == "missing"
            got = "empty; expected a value" if empty else f"got {values[column]!r}, {expected}"
            expected = f"{column}: {words if words.startswith('got ') else got}"
        raise ConfigError(f"{where}: {expected}") from error


def locate(path: str, root: Path) -> Path:
    """Return a file that the configuration names: in the working folder, or else in the folder of the workflow."""
    return Path(path) if Path(path).exists() else root / path


def used_samples(paths: XeniumSettings | None, root: Path) -> tuple[dict[str, XeniumRow], dict[str, ReferenceRow]]:
    """Read both sheets; return the samples in use and the references that they need; none without a sheet.

    Raises
    ------
    ConfigError
        A sheet is not valid (`read_sheet`), no sample is in use, or the reference of a sample has no row.
    """
    if paths is None or paths.samples is None:
        return {}, {}
    used = _used(paths.samples, root, XeniumRow, "sample")
    sheet = locate(paths.references, root)
    references = read_sheet(sheet, ReferenceRow, "reference")
    for name, row in used.items():
        if row.reference not in references:
            raise ConfigError(
                f"{locate(paths.samples, root)}: {name}: reference: got {row.reference!r}, expected one of "
                f"{sorted(references)}, or another row in {sheet}"
            )
    return used, {row.reference: references[row.reference] for row in used.values()}


def used_slides(path: str | None, root: Path) -> dict[str, SlideRow]:
    """Read the sheet of the slides and return those in use; none without a sheet.

    Raises
    ------
    ConfigError
        The sheet is not valid (`read_sheet`), or no slide is in use.
    """
    return {} if path is None else _used(path, root, SlideRow, "slide")


def cell_slides(
    paths: CellSettings | None, samples: Mapping[str, XeniumRow], slides: Mapping[str, SlideRow], root: Path
) -> dict[str, CellRow]:
    """Return the slides whose cells are found: those of the sheet in use; without a sheet, the samples and slides.

    The `file` of a slide without a sheet is the workflow's own copy.

    Raises
    ------
    ConfigError
        The sheet is not valid (`read_sheet`), no slide is in use, or a sample is called like a slide.
    """
    if paths is None:
        return {}
    if paths.sheet is not None:
        return _in_use(locate(paths.sheet, root), CellRow, "slide")
    if both := sorted({name.lower() for name in samples} & {name.lower() for name in slides}):
        raise ConfigError(
            f"cells.sheet: got null, but {both} are names of Xenium samples and of slides, too; expected names of "
            "their own, or a sheet"
        )
    copies = {name: (row.group, f"results/raw/slides/{name}.tif", row.mpp) for name, row in slides.items()}
    copies |= {
        name: (row.group, f"results/raw/xenium/{name}/he_image.tif", row.he_mpp) for name, row in samples.items()
    }
    return {
        name: CellRow(slide=name, use=True, group=group, file=(file,), mpp=mpp)
        for name, (group, file, mpp) in copies.items()
    }


def _in_use(sheet: Path, kind: type[UsableRow], key: str) -> dict[str, UsableRow]:
    used = {name: row for name, row in read_sheet(sheet, kind, key).items() if row.use}
    if not used:
        raise ConfigError(f"{sheet}: column use: got 'yes' in no row, expected at least one")
    return used


def _used(path: str, root: Path, kind: type[UsableRow], key: str) -> dict[str, UsableRow]:
    sheet = locate(path, root)
    used = _in_use(sheet, kind, key)
    owners = dict[str, str]()
    for name, used_row in used.items():
        given: dict[str, Any] = used_row.to_dict()
        for source in (*given.get("outs", ()), *given.get("file", ()), given.get("hest")):
            if source and owners.setdefault(source, name) != name:
                raise ConfigError(
                    f"{sheet}: {name}: got {source!r}, which is also that of {owners[source]}; expected each once: the "
                    "same tissue would train and test"
                )
        for source in given.get("he", ()):  # may show several samples, which then are of one donor
            owner = owners.setdefault(source, name)
            group = used[owner].to_dict()["group"]
            if group != given["group"]:
                raise ConfigError(
                    f"{sheet}: {name}: group: got {given['group']!r}, but the H&E {source} is also that of {owner}, in "
                    f"group {group!r}; expected one group: the same tissue would train and test"
                )
    return used
