"""Sheets (TSV): one row per Xenium sample, scRNA-seq reference or slide, checked row by row.

Cells that hold several sources separate them by `` | ``; they are tried in order. Lines that begin with # are comments.
"""

import csv
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from celldetr.config.base import Settings
from celldetr.runtime.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


def _sources(cell: Any) -> Any:
    return [part.strip() for part in cell.split("|") if part.strip()] if isinstance(cell, str) else cell


Name = Annotated[str, Field(pattern=NAME, max_length=100)]
Sources = Annotated[tuple[str, ...], BeforeValidator(_sources)]
Bytes = Annotated[int, Field(ge=1)] | None
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None


class XeniumRow(Settings):
    """A Xenium sample: its output archive, H&E image and alignment, and what it is."""

    sample: Name = Field(description="name of the sample; folders are named like it")
    use: bool = Field(description="yes: part of the run")
    tissue: str = Field(min_length=1)
    group: str = Field(min_length=1, description="slide or donor: patches of a group are in one part of a split")
    version: str = Field("", description="of the analysis software, for people")
    reference: Name = Field(description="row of the references sheet whose cell types it gets")
    outs: Sources = Field(min_length=1, description="output archive (.zip) or folder: URLs or paths, tried in order")
    outs_bytes: Bytes = Field(None, description="size of the archive")
    outs_sha256: Sha256 = Field(None, description="checksum of the archive; only whole archives can be verified by it")
    he: Sources = Field(min_length=1, description="H&E image: URLs or paths")
    he_bytes: Bytes = None
    he_sha256: Sha256 = None
    he_mpp: Annotated[float, Field(gt=0.02, lt=20)] | None = Field(
        None, description="um per px of the H&E image, where the file does not say it or says it wrongly"
    )
    alignment: Sources = Field((), description="3x3 matrix or keypoint table (CSV); empty: found from the images")
    alignment_sha256: Sha256 = None
    licence: str = ""
    note: str = ""


class ReferenceRow(Settings):
    """An scRNA-seq reference (.h5ad) with labels for its cells."""

    reference: Name = Field(description="name")
    file: Sources = Field((), description="URLs or paths of the .h5ad, tried in order")
    cellxgene_collection: str = Field("", description="CELLxGENE collection (id) that holds it, instead of file")
    cellxgene_dataset: str = Field("", description="version id, id, or title of the dataset in that collection")
    bytes: Bytes = None
    sha256: Sha256 = None
    label_column: str = Field(min_length=1, description="column of obs that holds the labels")
    mapping: str = Field(min_length=1, description="table label -> type (TSV), from the root of the workflow")
    licence: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.file) == bool(self.cellxgene_collection and self.cellxgene_dataset):
            raise ValueError("expected either file, or cellxgene_collection and cellxgene_dataset")
        return self


_SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".dcm")  # formats that keep a slide in several files


class SlideRow(Settings):
    """A whole slide without cell types, and where its nuclei are."""

    slide: Name = Field(description="name of the slide; folders are named like it")
    use: bool = Field(description="yes: part of the run")
    tissue: str = Field(min_length=1, description="organ; each gets an equal share of the patches")
    group: str = Field(min_length=1, description="slide or donor: held out together for validation")
    file: Sources = Field((), description="slide: URLs or paths, tried in order")
    hest: Annotated[str, Field(pattern=r"^([A-Z]+[0-9]+)?$")] = Field(
        "", description="id in HEST-1k (e.g. TENX105), instead of file; needs a Hugging Face token"
    )
    bytes: Bytes = Field(None, description="size of the slide")
    sha256: Sha256 = Field(None, description="checksum of the slide")
    mpp: Annotated[float, Field(gt=0.02, lt=20)] | None = Field(
        None, description="um per px of level 0, where the file does not say it or says it wrongly"
    )
    nuclei: Sources = Field(
        min_length=1,
        description="outlines (GeoParquet or GeoJSON): URLs or paths; or hest: those of HEST-1k; or detect: found by a "
        "trained model",
    )
    nuclei_sha256: Sha256 = None
    nuclei_unit: Literal["px", "um"] = Field("px", description="of the outlines: px of level 0, or um")
    licence: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.file) == bool(self.hest):
            raise ValueError("expected either file or hest")
        several = [source for source in self.file if source.lower().endswith(_SEVERAL_FILES)]
        if several:
            raise ValueError(
                f"expected slides in one file, got {several[0]!r}, which is one of several; convert the slide to a "
                "pyramidal TIFF (e.g. vips tiffsave --tile --pyramid)"
            )
        words = {"hest", "detect"} & set(self.nuclei)
        if words and len(self.nuclei) > 1:
            raise ValueError(f"expected nuclei to be {sorted(words)[0]!r} alone, or sources of outlines")
        if self.nuclei == ("hest",) and not self.hest:
            raise ValueError("expected an id in column hest, as nuclei is 'hest'")
        if words and self.nuclei_unit != "px":
            raise ValueError("expected nuclei_unit to be px, as it is of outlines from a file")
        if self.nuclei == ("detect",) and self.nuclei_sha256:
            raise ValueError("expected no nuclei_sha256, as nuclei is 'detect'")
        return self

    @property
    def detect(self) -> bool:
        """Whether its nuclei are found by a trained model."""
        return self.nuclei == ("detect",)


Row = TypeVar("Row", bound=Settings)


def read_sheet(path: str | os.PathLike[str], kind: type[Row], key: str) -> dict[str, Row]:
    """Read and check a sheet.

    Parameters
    ----------
    path
        TSV file, UTF-8, with a line of column names; empty cells take the default.
    kind
        What a row holds.
    key
        Column that names the rows.

    Returns
    -------
    dict
        Name -> row, in the order of the sheet.

    Raises
    ------
    ConfigError
        No such file, unknown or missing columns, values that are not legal, names that occur twice (also when they
        differ in case alone: some disks do not tell them apart); names the file, the row and the column.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); expected a TSV file in UTF-8") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        table = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise ConfigError(f"{file}: cannot be read ({error}); expected a TSV file") from error
    if not table:
        raise ConfigError(
            f"{file}: got an empty sheet, expected a line with the columns {', '.join(kind.model_fields)}"
        )
    names = [name.strip() for name in table[0]]
    _check_columns(file, names, kind)
    rows: dict[str, Row] = {}
    for number, cells in enumerate(table[1:], start=1):
        if len(cells) > len(names):
            raise ConfigError(f"{file}: row {number}: got {len(cells)} cells, expected at most {len(names)}")
        values = {name: cell.strip() for name, cell in zip(names, cells, strict=False) if cell.strip()}
        row = _row(file, number, values, kind)
        name = str(getattr(row, key))
        if name.lower() in {other.lower() for other in rows}:
            raise ConfigError(f"{file}: row {number}: {key}: got {name!r} twice, expected a name of its own")
        rows[name] = row
    return rows


class SheetPaths(Protocol):
    """Where the sheets are (`celldetr.config.xenium.XeniumSettings`)."""

    @property
    def samples(self) -> str:
        """Sheet of the samples."""

    @property
    def references(self) -> str:
        """Sheet of the references."""


def used_samples(paths: SheetPaths | None, root: Path) -> tuple[dict[str, XeniumRow], dict[str, ReferenceRow]]:
    """Read both sheets; return the samples in use and the references that they need, both empty without sheets.

    Raises
    ------
    ConfigError
        A sheet is not right (`read_sheet`), no sample is in use, or a reference of one has no row.
    """
    if paths is None:
        return {}, {}
    samples = read_sheet(root / paths.samples, XeniumRow, "sample")
    used = {name: row for name, row in samples.items() if row.use}
    if not used:
        raise ConfigError(f"{root / paths.samples}: column use: got 'yes' in no row, expected at least one")
    references = read_sheet(root / paths.references, ReferenceRow, "reference")
    for name, row in used.items():
        if row.reference not in references:
            raise ConfigError(
                f"{root / paths.samples}: {name}: reference: got {row.reference!r}, expected one of "
                f"{sorted(references)}, or a further row in {root / paths.references}"
            )
    return used, {name: references[name] for name in dict.fromkeys(row.reference for row in used.values())}


def used_slides(sheet: str | None, root: Path) -> dict[str, SlideRow]:
    """Read the sheet of the slides; return those in use, none without a sheet.

    Raises
    ------
    ConfigError
        The sheet is not right (`read_sheet`), or no slide is in use.
    """
    if sheet is None:
        return {}
    used = {name: row for name, row in read_sheet(root / sheet, SlideRow, "slide").items() if row.use}
    if not used:
        raise ConfigError(f"{root / sheet}: column use: got 'yes' in no row, expected at least one")
    return used


def _check_columns(file: Path, columns: list[str], kind: type[Settings]) -> None:
    unknown = [name for name in columns if name not in kind.model_fields]
    missing = [name for name, field in kind.model_fields.items() if field.is_required() and name not in columns]
    if unknown or missing or len(set(columns)) < len(columns):
        raise ConfigError(
            f"{file}: columns: unknown {unknown or 'none'}, missing {missing or 'none'}; expected each once, of: "
            f"{', '.join(kind.model_fields)}; is the file separated by tabs?"
        )


def _row(file: Path, number: int, values: dict[str, str], kind: type[Row]) -> Row:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        column = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "missing":
            raise ConfigError(f"{file}: row {number}: {column}: empty; expected a value") from error
        words = re.sub(r"^(Value error, |Input should be |String should )", "", problem["msg"])
        got = f"got {values.get(column, '')!r}, " if column else ""
        expected = words if words.startswith("expected") else f"expected {words}"
        raise ConfigError(f"{file}: row {number}: {f'{column}: ' if column else ''}{got}{expected}") from error
