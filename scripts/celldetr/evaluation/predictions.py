"""The predictions of a test fold as one Parquet file: writer, validating reader, and which detections count.

One row per detection whose nucleus score reached the inference threshold. Columns: ``patch`` int32 (index in
the test fold's store), ``query`` int16, ``x0 y0 x1 y1`` float32 (px, half-open), ``nucleus_score`` float32,
``score_{class}`` float32 per class, ``label`` int8 (index of the largest class score). The schema metadata
carries, under the key ``celldetr``, a JSON object with at least ``classes``, ``n_patches`` and
``nucleus_threshold``. A patch without detections has no rows.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic

METADATA_KEY = b"celldetr"
SCORE_RULES = ("both_thresholds", "class", "product")
_BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_ROWS = 10_000  # detections in a row group, about; each group costs time to write and to read


@dataclass(frozen=True)
class Predictions:
    """Detections of a fold, ordered by patch, then query.

    Attributes
    ----------
    patch
        Index of the patch in the store (D,) int32.
    query
        Index of the query that made the detection (D,) int16.
    boxes
        Boxes (D, 4) float32, xyxy px, half-open.
    nucleus_score
        Sigmoid score that the box holds a nucleus (D,) float32.
    class_scores
        Sigmoid scores (D, K) float32.
    labels
        Index of the largest class score (D,) int8.
    classes
        Class names in the order of `class_scores`.
    n_patches
        Patches that were predicted, with or without detections.
    metadata
        Everything that the file says about itself (experiment, split, ...).
    """

    patch: NDArray[np.int32]
    query: NDArray[np.int16]
    boxes: NDArray[np.float32]
    nucleus_score: NDArray[np.float32]
    class_scores: NDArray[np.float32]
    labels: NDArray[np.int8]
    classes: tuple[str, ...]
    n_patches: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.patch)

    @property
    def ptr(self) -> NDArray[np.int64]:
        """Detections of patch i are ``ptr[i]:ptr[i + 1]`` (n_patches + 1,)."""
        return np.searchsorted(self.patch, np.arange(self.n_patches + 1)).astype(np.int64)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Centres of the boxes (D, 2), x then y, px."""
        boxes = self.boxes.astype(np.float64)
        return (boxes[:, :2] + boxes[:, 2:]) / 2

    def select(self, keep: NDArray[np.bool_] | NDArray[np.integer]) -> "Predictions":
        """Return the detections where `keep` (D,) is true, or those at the indices `keep`."""
        return replace(
            self,
            patch=self.patch[keep],
            query=self.query[keep],
            boxes=self.boxes[keep],
            nucleus_score=self.nucleus_score[keep],
            class_scores=self.class_scores[keep],
            labels=self.labels[keep],
        )


@dataclass(frozen=True)
class ScoreRule:
    """Which detections count: how nucleus score and class scores decide together.

    ``both_thresholds``: nucleus score >= `nucleus_threshold` and largest class score >= `class_threshold`.
    ``class``: largest class score >= `class_threshold`.
    ``product``: nucleus score times largest class score >= `class_threshold`.
    In every case only among the detections in the file, which were cut at the inference threshold.

    Raises
    ------
    ConfigError
        Unknown rule, or a threshold outside of [0, 1].
    """

    rule: str = "both_thresholds"
    nucleus_threshold: float = 0.4
    class_threshold: float = 0.4

    def __post_init__(self) -> None:
        if self.rule not in SCORE_RULES:
            raise ConfigError(f"evaluation.score: got {self.rule!r}, expected one of {', '.join(SCORE_RULES)}")
        for key in ("nucleus_threshold", "class_threshold"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"{key}: got {getattr(self, key)}, expected a score in [0, 1]")

    def keep(self, predictions: Predictions) -> Predictions:
        """Return the detections that count.

        Raises
        ------
        ConfigError
            The rule asks for nucleus scores below those that the file holds.
        """
        best = predictions.class_scores.max(axis=1, initial=0)
        if self.rule == "class":
            return predictions.select(best >= self.class_threshold)
        if self.rule == "product":
            return predictions.select(predictions.nucleus_score * best >= self.class_threshold)
        written = predictions.metadata.get("nucleus_threshold", 0.0)
        if self.nucleus_threshold < written:
            raise ConfigError(
                f"nucleus_threshold: got {self.nucleus_threshold}, but the predictions hold only detections "
                f"with a nucleus score of at least {written}; lower inference.nucleus_threshold, predict again"
            )
        keep = (predictions.nucleus_score >= self.nucleus_threshold) & (best >= self.class_threshold)
        return predictions.select(keep)


def schema(classes: tuple[str, ...], metadata: Mapping[str, Any]) -> pa.Schema:
    """Parquet schema of a predictions file."""
    fields = [("patch", pa.int32()), ("query", pa.int16())]
    fields += [(name, pa.float32()) for name in (*_BOX_COLUMNS, "nucleus_score")]
    fields += [(f"score_{name}", pa.float32()) for name in classes]
    fields += [("label", pa.int8())]
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in fields],
        metadata={METADATA_KEY: json.dumps(dict(metadata)).encode()},
    )


class PredictionsWriter:
    """Write predictions batch by batch; the file gets its name when the ``with`` block ends without an error.

    Parameters
    ----------
    path
        Parquet file to write.
    classes
        Class names in the order of the class scores.
    n_patches
        Patches of the test fold's store.
    nucleus_threshold
        Nucleus score that every appended detection reaches.
    metadata
        More JSON values to keep in the file (experiment, split, test_fold, ...).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        classes: tuple[str, ...],
        n_patches: int,
        nucleus_threshold: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.classes = tuple(classes)
        self.n_patches = int(n_patches)
        self.n_detections = 0
        own = {
            "classes": list(classes),
            "n_patches": self.n_patches,
            "nucleus_threshold": float(nucleus_threshold),
        }
        self._schema = schema(self.classes, {**(metadata or {}), **own})
        self._stack = contextlib.ExitStack()
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def __enter__(self) -> Self:
        temporary = self._stack.enter_context(atomic(self.path))
        self._writer = self._stack.enter_context(
            pq.ParquetWriter(temporary, self._schema, compression="zstd", write_page_checksum=True)
        )
        self._stack.push(lambda kind, error, trace: None if error else self._flush())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def append(
        self,
        patch: ArrayLike,
        query: ArrayLike,
        boxes: ArrayLike,
        nucleus_score: ArrayLike,
        class_scores: ArrayLike,
    ) -> None:
        """Append detections; D = 0 is legal.

        Parameters
        ----------
        patch
            Indices in the store (D,).
        query
            Query indices (D,), below 32,768.
        boxes
            Boxes (D, 4), xyxy px, half-open.
        nucleus_score
            Scores (D,) in [0, 1].
        class_scores
            Scores (D, K) in [0, 1]. The label is the index of the largest, the first among equals.

        Raises
        ------
        ValueError
            Arrays of other shapes, or indices out of range.
        """
        count = len(np.asarray(patch))
        if count == 0:
            return
        columns: dict[str, NDArray[Any]] = {
            "patch": _index(patch, count, self.n_patches, "patch"),
            "query": _index(query, count, np.iinfo(np.int16).max + 1, "query"),
        }
        columns |= zip(_BOX_COLUMNS, _float(boxes, (count, 4), "boxes").T, strict=True)
        columns["nucleus_score"] = _float(nucleus_score, (count,), "nucleus_score")
        scores = _float(class_scores, (count, len(self.classes)), "class_scores")
        columns |= zip((f"score_{name}" for name in self.classes), scores.T, strict=True)
        columns["label"] = scores.argmax(axis=1)
        arrays = [pa.array(columns[field.name], type=field.type) for field in self._schema]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self.n_detections += count
        self._rows += count
        if self._rows >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting, self._rows = [], 0


def _index(values: ArrayLike, count: int, stop: int, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: got {array.dtype} {array.shape}, expected integers ({count},)")
    if array.min() < 0 or array.max() >= stop:
        raise ValueError(f"{name}: got {array.min()} to {array.max()}, expected 0 to {stop - 1}")
    return array.astype(np.int64)


def _float(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    return array


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read and check a predictions file.

    Raises
    ------
    InputError
        Not a predictions file, or a column holds what it must not; names file, column and row.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); predict this split again") from error
    metadata = _metadata(path, table.schema.metadata or {})
    classes = tuple(metadata["classes"])
    for want in schema(classes, {}):
        index = table.schema.get_field_index(want.name)
        got = "no such column" if index < 0 else str(table.schema.field(index).type)
        if got != str(want.type):
            raise InputError(f"{path}: column {want.name!r}: got {got}, expected {want.type}")
        if table.column(index).null_count:
            raise InputError(f"{path}: column {want.name!r}: got {table.column(index).null_count} empty values")
    column = {name: table.column(name).to_numpy() for name in table.column_names}
    scores = np.empty((len(table), len(classes)), dtype=np.float32)
    for index, name in enumerate(classes):
        scores[:, index] = column[f"score_{name}"]
    found = Predictions(
        patch=column["patch"],
        query=column["query"],
        boxes=np.stack([column[name] for name in _BOX_COLUMNS], axis=1),
        nucleus_score=column["nucleus_score"],
        class_scores=scores,
        labels=column["label"],
        classes=classes,
        n_patches=metadata["n_patches"],
        metadata=metadata,
    )
    _check(path, found)
    return found.select(np.lexsort((found.query, found.patch)))


def _metadata(path: str | os.PathLike[str], raw: Mapping[bytes, bytes]) -> dict[str, Any]:
    if METADATA_KEY not in raw:
        raise InputError(f"{path}: the schema metadata has no key 'celldetr'; expected a file of the predict rule")
    try:
        metadata = json.loads(raw[METADATA_KEY])
    except ValueError as error:
        raise InputError(f"{path}: metadata 'celldetr' is not JSON ({error}); predict this split again") from error
    kinds = {
        "classes": (list, "a list of names"),
        "n_patches": (int, "a count"),
        "nucleus_threshold": (int | float, "a number"),
    }
    for key, (kind, words) in kinds.items():
        if not isinstance(metadata, dict) or not isinstance(metadata.get(key), kind):
            got = metadata.get(key) if isinstance(metadata, dict) else metadata
            raise InputError(f"{path}: metadata 'celldetr', key {key!r}: got {got!r}, expected {words}")
    most = np.iinfo(np.int32).max  # patches are numbered in 32 bits
    if not 0 <= metadata["n_patches"] <= most:
        raise InputError(
            f"{path}: metadata 'celldetr', key 'n_patches': got a count out of range, expected 0 to {most}"
        )
    if not metadata["classes"]:
        raise InputError(f"{path}: metadata 'celldetr', key 'classes': got none, expected at least one name")
    return metadata


def _check(path: str | os.PathLike[str], found: Predictions) -> None:
    threshold = found.metadata["nucleus_threshold"]
    boxes, scores, rows = found.boxes, found.class_scores, np.arange(len(found))
    nucleus, best = found.nucleus_score, scores.max(axis=1, initial=0)
    in_range = (found.labels >= 0) & (found.labels < len(found.classes))
    label = np.where(in_range, found.labels, 0)
    order = np.lexsort((found.query, found.patch))
    same = (np.diff(found.patch[order]) == 0) & (np.diff(found.query[order]) == 0)
    repeated = np.zeros(len(found), dtype=bool)
    repeated[order[1:]] = same
    checks = {
        f"'patch' must be 0 to {found.n_patches - 1}": (found.patch >= 0) & (found.patch < found.n_patches),
        "a query of a patch must occur once": ~repeated,
        "boxes must be finite": np.isfinite(boxes).all(axis=1),
        "boxes must be x0 <= x1, y0 <= y1": (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1]),
        f"'nucleus_score' must be {threshold} to 1": (nucleus >= threshold) & (nucleus <= 1),
        "class scores must be 0 to 1": ((scores >= 0) & (scores <= 1)).all(axis=1),
        "'label' must be a class": in_range,
        "'label' must be the class of the largest score": scores[rows, label] >= best,
    }
    for rule, good in checks.items():
        bad = np.flatnonzero(~good)
        if bad.size:
            raise InputError(f"{path}: {bad.size} of {len(found)} rows break '{rule}', first row {bad[0]}")
