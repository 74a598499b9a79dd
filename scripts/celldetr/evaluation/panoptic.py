"""Panoptic quality of segmented nuclei, as PanNuke defines it (Kirillov et al. 2019; Gamper et al. 2020).

In an image, a true and a predicted nucleus are a pair if the intersection over union u of their masks is above 0.5. A
nucleus can be in one pair only, as the masks of a map do not overlap (Kirillov et al. 2019, section 4.1). With T true
nuclei, P predicted ones and TP pairs, and so FP = P - TP and FN = T - TP,

    DQ = TP / (TP + FP / 2 + FN / 2) = 2 TP / (T + P)    SQ = (sum of u over the pairs) / TP    PQ = DQ x SQ

with SQ = 0 without pairs: the detection, segmentation and panoptic quality. Rows of an image:

- "Detection", the binary PQ (bPQ): all nuclei, whatever their class;
- each class: the true and the predicted nuclei of this class;
- "mPQ": the mean of the classes that are defined in this image.

A row without true nuclei in an image is undefined there and left out, whatever was predicted (as in the code of Gamper
et al.: a false nucleus of a class that the image does not have costs nothing). Means over the images: a tissue is the
mean over its images; over all tissues, Detection and mPQ are the mean of the tissues, and a class is the mean over all
images. P is counted in the map of the image: a pixel that several masks claim belongs to the most certain one, and a
mask without a pixel left is no nucleus. Unlabelled nuclei are true for Detection only; a prediction that is paired with
one counts neither for nor against its class, as for the other scores.
"""

import os
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.evaluation.metrics import row_names
from celldetr.evaluation.predictions import Predictions
from celldetr.runtime.files import write_tsv
from celldetr.store import PatchStore

QUALITIES = ("pq", "dq", "sq")
PANOPTIC = (*QUALITIES, "mpq")
"""Columns of a file of scores: `QUALITIES` of its row over all tissues, and mPQ in the row of Detection."""
ALL_TISSUES, MULTI_CLASS = "All", "mPQ"
_COLUMNS = ("tissue", "class", *QUALITIES, "images")
_AT_ONCE = 256  # patches, a shard of the store


def panoptic_quality(predictions: Predictions, store: PatchStore) -> pd.DataFrame:
    """Compute the panoptic quality of the predictions of a test fold, all of which count.

    Returns
    -------
    DataFrame
        A row per tissue ("All" first) and class ("Detection", each class, "mPQ"): ``tissue``, ``class``, `QUALITIES`
        (NaN if no image defines them), ``images`` (that do). No rows if the predictions or the store have no masks.

    Raises
    ------
    InputError
        The predictions were made on another store.
    """
    predictions.check_store(store)
    if predictions.masks is None or not store.has_instances:
        return pd.DataFrame(columns=list(_COLUMNS))
    by_image = _qualities_of_images(predictions, store)
    tissues = store.patches["tissue"].to_numpy(dtype=object)
    of_tissue = {str(name): by_image[tissues == name] for name in sorted(set(tissues))}
    means = {name: _mean(values) for name, values in of_tissue.items()}
    overall = _mean(by_image)
    if means:
        overall[[0, -1]] = _mean(np.stack(list(means.values())))[[0, -1]]
    names = [*row_names(store.classes), MULTI_CLASS]
    frames = []
    for name, values in {ALL_TISSUES: by_image, **of_tissue}.items():
        columns: dict[str, Any] = {"tissue": name, "class": names}
        columns |= dict(zip(QUALITIES, (means | {ALL_TISSUES: overall})[name].T, strict=True))
        frames.append(pd.DataFrame(columns | {"images": (~np.isnan(values[..., 0])).sum(axis=0)}))
    return pd.concat(frames, ignore_index=True)


def _qualities_of_images(predictions: Predictions, store: PatchStore) -> NDArray[np.float64]:
    """Compute `QUALITIES` (N, 2 + K, 3) of each image: Detection, the K classes, mPQ."""
    n_classes, size = len(store.classes), store.patch_size
    truth, predicted, nuclei = predictions.known_labels(store), predictions.labels, predictions.ptr
    values = np.empty((store.n_patches, 2 + n_classes, len(QUALITIES)))
    for start in range(0, store.n_patches, _AT_ONCE):
        patches = np.arange(start, min(start + _AT_ONCE, store.n_patches))
        for patch, instances in zip(patches.tolist(), store.instances(patches), strict=True):
            values[patch, :-1] = image_quality(
                instances,
                truth[store.box_ptr[patch] : store.box_ptr[patch + 1]],
                predictions.instances(patch, size),
                predicted[nuclei[patch] : nuclei[patch + 1]],
                n_classes,
            )
    values[:, -1] = _mean(values[:, 1:-1].swapaxes(0, 1))
    return values


def image_quality(
    truth: NDArray[np.integer],
    true_labels: NDArray[np.integer],
    predicted: NDArray[np.integer],
    predicted_labels: NDArray[np.integer],
    n_classes: int,
) -> NDArray[np.float64]:
    """Compute `QUALITIES` of one image (1 + n_classes, 3): all nuclei, and those of each class; NaN without truth.

    Parameters
    ----------
    truth, predicted
        Instance maps (S, S): 0 background, k the nucleus of label k - 1.
    true_labels, predicted_labels
        Classes (T,) and (P,); -1: a true nucleus without a label.
    """
    shape = len(true_labels) + 1, len(predicted_labels) + 1
    pixel_pairs = truth.astype(np.int64) * shape[1] + predicted
    overlap = np.bincount(pixel_pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    true_area, predicted_area = overlap.sum(axis=1)[1:], overlap.sum(axis=0)[1:]
    overlap = overlap[1:, 1:]
    union = true_area[:, None] + predicted_area - overlap
    left, right = np.nonzero(2 * overlap > union)  # u > 0.5 without rounding
    iou = overlap[left, right] / union[left, right]
    equal, unlabelled = true_labels[left] == predicted_labels[right], true_labels[left] < 0
    rows = 1 + n_classes
    n_true = _per_row(true_labels[true_area > 0], rows)
    n_predicted = _per_row(predicted_labels[predicted_area > 0], rows)
    n_predicted[1:] -= _per_row(predicted_labels[right[unlabelled]], rows)[1:]
    pairs = _per_row(true_labels[left[equal]], rows)
    total = _per_row(true_labels[left[equal]], rows, iou[equal])
    pairs[0], total[0] = len(iou), iou.sum()
    dq = np.divide(2 * pairs, n_true + n_predicted, out=np.full(rows, np.nan), where=n_true > 0)
    sq = np.divide(total, pairs, out=np.zeros(rows), where=pairs > 0)
    return np.stack([dq * sq, dq, np.where(n_true > 0, sq, np.nan)], axis=1)


def _per_row(
    labels: NDArray[np.integer], rows: int, weights: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Count, or sum the weights of, nuclei (n,): all of them, then those of each class."""
    found = np.bincount(labels.astype(np.int64) + 1, weights, minlength=rows).astype(np.float64)
    found[0] = found.sum()
    return found


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is defined; NaN if nothing is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def write_panoptic(path: str | os.PathLike[str], table: pd.DataFrame, *, experiment: str, split: int) -> None:
    """Write the rows of `panoptic_quality` as TSV, the header alone without rows; undefined values are NA."""
    origin: dict[str, Any] = {"experiment": experiment, "split": split}
    write_tsv(path, table.assign(**origin)[[*origin, *_COLUMNS]], float_format="%.6g")
