"""Annotated single-cell references: raw counts, symbols, the ten types, and a balanced sample of the cells."""

import contextlib
import csv
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from numpy.typing import NDArray
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.runtime.errors import CellDETRError, ConfigError, InputError
from celldetr.runtime.files import atomic
from celldetr.xenium.celltypes.counts import RawCounts, find_counts, read_rows, why_not_raw
from celldetr.xenium.celltypes.genes import sum_duplicates, symbols_and_ids

log = logging.getLogger(__name__)

LEFT_OUT = "-"
"""In a mapping, in place of a type: cells of this label are left out on purpose."""
HELD_OUT_SHARE = 0.2
"""Share of the sampled cells of each type that annotates nothing and is re-annotated as a test."""


@dataclass(frozen=True)
class LabelCount:
    """Cells of a label: its type (or `LEFT_OUT`), cells in the file, cells sampled."""

    type: str
    cells: int
    sampled: int


@dataclass(frozen=True)
class ReferenceSummary:
    """What was found in a reference.

    Attributes
    ----------
    file
        Name of the file.
    label_column
        Column of obs that the labels are from.
    counts_from
        Where the raw counts are in the file.
    cells, genes
        Cells of the file, genes of the prepared reference.
    types
        Type -> cells in the file; all ten.
    sampled
        Type -> cells of the prepared reference.
    held_out
        Sampled cells that are kept for the test.
    labels
        Label -> `LabelCount`.
    summed_symbols
        Symbols of several genes, whose counts were added.
    missing_types
        Types that the file has no cells of.
    unused_labels
        Labels of the mapping that the file does not have.
    """

    file: str
    label_column: str
    counts_from: str
    cells: int
    genes: int
    types: Mapping[str, int]
    sampled: Mapping[str, int]
    held_out: int
    labels: Mapping[str, LabelCount]
    summed_symbols: tuple[str, ...]
    missing_types: tuple[str, ...]
    unused_labels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def read_mapping(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a table of labels and their types.

    Parameters
    ----------
    path
        TSV with the columns ``label`` and ``type``; a type is one of the ten or "-" for labels to leave out. Lines
        that begin with # are comments.

    Raises
    ------
    ConfigError
        No such file, other columns, labels that occur twice, unknown types; names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a table (TSV) of labels and types") from error
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and line[0] != "#"]
    try:
        rows = list(csv.reader([line for _, line in numbered], delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a table (TSV) of labels and types") from error
    if not rows or rows[0] != ["label", "type"]:
        raise ConfigError(f"{path}: got the columns {rows[0] if rows else []}, expected label and type, tab-separated")
    mapping: dict[str, str] = {}
    for (number, _), row in zip(numbered[1:], rows[1:], strict=True):
        where = f"{path}, line {number}"
        if len(row) != 2 or not row[0]:
            raise ConfigError(f"{where}: got {row}, expected a label and a type, tab-separated")
        label, kind = row[0], row[1].strip()
        if label in mapping:
            raise ConfigError(f"{where}: got the label {label!r} a second time, expected each once")
        if kind not in (*ST_TYPES, LEFT_OUT):
            raise ConfigError(f"{where}: got the type {kind!r}, expected one of {', '.join(ST_TYPES)}, or {LEFT_OUT}")
        mapping[label] = kind
    return mapping


def prepare_reference(
    path: str | os.PathLike[str],
    mapping: Mapping[str, str],
    *,
    label_column: str,
    cells_per_type: int,
    seed: int,
) -> tuple[AnnData, ReferenceSummary]:
    """Draw a balanced reference from an annotated .h5ad; only the drawn cells are loaded.

    Parameters
    ----------
    path
        File with raw counts in raw.X, a layer (counts, raw_counts) or X.
    mapping
        Label -> one of the ten types, or "-" to leave its cells out.
    label_column
        Column of obs with the labels.
    cells_per_type
        Most cells per type; half of them are shared evenly by the labels of the type, half by their numbers of cells.
    seed
        Of the sampling.

    Returns
    -------
    tuple
        Reference: X (csr_matrix, float32, raw counts), obs["type"], obs["label"], obs["held_out"], var index symbols,
        var["gene_ids"], uns["composition"] (type -> cells of the whole file); and what was found.

    Raises
    ------
    InputError
        The file lacks labels or raw counts, or has labels that the mapping does not have.
    ConfigError
        More labels in a type than cells to draw.
    """
    where = Path(path)
    generator = np.random.default_rng(seed)
    try:
        file = h5py.File(where, "r")
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error}); expected an .h5ad file") from error
    with file:
        with _reading(where):
            labels = _labels(file, where, label_column)
        numbers = _label_numbers(labels, mapping, where, label_column)
        types = {kind: sum(numbers[name] for name in numbers if mapping[name] == kind) for kind in ST_TYPES}
        _check_types(types, where)
        rows = _draw(labels, numbers, mapping, cells_per_type, generator)
        names = labels[rows].astype(str)
        with _reading(where):
            raw, matrix = _raw_rows(file, rows, where)
    symbols, ids = symbols_and_ids(raw.genes, f"{where}: genes of {raw.location}")
    matrix, symbols, ids, summed = sum_duplicates(matrix, symbols, ids)
    kinds = np.array([mapping[name] for name in names])
    obs = {
        "type": pd.Categorical(kinds, categories=ST_TYPES),
        "label": pd.Categorical(names),
        "held_out": _hold_out(kinds, generator),
    }
    reference = AnnData(
        sparse.csr_matrix(matrix, dtype=np.float32),
        obs=pd.DataFrame(obs, index=rows.astype(str)),
        var=pd.DataFrame({"gene_ids": ids}, index=pd.Index(symbols)),
        uns={"composition": types},
    )
    drawn = Counter(names.tolist())
    summary = ReferenceSummary(
        file=where.name,
        label_column=label_column,
        counts_from=raw.location,
        cells=len(labels),
        genes=reference.n_vars,
        types=types,
        sampled={kind: int((kinds == kind).sum()) for kind in ST_TYPES},
        held_out=int(reference.obs["held_out"].sum()),
        labels={name: LabelCount(mapping[name], number, drawn[name]) for name, number in sorted(numbers.items())},
        summed_symbols=tuple(summed),
        missing_types=tuple(kind for kind in ST_TYPES if not types[kind]),
        unused_labels=tuple(name for name in mapping if name not in numbers),
    )
    _report(summary)
    return reference, summary


def write_reference(path: str | os.PathLike[str], reference: AnnData) -> None:
    """Write a prepared reference (.h5ad)."""
    with atomic(path) as temporary:
        reference.write_h5ad(temporary, compression="gzip")


def read_reference(path: str | os.PathLike[str]) -> AnnData:
    """Read a prepared reference.

    Raises
    ------
    InputError
        The file is none.
    """
    with _reading(Path(path)):
        reference = anndata.read_h5ad(path)
    wanted = {"type", "label", "held_out"}
    unknown = set(reference.obs["type"].astype(str)) - set(ST_TYPES) if "type" in reference.obs else set()
    if (
        not wanted <= set(reference.obs)
        or unknown
        or "gene_ids" not in reference.var
        or "composition" not in reference.uns
    ):
        raise InputError(
            f"{path}: got obs columns {sorted(reference.obs)}, unknown types {sorted(unknown) or 'none'}; expected a "
            f"prepared reference with {', '.join(sorted(wanted))}, var['gene_ids'] and uns['composition']: prepare it "
            "again"
        )
    reference.X = sparse.csr_matrix(reference.X)
    return reference


@contextlib.contextmanager
def _reading(where: Path) -> Iterator[None]:
    try:
        yield
    except CellDETRError:
        raise
    except Exception as error:  # h5py and anndata have many kinds of error for damaged bytes
        raise InputError(f"{where}: cannot be read ({error}); the file is damaged: get or make it again") from error


def _labels(file: h5py.File, where: Path, column: str) -> NDArray[Any]:
    """Labels of all cells (N,), as objects."""
    obs = file.get("obs")
    if not isinstance(obs, h5py.Group) or "__categories" in obs:
        raise InputError(
            f"{where}: got a table of cells (obs) in the layout of anndata before 0.7; expected a newer one: read the "
            "file with anndata.read_h5ad and write it again"
        )
    if column not in obs:
        found = sorted(name for name in obs if not name.startswith("_"))
        raise InputError(f"{where}: got no column {column!r} in obs, expected one of {', '.join(found)} (label_column)")
    labels = pd.Series(read_elem(obs[column])).astype(object)
    missing = labels.isna() | labels.isin(("", "nan", "NaN"))
    if missing.any():
        raise InputError(
            f"{where}: obs[{column!r}]: {int(missing.sum())} of {len(labels)} cells have no label (NaN or empty), "
            "expected a label for each: remove these cells from the file, or name them and map the name to "
            f"{LEFT_OUT!r}"
        )
    return labels.astype(str).to_numpy(dtype=object)


def _label_numbers(labels: NDArray[Any], mapping: Mapping[str, str], where: Path, column: str) -> dict[str, int]:
    """Label -> cells, of labels that are all in the mapping."""
    numbers = {str(name): int(count) for name, count in pd.Series(labels).value_counts().items()}
    unmapped = [f"{name!r} ({count} cells)" for name, count in numbers.items() if name not in mapping]
    if unmapped:
        raise InputError(
            f"{where}: obs[{column!r}]: {len(unmapped)} of {len(numbers)} labels are not in the mapping: "
            f"{', '.join(unmapped)}; expected a type for each: add them to the table, with {LEFT_OUT!r} where cells "
            "are to be left out"
        )
    return numbers


def _raw_rows(file: h5py.File, rows: NDArray[np.int64], where: Path) -> tuple[RawCounts, sparse.csr_matrix]:
    """Where the raw counts are, and those of the drawn cells, all of them checked."""
    raw = find_counts(file, rows, where)
    matrix = read_rows(file[raw.location], rows, f"{where}: {raw.location}")
    problem = why_not_raw(matrix)
    if problem:
        raise InputError(f"{where}: {raw.location}: {problem}; expected raw counts: get the file with raw counts")
    return raw, matrix


def _check_types(types: Mapping[str, int], where: Path) -> None:
    found = [kind for kind, count in types.items() if count]
    if len(found) < 2:
        raise InputError(
            f"{where}: got cells of {len(found)} types ({', '.join(found) or 'none'}), expected at least 2 of the ten: "
            "check the mapping and label_column"
        )


def _draw(
    labels: NDArray[Any],
    numbers: Mapping[str, int],
    mapping: Mapping[str, str],
    cells_per_type: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw cells, increasing row numbers."""
    drawn = []
    for kind in ST_TYPES:
        members = sorted(name for name in numbers if mapping[name] == kind)
        if len(members) > cells_per_type:
            raise ConfigError(
                f"cells_per_type: got {cells_per_type}, expected at least {len(members)}, one for each label of {kind}"
            )
        for name, take in zip(members, _shares([numbers[name] for name in members], cells_per_type), strict=True):
            drawn.append(generator.choice(np.flatnonzero(labels == name), take, replace=False))
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _shares(available: list[int], most: int) -> list[int]:
    """How many cells each label of a type gives: at least an even share of half of them, the rest by its size."""
    if sum(available) <= most:
        return available
    shares = np.array([min(number, max(1, most // (2 * len(available)))) for number in available])
    left = np.array(available) - shares
    more = (most - shares.sum()) * left / left.sum()
    shares += more.astype(int)
    for index in np.argsort(more.astype(int) - more, kind="stable")[: most - shares.sum()]:
        shares[index] += 1
    return [int(share) for share in shares]


def _hold_out(kinds: NDArray[Any], generator: np.random.Generator) -> NDArray[np.bool_]:
    held = np.zeros(len(kinds), dtype=bool)
    for kind in ST_TYPES:
        rows = np.flatnonzero(kinds == kind)
        held[generator.choice(rows, int(len(rows) * HELD_OUT_SHARE), replace=False)] = True
    return held


def _report(summary: ReferenceSummary) -> None:
    for kind, number in summary.types.items():
        log.info("%-12s %8d cells, %6d sampled", kind, number, summary.sampled[kind])
    if summary.missing_types:
        log.warning("the reference has no cells of: %s; no cell can become one", ", ".join(summary.missing_types))
    if summary.unused_labels:
        log.warning("labels of the mapping that the file does not have: %s", ", ".join(summary.unused_labels))
    if summary.summed_symbols:
        log.info("counts of genes with the same symbol were added: %s", ", ".join(summary.summed_symbols))
