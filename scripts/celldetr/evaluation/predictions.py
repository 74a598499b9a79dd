"""The predictions of a test fold as one Parquet file.

One row per detection whose nucleus score reached the inference threshold. Columns: ``patch`` int32 (index in the store
of the test fold), ``query`` int16, ``x0 y0 x1 y1`` float32 (px, half-open), ``nucleus_score`` float32,
``score_{class}`` float32 per class, ``label`` int8 (index of the largest class score), ``embedding``, a fixed-size
list of float32, if embeddings were asked for, and ``mask``, the bits of the nucleus in its box, if the model segments
nuclei (`celldetr.evaluation.masks`). The schema metadata holds a JSON object under the key ``celldetr`` with at least
``classes``, ``n_patches``, ``nucleus_threshold``, ``store_digest`` and the ``mode`` of the model. A patch without
detections has no rows.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celldetr.evaluation.counting import SEGMENTATION
from celldetr.evaluation.masks import Masks, centroids, pack, paint, unpack
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic
from celldetr.store import NO_LABEL, PatchStore

METADATA_KEY = b"celldetr"
_MOST_EXPANSION = 100  # of scores and coordinates, which hardly compress: a small file cannot take all memory
_BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_ROWS = 16_384  # of a row group: 16 MB of embeddings


@dataclass(frozen=True)
class Predictions:
    """D detections of a fold, ordered by patch, then query."""

    patch: NDArray[np.integer]  # index in the store (D,)
    query: NDArray[np.integer]  # that made the detection (D,), below 32,768
    boxes: NDArray[np.floating]  # (D, 4) xyxy px, half-open
    nucleus_score: NDArray[np.floating]  # sigmoid score that the box holds a nucleus (D,)
    class_scores: NDArray[np.floating]  # sigmoid scores (D, K)
    classes: tuple[str, ...]  # in the order of `class_scores`
    n_patches: int  # that were predicted, with or without detections
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the file: experiment, split, ...
    embeddings: NDArray[np.floating] | None = None  # (D, C); only written, as scoring needs none
    masks: Masks | None = None  # of the nuclei in their boxes (D), which are of whole px then

    def __len__(self) -> int:
        return len(self.patch)

    @property
    def labels(self) -> NDArray[np.int8]:
        """Index of the largest class score (D,), the first of equals."""
        return self.class_scores.argmax(axis=1).astype(np.int8)

    @property
    def ptr(self) -> NDArray[np.int64]:
        """Detections of patch i are ``ptr[i]:ptr[i + 1]`` (n_patches + 1,)."""
        return np.searchsorted(self.patch, np.arange(self.n_patches + 1)).astype(np.int64)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Box centres (D, 2), x then y, px."""
        boxes = self.boxes.astype(np.float64)
        return (boxes[:, :2] + boxes[:, 2:]) / 2

    @property
    def mask_centres(self) -> NDArray[np.float64]:
        """Centroids of the masks (D, 2), x then y, px; box centres without masks."""
        return self.centres if self.masks is None else centroids(self.masks, self.boxes)

    def instances(self, patch: int, size: int) -> NDArray[np.int32]:
        """Paint the masks of a patch of side S = `size` to an instance map (S, S), see `celldetr.evaluation.masks`.

        The detections ``ptr[patch]:ptr[patch + 1]`` count from 1; the nucleus score decides who gets a pixel.
        """
        assert self.masks is not None
        own = slice(*np.searchsorted(self.patch, [patch, patch + 1]))
        return paint(self.masks[own], self.boxes[own], self.nucleus_score[own], size)

    def known_labels(self, store: PatchStore) -> NDArray[np.int8]:
        """Labels (M,) of the true nuclei of a store; -1 for a class that the model does not have (paper, 4.4)."""
        absent = [index for index, name in enumerate(store.classes) if name in self.metadata.get("absent", [])]
        return np.where(np.isin(store.labels, absent), NO_LABEL, store.labels).astype(np.int8)

    def select(self, keep: NDArray[np.bool_] | NDArray[np.integer]) -> "Predictions":
        """Return the detections where `keep` (D,) is true, or those at the indices `keep`."""
        names: tuple[str, ...] = ("patch", "query", "boxes", "nucleus_score", "class_scores")
        if self.embeddings is not None:
            names = (*names, "embeddings")
        arrays: dict[str, Any] = {name: getattr(self, name)[keep] for name in names}
        if self.masks is not None:
            arrays["masks"] = [self.masks[index] for index in np.arange(len(self))[keep]]
        return replace(self, **arrays)

    def check_store(self, store: PatchStore) -> None:
        """Check that the detections are of this store.

        Raises
        ------
        InputError
            They were made on another store, or on this one before its content changed.
        """
        if (got := self.metadata.get("store_digest")) != store.digest:
            raise InputError(
                f"predictions: got those of store {self.metadata.get('test_store')} with digest {got}, expected "
                f"{store.path} with {store.digest}; predict this split again"
            )


def write_predictions(path: str | os.PathLike[str], parts: Iterable[Predictions]) -> int:
    """Write the detections of a fold, which come in parts (at least one), and return their number.

    Parts are of one model and fold. Memory holds a part and a row group.
    """
    detections, waiting, rows = 0, [], 0
    with atomic(path) as temporary, ExitStack() as stack:
        writer = None
        for part in parts:
            table = _table(part)
            if writer is None:
                packed = [name for name in table.column_names if name != "embedding"]
                writer = pq.ParquetWriter(
                    temporary,
                    table.schema,
                    compression={name: "zstd" for name in packed},
                    use_dictionary=[name for name in packed if name != "mask"],
                    write_page_checksum=True,
                )
                stack.enter_context(writer)
            waiting.append(table)
            detections += len(part)
            rows += len(part)
            if rows >= _ROWS:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting, rows = [], 0
        assert writer is not None
        writer.write_table(pa.concat_tables([*waiting, table.slice(0, 0)]).combine_chunks())
    return detections


def _table(predictions: Predictions) -> pa.Table:
    columns: dict[str, Any] = {"patch": predictions.patch.astype(np.int32), "query": predictions.query.astype(np.int16)}
    values = {name: predictions.boxes[:, index] for index, name in enumerate(_BOX_COLUMNS)}
    values["nucleus_score"] = predictions.nucleus_score
    values |= {f"score_{name}": predictions.class_scores[:, index] for index, name in enumerate(predictions.classes)}
    columns |= {name: value.astype(np.float32) for name, value in values.items()}
    columns["label"] = predictions.labels
    fields = [pa.field(name, pa.from_numpy_dtype(values.dtype), nullable=False) for name, values in columns.items()]
    if predictions.embeddings is not None:
        flat = pa.array(predictions.embeddings.astype(np.float32).reshape(-1))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, predictions.embeddings.shape[1])
        fields.append(pa.field("embedding", columns["embedding"].type, nullable=False))
    if predictions.masks is not None:
        columns["mask"] = pa.array(pack(predictions.masks, predictions.boxes), pa.large_binary())
        fields.append(pa.field("mask", columns["mask"].type, nullable=False))
    metadata = {**predictions.metadata, "classes": list(predictions.classes), "n_patches": predictions.n_patches}
    return pa.table(columns, pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata).encode()}))


def read_predictions(path: str | os.PathLike[str], *, patch_size: int | None = None) -> Predictions:
    """Read a predictions file, without the embeddings.

    Parameters
    ----------
    patch_size
        Side of the patches, px: read the masks, too, if the model segments nuclei.

    Raises
    ------
    InputError
        Not a predictions file, or damaged; or masks that do not fit their boxes.
    """
    try:
        file = pq.read_metadata(path)
        if 4 * file.num_rows * file.num_columns > _MOST_EXPANSION * os.path.getsize(path):
            raise ValueError(f"{file.num_rows} detections, more than a file of this size holds")
        left = {"embedding", "mask"} if patch_size is None else {"embedding"}
        names = [name for name in pq.read_schema(path).names if name not in left]
        table = pq.read_table(path, columns=names, page_checksum_verification=True)
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
        column = {name: table.column(name).to_numpy() for name in names}
        boxes = np.stack([column[name] for name in _BOX_COLUMNS], axis=1)
        masks = None
        if patch_size is not None and metadata["mode"] == SEGMENTATION:
            masks = unpack(column["mask"], boxes, patch_size)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: got {error!r}, expected a Parquet file of the predict rule; predict this split again"
        ) from error
    found = Predictions(
        patch=column["patch"],
        query=column["query"],
        boxes=boxes,
        nucleus_score=column["nucleus_score"],
        class_scores=np.stack([column[f"score_{name}"] for name in metadata["classes"]], axis=1),
        classes=tuple(metadata["classes"]),
        n_patches=metadata["n_patches"],
        metadata=metadata,
        masks=masks,
    )
    return found.select(np.lexsort((found.query, found.patch)))
