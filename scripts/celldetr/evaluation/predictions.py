"""The predictions of a test fold as one Parquet file: writer, reader, and the rule for which detections count.

One row per detection whose nucleus score reached the inference threshold. Columns: ``patch`` int32 (index in the store
of the test fold), ``query`` int16, ``x0 y0 x1 y1`` float32 (px, half-open), ``nucleus_score`` float32,
``score_{class}`` float32 per class, ``label`` int8 (index of the largest class score). The schema metadata holds a JSON
object under the key ``celldetr`` with at least ``classes``, ``n_patches`` and ``nucleus_threshold``. A patch without
detections has no rows.
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
from numpy.typing import NDArray

from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import atomic

METADATA_KEY = b"celldetr"
_BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_ROWS = 10_000  # detections per row group, about; each group costs time to write and to read


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
        All metadata of the file (experiment, split, ...).
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
        """Box centres (D, 2), x then y, px."""
        boxes = self.boxes.astype(np.float64)
        return (boxes[:, :2] + boxes[:, 2:]) / 2

    def select(self, keep: NDArray[np.bool_] | NDArray[np.integer]) -> "Predictions":
        """Return the detections where `keep` (D,) is true, or those at the indices `keep`."""
        names = ("patch", "query", "boxes", "nucleus_score", "class_scores", "labels")
        arrays: dict[str, Any] = {name: getattr(self, name)[keep] for name in names}
        return replace(self, **arrays)

    def check_store(self, classes: tuple[str, ...], n_patches: int) -> None:
        """Check that the detections are of a store with these classes and this number of patches.

        Raises
        ------
        InputError
            They were made on another store.
        """
        if (self.classes, self.n_patches) != (tuple(classes), n_patches):
            raise InputError(
                f"predictions: got {self.n_patches} patches with classes {list(self.classes)}, expected those of the "
                f"test store: {n_patches} patches with classes {list(classes)}; predict this split again"
            )


@dataclass(frozen=True)
class ScoreRule:
    """Which detections count, by nucleus score and largest class score.

    ``both_thresholds``: nucleus score >= `nucleus_threshold` and class score >= `class_threshold`.
    ``class``: class score >= `class_threshold`.
    ``product``: nucleus score times class score >= `class_threshold`.
    Detections below the inference threshold are not in the file and never count.
    """

    rule: str = "both_thresholds"
    nucleus_threshold: float = 0.4
    class_threshold: float = 0.4

    def keep(self, predictions: Predictions) -> Predictions:
        """Return the detections that count.

        Raises
        ------
        ConfigError
            The nucleus threshold is lower than the inference threshold of the file.
        """
        nucleus, best = predictions.nucleus_score, predictions.class_scores.max(axis=1, initial=0)
        if self.rule == "class":
            return predictions.select(best >= self.class_threshold)
        if self.rule == "product":
            return predictions.select(nucleus * best >= self.class_threshold)
        assert self.rule == "both_thresholds"
        written = predictions.metadata.get("nucleus_threshold", 0.0)
        if self.nucleus_threshold < written:
            raise ConfigError(
                f"nucleus_threshold: got {self.nucleus_threshold}, but the predictions hold only detections with a "
                f"nucleus score of at least {written}; lower inference.nucleus_threshold and predict again"
            )
        return predictions.select((nucleus >= self.nucleus_threshold) & (best >= self.class_threshold))


class PredictionsWriter:
    """Write predictions batch by batch; the file appears when the ``with`` block ends without an error.

    Parameters
    ----------
    path
        Parquet file to write.
    classes
        Class names in the order of the class scores.
    n_patches
        Patches of the test fold's store.
    nucleus_threshold
        Lower bound of the nucleus scores that are appended.
    metadata
        Further JSON values to keep in the file (experiment, split, test_store, ...).
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
        self.n_detections = 0
        own = {"classes": list(classes), "n_patches": n_patches, "nucleus_threshold": nucleus_threshold}
        self._schema = _schema(self.classes, {**(metadata or {}), **own})
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
        patch: NDArray[np.integer],
        query: NDArray[np.integer],
        boxes: NDArray[np.floating],
        nucleus_score: NDArray[np.floating],
        class_scores: NDArray[np.floating],
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
            Scores (D, K) in [0, 1]. The label is the index of the largest, the first of equals.
        """
        if not len(patch):
            return
        scores = np.asarray(class_scores, dtype=np.float32)
        columns = {"patch": patch, "query": query, "nucleus_score": np.asarray(nucleus_score, dtype=np.float32)}
        columns |= zip(_BOX_COLUMNS, np.asarray(boxes, dtype=np.float32).T, strict=True)
        columns |= zip((f"score_{name}" for name in self.classes), scores.T, strict=True)
        columns["label"] = scores.argmax(axis=1)
        arrays = [pa.array(columns[item.name], type=item.type) for item in self._schema]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self.n_detections += len(patch)
        self._rows += len(patch)
        if self._rows >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting, self._rows = [], 0


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read a predictions file.

    Raises
    ------
    InputError
        Not a predictions file, or damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: got {error!r}, expected a Parquet file of the predict rule; predict this split again"
        ) from error
    column = {name: table.column(name).to_numpy() for name in table.column_names}
    found = Predictions(
        patch=column["patch"],
        query=column["query"],
        boxes=np.stack([column[name] for name in _BOX_COLUMNS], axis=1),
        nucleus_score=column["nucleus_score"],
        class_scores=np.stack([column[f"score_{name}"] for name in metadata["classes"]], axis=1),
        labels=column["label"],
        classes=tuple(metadata["classes"]),
        n_patches=metadata["n_patches"],
        metadata=metadata,
    )
    return found.select(np.lexsort((found.query, found.patch)))


def _schema(classes: tuple[str, ...], metadata: Mapping[str, Any]) -> pa.Schema:
    fields = [("patch", pa.int32()), ("query", pa.int16())]
    fields += [(name, pa.float32()) for name in (*_BOX_COLUMNS, "nucleus_score")]
    fields += [(f"score_{name}", pa.float32()) for name in classes]
    fields += [("label", pa.int8())]
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in fields],
        metadata={METADATA_KEY: json.dumps(dict(metadata)).encode()},
    )
