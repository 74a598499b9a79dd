"""Raw counts in an .h5ad: where they are, whether they are what they claim to be, and a few rows of them at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import read_elem
from numpy.typing import NDArray
from pandas import DataFrame
from scipy import sparse

from celldetr.runtime.errors import InputError

LOCATIONS = {
    "raw/X": "raw/var",
    "layers/counts": "var",
    "layers/raw_counts": "var",
    "X": "var",
}
"""Where raw counts are looked for, in this order, and the table of the genes that belongs to it."""
_PROBE = 1000  # rows that tell whether a matrix holds raw counts
_LEAST_SPREAD = 0.1  # standard deviation of the totals over their mean; measured cells have several times that
_FEW = 20  # totals of fewer cells say nothing about normalisation
_BLOCK = 1 << 23  # values held at a time
_GAP = 1 << 15  # values between two wanted rows that are read and dropped rather than skipped


@dataclass(frozen=True)
class RawCounts:
    """Where the raw counts of a file are: `location` (a key of `LOCATIONS`), and their genes (index and columns)."""

    location: str
    genes: DataFrame


def find_counts(file: h5py.File, rows: NDArray[np.int64], where: Path) -> RawCounts:
    """Find the matrix that holds raw counts.

    Parameters
    ----------
    file
        Open .h5ad.
    rows
        Cells that will be used (increasing); up to a thousand of them are looked at.
    where
        Name for messages.

    Raises
    ------
    InputError
        No matrix holds raw counts; says of each why not.
    """
    probe = rows[np.unique(np.linspace(0, len(rows) - 1, min(_PROBE, len(rows))).astype(np.int64))]
    refused = []
    for location, genes in LOCATIONS.items():
        if location not in file or genes not in file:
            continue
        problem = why_not_raw(read_rows(file[location], probe, f"{where}: {location}"))
        if problem is None:
            return RawCounts(location, read_elem(file[genes]))
        refused.append(f"{location}: {problem}")
    raise InputError(
        f"{where}: got no raw counts ({'; '.join(refused) or 'no matrix at all'}); expected whole numbers as counted, "
        f"in one of {', '.join(LOCATIONS)}: get the file with raw counts, or put them into layers/counts"
    )


def why_not_raw(matrix: sparse.csr_matrix) -> str | None:
    """Say what shows that a matrix (cells, genes) holds no raw counts; None if nothing does.

    Counted molecules are whole, most of a cell's genes that are seen at all are seen once or a few times, and totals
    differ from cell to cell. Scaling and rounding leaves whole numbers, but totals that are nearly equal, or cells
    without a gene that is seen once.
    """
    values = matrix.data
    if not values.size:
        return "all zero"
    if not np.isfinite(values).all() or values.min() < 0:
        return "has negative or non-finite values"
    broken = values != np.rint(values)
    if broken.any():
        return f"has values that are not whole, e.g. {values[broken][0]:.4g}: normalised or log-transformed"
    totals = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    seen = np.diff(matrix.indptr) >= _FEW
    used = totals[seen]
    if len(used) < _FEW:
        return None
    if used.std() < _LEAST_SPREAD * used.mean():
        return (
            f"has whole numbers, but the totals of its cells are all near {np.median(used):.0f} "
            f"(standard deviation {used.std():.3g}): normalised to one total and rounded"
        )
    smallest = np.minimum.reduceat(values, matrix.indptr[:-1][seen])
    if (smallest > 1).mean() > 0.5:
        return (
            f"has whole numbers, but in {(smallest > 1).mean():.0%} of its cells no gene is seen once: "
            "scaled and rounded"
        )
    return None


def read_rows(element: h5py.Group | h5py.Dataset, rows: NDArray[np.int64], where: str) -> sparse.csr_matrix:
    """Read rows of a matrix without loading the others.

    Parameters
    ----------
    element
        Dense data set, or sparse group (CSR or CSC) as anndata writes it.
    rows
        Increasing row numbers (R,).
    where
        Name for messages.

    Returns
    -------
    csr_matrix
        Matrix (R, genes), float32, without stored zeros.

    Raises
    ------
    InputError
        The matrix is damaged or stored in an unknown way.
    """
    try:
        kind = "dense" if isinstance(element, h5py.Dataset) else _text(element.attrs["encoding-type"])
        readers: Mapping[str, Any] = {"dense": _dense_rows, "csr_matrix": _csr_rows, "csc_matrix": _csc_rows}
        if kind not in readers:
            raise InputError(f"{where}: got a matrix stored as {kind!r}, expected one of {', '.join(readers)}")
        matrix = readers[kind](element, rows)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"{where}: cannot be read ({error}); the file is damaged: get it again") from error
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix


def _dense_rows(element: h5py.Dataset, rows: NDArray[np.int64]) -> sparse.csr_matrix:
    step = max(1, _BLOCK // max(1, element.shape[1]))
    parts = [
        sparse.csr_matrix(element[rows[start : start + step]], dtype=np.float32) for start in range(0, len(rows), step)
    ]
    return sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, element.shape[1]), dtype=np.float32)


def _csr_rows(element: h5py.Group, rows: NDArray[np.int64]) -> sparse.csr_matrix:
    indptr = element["indptr"][:].astype(np.int64)
    width = int(element.attrs["shape"][1])
    parts = [sparse.csr_matrix((0, width), dtype=np.float32)]
    for run in _runs(rows, indptr):
        low, high = indptr[run[0]], indptr[run[-1] + 1]
        span = sparse.csr_matrix(
            (
                element["data"][low:high].astype(np.float32),
                element["indices"][low:high].astype(np.int32),
                indptr[run[0] : run[-1] + 2] - low,
            ),
            shape=(run[-1] + 1 - run[0], width),
        )
        parts.append(span[run - run[0]])
    return sparse.vstack(parts, format="csr")


def _runs(rows: NDArray[np.int64], indptr: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Group rows that are near each other on disk, so that each group is one read of bounded size."""
    begin = 0
    for end in range(1, len(rows) + 1):
        whole = end == len(rows)
        if (
            whole
            or indptr[rows[end]] - indptr[rows[end - 1] + 1] > _GAP
            or indptr[rows[end] + 1] - indptr[rows[begin]] > _BLOCK
        ):
            yield rows[begin:end]
            begin = end


def _csc_rows(element: h5py.Group, rows: NDArray[np.int64]) -> sparse.csr_matrix:
    """Read all columns, a block at a time, and keep the wanted rows."""
    indptr = element["indptr"][:].astype(np.int64)
    height, width = (int(size) for size in element.attrs["shape"])
    place = np.full(height, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    row_parts, column_parts, value_parts = [], [], []
    column = 0
    while column < width:
        stop = max(column + 1, int(np.searchsorted(indptr, indptr[column] + _BLOCK, side="right")) - 1)
        stop = min(stop, width)
        low, high = indptr[column], indptr[stop]
        found = place[element["indices"][low:high]]
        kept = found >= 0
        columns = np.repeat(np.arange(column, stop), np.diff(indptr[column : stop + 1]))
        row_parts.append(found[kept].astype(np.int32))
        column_parts.append(columns[kept].astype(np.int32))
        value_parts.append(element["data"][low:high][kept].astype(np.float32))
        column = stop
    entries = np.concatenate(value_parts), (np.concatenate(row_parts), np.concatenate(column_parts))
    return sparse.csr_matrix(entries, shape=(len(rows), width))


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
