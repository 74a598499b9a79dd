"""Raw counts in an .h5ad: find the matrix, check that it holds raw counts, read a few rows of it."""

from pathlib import Path

import h5py
import numpy as np
from anndata.io import read_elem, sparse_dataset
from numpy.typing import NDArray
from pandas import DataFrame
from scipy import sparse

from celldetr.runtime.errors import InputError

LOCATIONS = {"raw/X": "raw/var", "layers/counts": "var", "layers/raw_counts": "var", "X": "var"}
"""Matrices that may hold raw counts, and the table of their genes; of those with most genes, the first counts."""
_PROBE = 1000  # rows that are checked to choose a matrix
_MIN_SPREAD = 0.1  # standard deviation of the totals over their mean; several times that in measured cells
_MIN_SIZE = 20  # genes of a cell, and cells, that tell something about normalisation
_BLOCK = 500  # columns, or dense rows, that are read at once


def read_raw_counts(
    file: h5py.File, rows: NDArray[np.int64], cells: int, where: Path
) -> tuple[str, DataFrame, sparse.csr_matrix]:
    """Find the matrix with raw counts in an open .h5ad of `cells` cells and read increasing rows of it.

    Returns its location (key of `LOCATIONS`), the table of its genes, and counts (rows, genes) as of `read_rows`.
    Raises InputError if no matrix holds raw counts; the message gives the reason for each.
    """
    probe = rows[np.unique(np.linspace(0, len(rows) - 1, min(_PROBE, len(rows))).astype(np.int64))]
    tables = {place: read_elem(file[genes]) for place, genes in LOCATIONS.items() if place in file and genes in file}
    refused = []
    for location, table in sorted(tables.items(), key=lambda item: -len(item[1])):
        shape = cells, len(table)
        problem = why_not_raw(read_rows(file[location], probe, shape))
        if problem is None:
            matrix = read_rows(file[location], rows, shape)
            problem = why_not_raw(matrix)
        if problem is None:
            return location, table, matrix
        refused.append(f"{location}: {problem}")
    raise InputError(
        f"{where}: got no raw counts ({'; '.join(refused) or 'no matrix at all'}); expected whole numbers as counted, "
        f"in one of {', '.join(LOCATIONS)}: get the file with raw counts, or put them into layers/counts"
    )


def why_not_raw(matrix: sparse.csr_matrix) -> str | None:
    """Reason why a matrix (cells, genes) holds no raw counts; None if it may hold them.

    Raw counts are whole, most genes detected in a cell have counts of one or a few, and totals differ between cells.
    Scaled and rounded counts are whole, too, but their totals are nearly equal, or their cells have no gene with a
    count of one.
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
    seen = np.diff(matrix.indptr) >= _MIN_SIZE
    used = totals[seen]
    if len(used) < _MIN_SIZE:
        return None
    if used.std() < _MIN_SPREAD * used.mean():
        return (
            f"has whole numbers, but the totals of its cells are all near {np.median(used):.0f} "
            f"(standard deviation {used.std():.3g}): normalised to one total and rounded"
        )
    smallest = np.minimum.reduceat(values, matrix.indptr[:-1][seen])
    if (smallest > 1).mean() > 0.5:
        return (
            f"has whole numbers, but in {(smallest > 1).mean():.0%} of its cells no gene has a count of one: "
            "scaled and rounded"
        )
    return None


def read_rows(element: h5py.Group | h5py.Dataset, rows: NDArray[np.int64], shape: tuple[int, int]) -> sparse.csr_matrix:
    """Read increasing rows (R,) of a matrix (cells, genes) of anndata, dense, CSR or CSC, without loading the others.

    Returns csr_matrix (R, genes), float32, without stored zeros. Raises InputError if an older program wrote a square
    sparse matrix and did not note whether by rows or by columns.
    """
    if isinstance(element, h5py.Dataset):
        starts = range(0, len(rows), _BLOCK)
        matrix = sparse.vstack([sparse.csr_matrix(element[rows[start : start + _BLOCK]]) for start in starts])
    elif not {"encoding-type", "h5sparse_format"} & set(element.attrs):
        if shape[0] == shape[1]:
            raise InputError(
                f"{element.name}: got a sparse matrix of {shape[0]} cells and genes without the attribute "
                "encoding-type, expected csr_matrix or csc_matrix: write the file again with anndata 0.7 or newer"
            )
        layout = sparse.csr_matrix if len(element["indptr"]) - 1 == shape[0] else sparse.csc_matrix
        whole = layout(tuple(element[name][:] for name in ("data", "indices", "indptr")), shape)
        matrix = whole.tocsr()[rows]
    else:
        backed = sparse_dataset(element)
        if backed.format == "csr":
            matrix = backed[rows]
        else:
            starts = range(0, backed.shape[1], _BLOCK)
            matrix = sparse.hstack([backed[:, start : start + _BLOCK][rows] for start in starts])
    matrix = sparse.csr_matrix(matrix, dtype=np.float32)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix
