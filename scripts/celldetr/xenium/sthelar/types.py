"""The table of the cell type of each of STHELAR's categories."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from celldetr.config.classes import ST_TYPES
from celldetr.runtime.errors import ConfigError

NO_TYPE, ANY = "-", "*"
"""In the table: no cell type; any label, or none."""


@dataclass(frozen=True)
class TypeTable:
    """Which cell type a cell has, by the labels in some columns of its metadata; the first row that fits decides."""

    path: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], int | None], ...]  # labels, and index of the type or None

    def type_of(self, labels: tuple[str, ...]) -> int | None:
        """Index of the type of a cell with these labels ("" where there is none); None without a type.

        Raises KeyError if no row fits.
        """
        for wanted, kind in self.rows:
            if all(want in (ANY, label) for want, label in zip(wanted, labels, strict=True)):
                return kind
        raise KeyError(labels)


def read_types(path: str | os.PathLike[str]) -> TypeTable:
    """Read the table (TSV): a column for each column of labels in the metadata, and ``type``.

    A label may be * (any, or none), a type "-" (none). Lines that begin with # are comments. Raises ConfigError if the
    file cannot be read, columns are missing, a type is unknown, or a row stands twice; it names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and line[0] != "#"]
        lines = list(csv.reader([line for _, line in numbered], delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a table (TSV) of labels and types") from error
    head = lines[0] if lines else []
    if len(head) < 2 or head[-1] != "type" or len(set(head)) < len(head) or "" in head:
        raise ConfigError(
            f"{path}: got the columns {head}, expected columns of the cell metadata and then type, tab-separated"
        )
    rows: dict[tuple[str, ...], int | None] = {}
    for (number, _), line in zip(numbered[1:], lines[1:], strict=True):
        where = f"{path}, line {number}"
        labels, kind = tuple(cell.strip() for cell in line[:-1]), line[-1].strip()
        if len(line) != len(head):
            raise ConfigError(f"{where}: got {len(line)} cells, expected {len(head)}: {', '.join(head)}")
        if kind not in (*ST_TYPES, NO_TYPE):
            raise ConfigError(f"{where}: got the type {kind!r}, expected one of {', '.join(ST_TYPES)}, or {NO_TYPE}")
        if labels in rows:
            raise ConfigError(f"{where}: got the labels {list(labels)} a second time, expected each once")
        rows[labels] = None if kind == NO_TYPE else ST_TYPES.index(kind)
    return TypeTable(str(path), tuple(head[:-1]), tuple(rows.items()))
