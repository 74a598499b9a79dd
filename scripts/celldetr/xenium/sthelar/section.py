"""Files of a section of STHELAR, as `celldetr.fetch.sthelar` writes them: rows of patches, their places, its cells."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celldetr.config.sthelar import CELLS, PLACES, SOURCE
from celldetr.runtime.errors import InputError
from celldetr.store import NO_LABEL
from celldetr.xenium.sthelar.nuclei import SIDE, as_ids
from celldetr.xenium.sthelar.types import TypeTable

_ID, _AREA = "cell_id_int", "nucleus_area"
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class SectionCells:
    """The cells (C) of a section, by rising id."""

    ids: NDArray[np.int64]  # (C,) see `as_ids`
    labels: NDArray[np.int8]  # (C,) index of the cell type, or -1
    areas: NDArray[np.float64] | None  # (C,) um^2 of the nucleus; None if the table does not have them
    untyped: Mapping[str, int]  # labels -> cells without a type

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index (n,) of each id; -1 for one that has no row."""
        place = np.minimum(np.searchsorted(self.ids, ids), max(len(self.ids) - 1, 0))
        known = self.ids[place] == ids if len(self.ids) else np.zeros(len(ids), bool)
        return np.where(known, place, -1)

    def label(self, index: NDArray[np.int64]) -> NDArray[np.int8]:
        """Labels (n,) of what `find` returned."""
        return np.where(index >= 0, self.labels[index], NO_LABEL).astype(np.int8)


@dataclass(frozen=True)
class Section:
    """A section: its name, the files of its patches, the place of each, and where it is from."""

    name: str
    files: tuple[Path, ...]
    places: Mapping[str, tuple[int, int]]  # file name of a patch -> x, y of its corner, px of STHELAR
    size: tuple[int, int]  # width and height up to the last place, px of STHELAR
    source: Mapping[str, str]

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and values of each patch, in order; memory holds a row group, which has few."""
        number = 0
        for path in self.files:
            with _opened(path) as file:
                for group in range(file.num_row_groups):
                    for row in file.read_row_group(group, list(columns)).to_pylist():
                        yield number, row
                        number += 1

    def sample(self, columns: Sequence[str], count: int) -> list[dict[str, Any]]:
        """Values of about `count` patches from all over the section; reads these row groups alone."""
        groups = []
        for path in self.files:
            with _opened(path) as file:
                groups += [(path, group) for group in range(file.num_row_groups)]
        wanted = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), count)).astype(int))
        each, found = -(-count // len(wanted)), []
        for path, group in (groups[index] for index in wanted):
            with _opened(path) as file:
                table = file.read_row_group(group, list(columns))
            chosen = np.unique(np.linspace(0, table.num_rows - 1, min(table.num_rows, each)).astype(int))
            found += table.take(pa.array(chosen)).to_pylist()
        return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; what is damaged in it is an InputError with its name."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove its folder to get the section again") from error


def read_section(folder: Path, name: str) -> Section:
    """Read the places of the patches of a section, and find the files of the patches.

    Raises InputError if files or columns are missing, a place stands twice, or places are not `SIDE` px wide.
    """
    files = tuple(sorted(folder.glob("patches-*.parquet")))
    if not files:
        raise InputError(f"{folder}: got no patches-*.parquet; remove the folder to get the section again")
    places = _table(folder / PLACES, ("file_name", "xmin", "ymin", "xmax", "ymax"))
    names = places["file_name"].astype(str)
    corners = places[["xmin", "ymin", "xmax", "ymax"]].to_numpy(np.float64)
    where = f"{folder / PLACES}"
    if (twice := names[names.duplicated()]).size or (twice := names[places[["xmin", "ymin"]].duplicated()]).size:
        raise InputError(f"{where}: got the place of {twice.iloc[0]} twice, expected each once")
    if not np.isfinite(corners).all() or (sides := np.unique(corners[:, 2:] - corners[:, :2])).tolist() != [SIDE]:
        got = "no numbers" if not np.isfinite(corners).all() else f"sides of {sides[:_SHOWN].tolist()} px"
        raise InputError(f"{where}: got {got}, expected places {SIDE} px wide: in pixels of the patches")
    low = np.rint(corners[:, :2]).astype(np.int64)
    width, height = (low.max(axis=0) + SIDE).tolist()
    with (folder / SOURCE).open(encoding="utf-8") as file:
        source = json.load(file)
    return Section(name, files, dict(zip(names, map(tuple, low.tolist()), strict=True)), (width, height), source)


def read_cells(folder: Path, types: TypeTable) -> SectionCells:
    """Read the cells of a section and give each its type.

    Raises InputError if columns are missing, an id stands twice, or the table of types has no row for some labels.
    """
    path = folder / CELLS
    table = _table(path, (_ID, *types.columns), (_AREA,), f"the layout of STHELAR, with the columns of {types.path}")
    if table[_ID].dtype.kind not in "iu":
        raise InputError(f"{path}: {_ID}: got {table[_ID].dtype}, expected integers without gaps")
    ids = as_ids(table[_ID])
    order = np.argsort(ids, kind="stable")
    if (np.diff(ids[order]) == 0).any() or (ids == 0).any():
        raise InputError(f"{path}: {_ID}: got an id twice, or 0, which is the background; expected each cell once")
    texts = table[list(types.columns)].astype(object)
    number, present = pd.factorize(pd.MultiIndex.from_frame(texts.where(texts.notna(), "").astype(str)))
    counts = Counter(number.tolist())
    kinds, unknown, untyped = [], [], Counter[str]()
    for index, labels in enumerate(present):
        try:
            kind = types.type_of(tuple(labels))
        except KeyError:
            unknown.append(f"{list(labels)} ({counts[index]} cells)")
            continue
        kinds.append(NO_LABEL if kind is None else kind)
        if kind is None:
            untyped[" / ".join(labels)] += counts[index]
    if unknown:
        raise InputError(
            f"{path}: got {', '.join(types.columns)} that {types.path} has no row for: {'; '.join(unknown[:_SHOWN])}; "
            "expected one for each: add rows, with the type or -"
        )
    labels = np.array(kinds, np.int8)[number] if len(table) else np.empty(0, np.int8)
    areas = table[_AREA].to_numpy(np.float64)[order] if _AREA in table else None
    return SectionCells(ids[order], labels[order], areas, dict(untyped))


def _table(
    path: Path, columns: Sequence[str], further: Sequence[str] = (), expected: str = "the layout of STHELAR"
) -> pd.DataFrame:
    with _opened(path) as file:
        present = file.schema_arrow.names
        if missing := [name for name in columns if name not in present]:
            raise InputError(f"{path}: got no columns {missing}, only {present}; expected {expected}")
        frame: pd.DataFrame = file.read([*columns, *(name for name in further if name in present)]).to_pandas()
    return frame
