"""Annotated single-cell references: draw a balanced sample of the cells of the ten types."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from numpy.typing import NDArray

from celldetr.config.classes import ST_TYPES
from celldetr.runtime.errors import CellDETRError, ConfigError, InputError
from celldetr.runtime.files import atomic
from celldetr.runtime.provenance import sha256
from celldetr.xenium.celltypes.counts import read_raw_counts
from celldetr.xenium.celltypes.genes import sum_duplicates, symbols_and_ids
from celldetr.xenium.celltypes.mapping import LEFT_OUT, check_mapping

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2
"""Share of the sampled cells of each type that are held out and annotated as a test."""


def prepare_reference(
    path: str | os.PathLike[str],
    mapping: Mapping[str, str],
    *,
    label_column: str,
    cells_per_type: int,
    seed: int,
    cells: int | None = None,
    mapping_file: str | os.PathLike[str] = "mapping",
) -> tuple[AnnData, dict[str, Any]]:
    """Draw a balanced reference from an annotated .h5ad; only the drawn cells are loaded.

    Of each type at most `cells_per_type` cells are drawn; its labels share half of them evenly, half by their numbers
    of cells. Returns the reference (X raw counts, csr_matrix, float32; obs type, label, held_out; var index symbols,
    gene_ids; uns["composition"] type -> cells of the whole file, uns["warnings"] lines on the mapping), and its summary
    for people (JSON values). `mapping_file` names the mapping in messages.

    Raises InputError if the file lacks labels or raw counts, has labels that the mapping lacks, or not as many `cells`
    as expected, or if the mapping swaps types; ConfigError if a type has more labels than cells to draw.
    """
    where = Path(path)
    generator = np.random.default_rng(seed)
    with _reading(where), h5py.File(where, "r") as file:
        labels = _labels(file, where, label_column)
        if cells is not None and len(labels) != cells:
            raise InputError(
                f"{where}: got {len(labels)} cells, expected {cells} (column cells of the references sheet); is it "
                "another version of the data set? Get that version, or correct the sheet"
            )
        numbers, types = _count(labels, mapping, f"{where}: obs[{label_column!r}]")
        rows = _draw(labels, numbers, mapping, cells_per_type, generator)
        location, genes, matrix = read_raw_counts(file, rows, len(labels), where)
    symbols, ids = symbols_and_ids(genes, f"{where}: genes of {location}")
    matrix, symbols, ids, summed = sum_duplicates(matrix, symbols, ids)
    names = labels[rows].astype(str)
    kinds = np.array([mapping[name] for name in names])
    held = np.zeros(len(rows), dtype=bool)
    for kind in ST_TYPES:
        places = np.flatnonzero(kinds == kind)
        held[generator.choice(places, int(len(places) * HELD_OUT_SHARE), replace=False)] = True
    obs = {"type": pd.Categorical(kinds, categories=ST_TYPES), "label": pd.Categorical(names), "held_out": held}
    reference = AnnData(
        matrix,
        obs=pd.DataFrame(obs, index=rows.astype(str)),
        var=pd.DataFrame({"gene_ids": ids}, index=pd.Index(symbols)),
        uns={"composition": types},
    )
    warnings = check_mapping(reference, mapping, mapping_file)
    reference.uns["warnings"] = "\n".join(warnings)
    summary = {
        "file": where.name,
        "sha256": sha256(where),
        "label_column": label_column,
        "counts_from": location,
        "cells": len(labels),
        "genes": reference.n_vars,
        "summed_symbols": summed,
        **_summary(reference, numbers, mapping),
        "warnings": warnings,
    }
    if summed:
        log.info("summed the counts of genes with the same symbol: %s", ", ".join(summed))
    return reference, summary


def _summary(reference: AnnData, numbers: Mapping[str, int], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Cells of the file and of the reference by type and label; `numbers` are label -> cells of the file."""
    types = reference.uns["composition"]
    sampled, drawn = (Counter(reference.obs[name].tolist()) for name in ("type", "label"))
    for kind, number in types.items():
        log.info("%-12s %8d cells, %6d sampled", kind, number, sampled[kind])
    missing = [kind for kind in ST_TYPES if not types[kind]]
    unused = [name for name in mapping if name not in numbers]
    if missing:
        log.warning("the reference has no cells of these types: %s; no cell can get one of them", ", ".join(missing))
    if unused:
        log.warning("labels of the mapping that are not in the file: %s", ", ".join(unused))
    return {
        "types": types,
        "sampled": {kind: sampled[kind] for kind in ST_TYPES},
        "held_out": int(reference.obs["held_out"].sum()),
        "labels": {
            name: {"type": mapping[name], "cells": number, "sampled": drawn[name]}
            for name, number in sorted(numbers.items())
        },
        "missing_types": missing,
        "unused_labels": unused,
    }


def write_reference(path: str | os.PathLike[str], reference: AnnData) -> None:
    """Write a prepared reference (.h5ad)."""
    with atomic(path) as temporary:
        reference.write_h5ad(temporary, compression="gzip")


def read_reference(path: str | os.PathLike[str]) -> AnnData:
    """Read the reference of `write_reference`; raises InputError if it cannot be read."""
    with _reading(Path(path)):
        return anndata.read_h5ad(path)


@contextlib.contextmanager
def _reading(where: Path) -> Iterator[None]:
    try:
        yield
    except CellDETRError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds of error on damaged files
        raise InputError(f"{where}: cannot be read ({error}); expected an .h5ad file: get or make it again") from error


def _labels(file: h5py.File, where: Path, column: str) -> NDArray[Any]:
    """Labels of all cells (N,), object dtype."""
    obs = file.get("obs")
    if not isinstance(obs, h5py.Group) or "__categories" in obs:
        raise InputError(
            f"{where}: got a table of cells (obs) in the layout of anndata before 0.7; expected a newer one: read the "
            "file with anndata.read_h5ad and write it again"
        )
    if column not in obs:
        found = sorted(name for name in obs if not name.startswith("_"))
        raise InputError(
            f"{where}: got no column {column!r} in obs, expected one of {', '.join(found)}: correct column "
            "label_column of the references sheet"
        )
    labels = pd.Series(read_elem(obs[column])).astype(object)
    missing = labels.isna() | labels.isin(("", "nan", "NaN"))
    if missing.any():
        raise InputError(
            f"{where}: obs[{column!r}]: {int(missing.sum())} of {len(labels)} cells have no label (NaN or empty), "
            "expected a label for each: remove these cells from the file, or name them and map the name to "
            f"{LEFT_OUT!r}"
        )
    return labels.astype(str).to_numpy(dtype=object)


def _count(labels: NDArray[Any], mapping: Mapping[str, str], where: str) -> tuple[dict[str, int], dict[str, int]]:
    """Count the cells of each label, all of which must be in the mapping, and of each of the ten types."""
    numbers = {str(name): int(count) for name, count in pd.Series(labels).value_counts().items()}
    unmapped = [f"{name!r} ({count} cells)" for name, count in numbers.items() if name not in mapping]
    if unmapped:
        raise InputError(
            f"{where}: {len(unmapped)} of {len(numbers)} labels are not in the mapping: {', '.join(unmapped)}; "
            "expected a type for each: add them to the table in column mapping of the references sheet, with "
            f"{LEFT_OUT!r} where cells are to be left out"
        )
    types = {kind: sum(numbers[name] for name in numbers if mapping[name] == kind) for kind in ST_TYPES}
    found = [kind for kind, count in types.items() if count]
    if len(found) < 2:
        raise InputError(
            f"{where}: got cells of {len(found)} types ({', '.join(found) or 'none'}), expected at least 2 of the ten: "
            "check columns mapping and label_column of the references sheet"
        )
    return numbers, types


def _draw(
    labels: NDArray[Any], numbers: Mapping[str, int], mapping: Mapping[str, str], most: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw cells; returns increasing row numbers."""
    drawn = []
    for kind in ST_TYPES:
        members = sorted(name for name in numbers if mapping[name] == kind)
        if len(members) > most:
            raise ConfigError(
                f"cells_per_type: got {most}, expected at least {len(members)}, one for each label of {kind}"
            )
        for name, take in zip(members, _shares([numbers[name] for name in members], most), strict=True):
            drawn.append(rng.choice(np.flatnonzero(labels == name), take, replace=False))
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _shares(available: list[int], most: int) -> list[int]:
    """Cells to draw from each label of a type: an even share of half of `most`, the rest by the size of the label."""
    if sum(available) <= most:
        return available
    shares = np.array([min(number, max(1, most // (2 * len(available)))) for number in available])
    left = np.array(available) - shares
    more = (most - shares.sum()) * left / left.sum()
    shares += more.astype(int)
    for index in np.argsort(more.astype(int) - more, kind="stable")[: most - shares.sum()]:
        shares[index] += 1
    return [int(share) for share in shares]
