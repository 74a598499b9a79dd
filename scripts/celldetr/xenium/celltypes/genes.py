"""Genes: symbols and Ensembl ids of a table, duplicate symbols, and the genes shared by panel and reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame, Series
from scipy import sparse

from celldetr.runtime.errors import InputError

SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "SYMBOL")
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "feature_id", "ensembl", "ENSEMBL")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?(_PAR_Y)?")
_ID_SUFFIX = re.compile(r"_ENS[A-Z]*G\d{6,}(\.\d+)?$")  # CELLxGENE appends the id to duplicate symbols
_CONTROLS = re.compile(
    r"(?i)(negative[ _]?control|neg[ _]?control|blank|antisense_|intergenic|genomic[ _]?control|"
    r"(unassigned|deprecated)[ _]?codeword)"
)
_SHOWN = 5  # names in messages


@dataclass(frozen=True)
class SharedGenes:
    """Genes shared by two tables, in the order of the first."""

    names: tuple[str, ...]  # symbols in the first table
    first: NDArray[np.int64]  # their columns (G,) in the first table
    second: NDArray[np.int64]  # and in the second
    by: str  # what was compared: symbol or gene id


def symbols_and_ids(genes: DataFrame, where: str) -> tuple[list[str], list[str]]:
    """Symbols and Ensembl ids of a table of genes, whose index holds either (ids with or without version).

    An unknown id is ""; the id replaces a missing symbol. `where` names the table in messages. Raises InputError if the
    index holds Ensembl ids and no column symbols.
    """
    index = [str(name) for name in genes.index]
    if sum(bool(_ENSEMBL.fullmatch(name)) for name in index) * 2 <= len(index):
        column = next((name for name in ID_COLUMNS if name in genes), None)
        ids = [without_version(str(name)) for name in genes[column]] if column else [""] * len(index)
        return index, [name if _ENSEMBL.fullmatch(name) else "" for name in ids]
    column = next((name for name in SYMBOL_COLUMNS if name in genes), None)
    if column is None:
        raise InputError(
            f"{where}: got Ensembl ids as gene names and no column of symbols (columns: "
            f"{', '.join(map(str, genes.columns)) or 'none'}); expected one of {', '.join(SYMBOL_COLUMNS)}: add it"
        )
    ids = [without_version(name) for name in index]
    named = genes[column].astype(object).fillna("").astype(str).str.strip()
    symbols = [_ID_SUFFIX.sub("", name) or gene for name, gene in zip(named, ids, strict=True)]
    return [without_version(name) for name in symbols], ids


def without_version(name: str) -> str:
    """Remove the version of an Ensembl id; other names are unchanged."""
    return re.sub(r"\.\d+", "", name) if _ENSEMBL.fullmatch(name) else name


def sum_duplicates(
    matrix: sparse.csr_matrix, symbols: Sequence[str], ids: Sequence[str]
) -> tuple[sparse.csr_matrix, list[str], list[str], list[str]]:
    """Sum the columns of genes with the same symbol.

    Returns matrix (cells, unique genes), symbols and ids in order of first occurrence, and the duplicate symbols.
    """
    place, names = pd.factorize(np.array(symbols, dtype=object))
    if len(names) == len(symbols):
        return matrix, list(symbols), list(ids), []
    into = sparse.csr_matrix((np.ones(len(place), np.float32), (np.arange(len(place)), place)))
    _, first, times = np.unique(place, return_index=True, return_counts=True)
    return sparse.csr_matrix(matrix @ into), list(names), [ids[index] for index in first], list(names[times > 1])


def shared_genes(cells: AnnData, reference: AnnData, minimum: int) -> SharedGenes:
    """Find the genes shared by a sample's panel and a reference.

    Control probes and codewords of the panel do not count. Symbols are compared exactly. If Ensembl ids
    (var["gene_ids"]) match more genes, they decide: symbols change over the years. Raises InputError if they share
    fewer than `minimum`.
    """
    places = [place for place, name in enumerate(cells.var_names) if not _CONTROLS.match(str(name))]
    found = {"symbol": _common(cells.var_names.astype(str), reference.var_names.astype(str), places)}
    if "gene_ids" in cells.var and "gene_ids" in reference.var:
        found["gene id"] = _common(cells.var["gene_ids"].astype(str), reference.var["gene_ids"].astype(str), places)
    by = max(found, key=lambda kind: len(found[kind][0]))  # symbols when equal
    first, second = found[by]
    if len(first) < minimum:
        raise InputError(
            f"panel and reference: got {len(first)} genes in common of {len(places)} (panel, e.g. "
            f"{_examples(cells.var_names[places])}) and {reference.n_vars} (reference, e.g. "
            f"{_examples(reference.var_names)}), expected at least {minimum} (min_shared_genes); is the reference of "
            "the same species and named by the same symbols?"
        )
    return SharedGenes(tuple(str(name) for name in cells.var_names[first]), first, second, by)


def _common(
    cells: Sequence[str], reference: Sequence[str], places: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns of the common names in either table; of duplicate names, the first counts."""
    mine, other = (Series(map(without_version, names)) for names in (cells, reference))
    mine, other = (names[names != ""].drop_duplicates() for names in (mine.iloc[places], other))
    second = pd.Index(other.to_numpy()).get_indexer(mine.to_numpy())
    return mine.index.to_numpy(np.int64)[second >= 0], other.index.to_numpy(np.int64)[second[second >= 0]]


def _examples(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:_SHOWN]))
