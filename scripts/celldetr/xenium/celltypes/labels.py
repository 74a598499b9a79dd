"""Labels of cells: when a cell gets its type, and the table that keeps labels and fractions."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pandas import DataFrame

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic

LABELLED = "labelled"
REASONS = (LABELLED, "no counts", "few transcripts", "low fraction", "small margin", "annotators disagree")
"""Why a cell has its label, or none; the first that applies, in this order, after `LABELLED`."""
FRACTIONS = tuple(f"fraction_{name}" for name in ST_TYPES)
_METADATA = b"celldetr"
_SCHEMA = pa.schema(
    [
        ("cell_id", pa.string()),
        ("transcripts", pa.int32()),
        ("label", pa.int8()),
        ("second_label", pa.int8()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        *((name, pa.float32()) for name in FRACTIONS),
    ]
)


def best(fractions: DataFrame) -> NDArray[np.int8]:
    """Place in `ST_TYPES` of the largest fraction (N,), -1 where there is none."""
    values = fractions.to_numpy()
    known = np.isfinite(values).all(axis=1)
    return np.where(known, np.where(known[:, None], values, 0).argmax(axis=1), -1).astype(np.int8)


def label_cells(
    fractions: DataFrame, second: DataFrame, transcripts: NDArray[np.integer], settings: CellTypeSettings
) -> DataFrame:
    """Give cells a label where it is certain.

    Parameters
    ----------
    fractions
        Fractions (cells, ten types) that decide; the index holds the cell ids.
    second
        Fractions of the second annotator, for the same cells.
    transcripts
        Transcripts that the annotators saw in each cell (N,): of the genes that panel and reference share.
    settings
        Thresholds.

    Returns
    -------
    DataFrame
        A row per cell: ``cell_id``, ``transcripts``, ``label`` (place in `ST_TYPES` or -1), ``second_label`` (type by
        the second annotator, likewise), ``reason`` (one of `REASONS`) and ``fraction_{type}``.

    Raises
    ------
    InputError
        No cell gets a label.
    """
    values = fractions.to_numpy(dtype=np.float32)
    first, other = best(fractions), best(second)
    ordered = np.sort(np.where(first[:, None] >= 0, values, 0), axis=1)
    tests = [
        first < 0,
        transcripts < settings.min_transcripts,
        ordered[:, -1] < settings.min_fraction,
        ordered[:, -1] - ordered[:, -2] < settings.min_margin,
        (first != other) & settings.require_agreement,
    ]
    code = np.select(tests, list(range(1, len(REASONS))), default=0).astype(np.int64)
    table = DataFrame(
        {
            "cell_id": fractions.index.astype(str),
            "transcripts": np.asarray(transcripts).astype(np.int32),
            "label": np.where(code == 0, first, -1).astype(np.int8),
            "second_label": other,
            "reason": pd.Categorical(np.array(REASONS)[code], categories=list(REASONS)),
        }
    )
    if not (code == 0).any():
        numbers = ", ".join(f"{name}: {number}" for name, number in reason_counts(table).items() if number)
        raise InputError(
            f"no cell of {len(table)} gets a label ({numbers or 'there are no cells'}), expected some; is the "
            "reference of this tissue and species? Otherwise lower min_transcripts, min_fraction or min_margin"
        )
    return pd.concat([table, DataFrame(values, columns=list(FRACTIONS))], axis=1)


def reason_counts(table: DataFrame) -> dict[str, int]:
    """Reason -> cells, in the order of `REASONS`."""
    counts = table["reason"].astype(str).value_counts()
    return {name: int(counts.get(name, 0)) for name in REASONS}


def write_cells(path: str | os.PathLike[str], table: DataFrame, metadata: Mapping[str, Any]) -> None:
    """Write the table of `label_cells` (Parquet).

    Parameters
    ----------
    path
        File to write.
    table
        Table of `label_cells`.
    metadata
        JSON values to keep with it: settings, shared genes, versions; the names of the types are added.
    """
    kept = json.dumps({"classes": list(ST_TYPES), **metadata}).encode()
    schema = _SCHEMA.with_metadata({_METADATA: kept})
    with atomic(path) as temporary:
        content = pa.Table.from_pandas(table, schema=schema, preserve_index=False)
        pq.write_table(content, temporary, compression="zstd", write_page_checksum=True)


def read_cells(path: str | os.PathLike[str]) -> tuple[DataFrame, dict[str, Any]]:
    """Read and check a table of labelled cells.

    Returns
    -------
    tuple
        Table as `label_cells` makes it, and its metadata.

    Raises
    ------
    InputError
        The file is damaged or no such table.
    """
    try:
        found = pq.read_table(path, page_checksum_verification=True)
        values = found.replace_schema_metadata().to_pandas()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); annotate the sample again") from error
    kinds = dict(zip(found.schema.names, map(str, found.schema.types), strict=True))
    wanted = dict(zip(_SCHEMA.names, map(str, _SCHEMA.types), strict=True))
    wrong = [
        f"{name}: {kinds.get(name, 'missing')}, not {kind}" for name, kind in wanted.items() if kinds.get(name) != kind
    ]
    metadata = _metadata(found.schema)
    if wrong or metadata.get("classes") != list(ST_TYPES):
        raise InputError(
            f"{path}: got columns that differ ({'; '.join(wrong) or 'none'}) and the classes "
            f"{metadata.get('classes')}, expected a table of cell types with {', '.join(ST_TYPES)}: annotate "
            "the sample again"
        )
    table = values[_SCHEMA.names].copy()
    _check(table, str(path))
    table["reason"] = pd.Categorical(table["reason"].astype(str), categories=list(REASONS))
    return table, metadata


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    """Values kept with the table, none where they cannot be read."""
    try:
        content = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check(table: DataFrame, path: str) -> None:
    reasons = table["reason"].astype(str)
    problems = {
        "cell ids that occur twice or are empty": table["cell_id"].isna() | table["cell_id"].duplicated(),
        "unknown reasons": ~reasons.isin(REASONS),
        "labels that are no type": ~table["label"].between(-1, len(ST_TYPES) - 1)
        | ~table["second_label"].between(-1, len(ST_TYPES) - 1),
        "labels that contradict their reason": (table["label"] >= 0) != (reasons == LABELLED),
    }
    for words, rows in problems.items():
        if rows.any():
            raise InputError(
                f"{path}: got {words} in {int(rows.sum())} rows, first {int(np.flatnonzero(rows)[0])}; expected none: "
                "annotate the sample again"
            )
