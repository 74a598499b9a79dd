"""Join the parts that `celldetr.cells.find` has written into the one file of a slide's cells."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celldetr.cells.parts import OUTSIDE_PART, digest_of, parts_of, read_summary
from celldetr.cells.stitching import counted, mean_scores, near_seams
from celldetr.cells.table import METADATA_KEY, ROWS, STATUSES, CellsInfo, NothingFound, cell_schema, named, writer
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic

log = logging.getLogger(__name__)

_SMALL = ["x_um", "y_um", "width_um", "height_um", "tile", "edge_um"]


def join_cells(
    folders: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    class_threshold: float = 0.0,
    timed: bool = True,
) -> CellsInfo:
    """Write the file of a slide's cells from the folders of all jobs that share it; each nucleus once.

    A cell whose class scores are all below `class_threshold` has no type. Memory holds a few thousand cells, and boxes
    of those near the borders of cores. Without `timed` the file does not say when, where and how fast they were found:
    the same cells give the same bytes.

    Raises
    ------
    InputError
        A folder is missing, incomplete or of another slide, model, setting or number of jobs; or no cell was found
        (`NothingFound`).
    """
    start = time.perf_counter()
    summaries = _in_order(folders)
    files = [file for folder, summary in summaries for file in _files(folder, summary)]
    files += [file for folder, _ in summaries if (file := folder / OUTSIDE_PART).exists()]
    info, first = _merged(summaries), summaries[0][1]
    info = replace(info, settings={**info.settings, "class_threshold": class_threshold})
    seams, rows = _Seams(), sum(pq.read_metadata(file).num_rows for file in files)
    if not info.given:
        margin_um = round(info.settings["margin_um"] / info.settings["mpp"]) * info.settings["mpp"]
        seams = _Seams.of(files, margin_um, info.classes)
    cells = rows - len(seams.gone)
    if first["given"] not in (None, cells):
        raise InputError(f"{path}: got {cells} rows of {first['given']} given cells; find the cells again")
    if not cells:
        raise NothingFound(
            f"{info.slide}: no cell was found in {info.counts['tiles']} tiles: none had a nucleus score of "
            f"{info.settings['nucleus_threshold']:g}. Lower nucleus_threshold, or see whether the model was trained on "
            "this stain and tissue and whether the slide's um per px is right"
        )
    schema = cell_schema(info, info.settings["embeddings"] or "float32")
    statuses = Counter[str]()
    known = {key: value for key, value in schema.metadata.items() if key != METADATA_KEY}  # counts come at the end
    with atomic(path) as temporary, writer(temporary, schema.with_metadata(known)) as file:
        for table in _numbered(files, seams, schema, info):
            if info.classes:
                table = _with_types(table, info.classes, class_threshold)
            statuses.update(table["status"].to_pandas().value_counts().to_dict())
            file.write_table(table, row_group_size=ROWS)
        counts = {**info.counts, "findings": rows, "findings left to another tile": len(seams.gone), "cells": cells}
        counts |= {f"cells {name}": statuses[name] for name in STATUSES[1:] if info.given}
        info = replace(info, counts=counts, seconds={**info.seconds, "join": time.perf_counter() - start})
        if not timed:
            info = replace(info, seconds={}, provenance={})
        file.add_key_value_metadata({METADATA_KEY: info.to_json()})
    log.info("%s: %d cells, %d findings at borders of tiles left to another tile", info.slide, cells, len(seams.gone))
    return info


def _in_order(folders: Sequence[str | os.PathLike[str]]) -> list[tuple[Path, dict[str, Any]]]:
    """Folders with their summaries in the order of the jobs, which must be all jobs of one slide."""
    found = sorted(((Path(folder), read_summary(folder)) for folder in folders), key=lambda item: item[1]["range"])
    jobs = [summary["identity"]["job"] for _, summary in found]
    if not found or sorted(jobs) != [[number, jobs[0][1]] for number in range(1, jobs[0][1] + 1)]:
        raise InputError(
            f"{', '.join(map(str, folders))}: got jobs {', '.join(f'{i} of {n}' for i, n in jobs) or 'none'}, expected "
            "each job of one slide once; find the cells again"
        )
    (folder, first), *others = found
    for other, summary in others:
        same = {**summary["identity"], "job": None}
        differing = [key for key, value in {**first["identity"], "job": None}.items() if same[key] != value]
        if differing:
            raise InputError(
                f"{other}: differs from {folder} in {', '.join(differing)}: they are not of one slide, model and "
                "setting; find the cells again"
            )
    return found


def _files(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Files of the parts of a job, which must cover its range of tiles."""
    start, stop = summary["range"]
    parts = list(parts_of(folder, start)) if stop > start else []
    if (reached := parts[-1].stop if parts else start) != stop:
        raise InputError(f"{folder}: got parts up to tile {reached}, expected {stop}; find the cells again")
    for part in parts:
        if part.of != digest_of(summary["identity"]):
            raise InputError(f"{part.path}: is of another slide, model, setting or job; find the cells again")
    return [part.path for part in parts]


def _merged(summaries: Sequence[tuple[Path, dict[str, Any]]]) -> CellsInfo:
    """Sum up what the jobs say."""
    infos = [CellsInfo.from_values(summary["info"]) for _, summary in summaries]
    counts, seconds = Counter[str](), Counter[str]()
    for _, summary in summaries:
        counts.update(summary["counts"])
        seconds.update(summary["seconds"])
    origins = [info.provenance for info in infos]
    return replace(
        infos[0],
        counts=dict(counts),
        seconds=dict(seconds),
        areas={**infos[0].areas, "read_mm2": sum(summary["read_mm2"] for _, summary in summaries)},
        provenance={
            **origins[0],
            "started": min(one["started"] for one in origins),
            "device": ", ".join(sorted({one["device"] for one in origins})),
        },
    )


def _batches(files: Sequence[Path], columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    for path in files:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield from file.iter_batches(batch_size=ROWS, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({error}); find the cells again") from error


@dataclass(frozen=True)
class _Seams:
    """What changes where tiles meet; rows of all files, counted from 0, rising."""

    gone: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows (n,) that do not count, as another tile has their nucleus."""
    several: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows (m,) of nuclei that several tiles have found."""
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """Their class scores (m, K)."""

    @classmethod
    def of(cls, files: Sequence[Path], margin_um: float, classes: Sequence[str]) -> Self:
        """Look at the findings near the borders of cores."""
        names = [f"score_{name}" for name in classes]
        kept, scores = [np.empty((0, len(_SMALL) + 1))], [np.empty((0, len(names)), np.float32)]
        start = 0
        for batch in _batches(files, [*_SMALL, *names]):
            values = np.stack([batch.column(name).to_numpy() for name in _SMALL], axis=1, dtype=np.float64)
            near = np.flatnonzero(near_seams(values[:, -1] - margin_um, margin_um))
            kept.append(np.column_stack([values[near], near + start]))
            scores.append(_scores(batch, names)[near])
            start += len(batch)
        values = np.concatenate(kept)
        centres, sides, tile, edge, row = values[:, :2], values[:, 2:4], values[:, 4], values[:, 5], values[:, 6]
        boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
        counts = counted(boxes, edge - margin_um, tile.astype(np.int64))
        several, means = mean_scores(counts, np.concatenate(scores), edge)
        rows = row.astype(np.int64)
        return cls(rows[counts != np.arange(len(rows))], rows[several], means)


def _scores(rows: pa.Table | pa.RecordBatch, names: Sequence[str]) -> NDArray[np.float32]:
    """Columns of scores (n, K), NaN: none."""
    columns = [rows.column(name).to_numpy(zero_copy_only=False) for name in names]
    return np.stack(columns, axis=1) if names else np.empty((len(rows), 0), np.float32)


def _with_scores(table: pa.Table, seams: _Seams, start: int, classes: Sequence[str]) -> pa.Table:
    """Put the scores of nuclei that several tiles have found into the rows from `start` on."""
    first, last = np.searchsorted(seams.several, [start, start + len(table)])
    if first == last:
        return table
    names = [f"score_{name}" for name in classes]
    scores = _scores(table, names)
    scores[seams.several[first:last] - start] = seams.scores[first:last]
    for name, column in zip(names, scores.T, strict=True):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(column))
    return table


def _with_types(table: pa.Table, classes: Sequence[str], threshold: float) -> pa.Table:
    """Fill in the class with the highest score; null below the threshold, and where there are no scores."""
    scores = _scores(table, [f"score_{name}" for name in classes])
    types = named(np.where(scores.max(axis=1) >= threshold, scores.argmax(axis=1), -1), classes)
    return table.set_column(table.schema.get_field_index("type"), table.schema.field("type"), types)


def _numbered(files: Sequence[Path], seams: _Seams, schema: pa.Schema, info: CellsInfo) -> Iterator[pa.Table]:
    """Yield the rows that remain, `ROWS` at a time, with their numbers as ids if they have none."""
    start = done = 0
    waiting: list[pa.Table] = []
    for batch in _batches(files, None):
        table = _with_scores(pa.Table.from_batches([batch]), seams, start, info.classes)
        keep = np.ones(len(batch), dtype=bool)
        first, last = np.searchsorted(seams.gone, [start, start + len(batch)])
        keep[seams.gone[first:last] - start] = False
        start += len(batch)
        if not keep.all():
            table = table.filter(pa.array(keep))
        if not info.given:
            ids = pa.array(np.arange(done + 1, done + len(table) + 1)).cast(pa.string())
            table = table.set_column(0, "cell_id", ids)
        done += len(table)
        waiting.append(table.cast(schema))
        if sum(map(len, waiting)) >= ROWS:
            table = pa.concat_tables(waiting)
            whole = len(table) // ROWS * ROWS
            yield table.slice(0, whole)
            waiting = [table.slice(whole)]
    yield pa.concat_tables([schema.empty_table(), *waiting])
