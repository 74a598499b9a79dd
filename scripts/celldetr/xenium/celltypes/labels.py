"""Labels of cells: thresholds for a certain type, and the Parquet table of labels and fractions."""

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

UNKNOWN, UNLIKE, IMPRECISE = "unknown type", "unlike its type", "imprecise type"
_UNCERTAIN = ("labelled", "no counts", "few transcripts", "low fraction", "small margin", "annotators disagree")
REASONS = (*_UNCERTAIN, UNKNOWN, UNLIKE, IMPRECISE)
"""``labelled``, or the first reason, in this order, why a cell has no label."""
FRACTIONS = tuple(f"fraction_{name}" for name in ST_TYPES)


def best(fractions: DataFrame) -> NDArray[np.int8]:
    """Index in `ST_TYPES` of the largest fraction (N,); -1 for cells without fractions."""
    values = fractions.to_numpy()
    known = np.isfinite(values).all(axis=1)
    return np.where(known, np.where(known[:, None], values, 0).argmax(axis=1), -1).astype(np.int8)


def label_cells(
    fractions: DataFrame, second: DataFrame, transcripts: NDArray[np.integer], settings: CellTypeSettings
) -> DataFrame:
    """Label the cells whose type is certain.

    `fractions` (cells, ten types; index = cell ids) are those by optimal transport, `second` those by correlation;
    `transcripts` (N,) counts the shared genes. Returns a row per cell: ``cell_id``, ``transcripts``, ``label`` (index
    in `ST_TYPES` or -1), ``second_label`` (type by correlation, or -1), ``reason`` (one of `REASONS`) and
    ``fraction_{type}``.
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
    code = np.select(tests, list(range(1, len(_UNCERTAIN))), default=0).astype(np.int64)
    table = DataFrame(
        {
            "cell_id": fractions.index.astype(str),
            "transcripts": np.asarray(transcripts).astype(np.int32),
            "label": np.where(code == 0, first, -1).astype(np.int8),
            "second_label": other,
            "reason": pd.Categorical(np.array(REASONS)[code], categories=list(REASONS)),
        }
    )
    return pd.concat([table, DataFrame(values, columns=list(FRACTIONS))], axis=1)


def withdraw(table: DataFrame, cells: NDArray[np.bool_], reason: str) -> DataFrame:
    """Take the label of the labelled ones among some `cells` (N,) of the table of `label_cells`, for a reason."""
    taken = cells & (table["label"] >= 0).to_numpy()
    return table.assign(label=table["label"].mask(taken, -1), reason=table["reason"].mask(taken, reason))


def require_labels(table: DataFrame) -> None:
    """Raise InputError if no cell has a label."""
    if not (table["label"] >= 0).any():
        numbers = ", ".join(f"{name}: {number}" for name, number in reason_counts(table).items() if number)
        raise InputError(
            f"no cell of {len(table)} gets a label ({numbers or 'there are no cells'}), expected some; is the "
            "reference of this tissue and species? Otherwise lower min_transcripts, min_fraction, min_margin or "
            "min_precision"
        )


def reason_counts(table: DataFrame) -> dict[str, int]:
    """Reason -> cells, in the order of `REASONS`."""
    return {str(name): int(number) for name, number in table["reason"].value_counts().reindex(REASONS).items()}


def write_cells(path: str | os.PathLike[str], table: DataFrame, metadata: Mapping[str, Any]) -> None:
    """Write the table of `label_cells` (Parquet) with the types and JSON metadata: settings, shared genes, versions."""
    kept = json.dumps({"classes": list(ST_TYPES), **metadata}).encode()
    content = pa.Table.from_pandas(table, preserve_index=False)
    with atomic(path) as temporary:
        pq.write_table(content.replace_schema_metadata({b"celldetr": kept}), temporary, compression="zstd")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON metadata of `write_cells`; raises InputError if there are none."""
    try:
        metadata: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"celldetr"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); annotate the sample again") from error
    return metadata


def read_cells(path: str | os.PathLike[str]) -> DataFrame:
    """Read the table of `write_cells`; raises InputError if it is none, or its fractions contradict its labels."""
    try:
        content = pq.read_table(path)
        classes = json.loads(content.schema.metadata[b"celldetr"])["classes"]
        table: DataFrame = content.replace_schema_metadata().to_pandas()
        expected = np.where(table["reason"] == REASONS[0], best(table[list(FRACTIONS)]), -1)
        agree = classes == list(ST_TYPES) and np.array_equal(table["label"], expected)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); annotate the sample again") from error
    if not agree:
        raise InputError(f"{path}: got labels that its fractions or its classes contradict; annotate the sample again")
    return table
