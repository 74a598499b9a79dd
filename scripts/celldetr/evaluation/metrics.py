"""Detection and class scores of PanNuke in the manner of HoVer-Net (paper, 4.2).

Everything is counted per image, so that a fold, a resample of its images, or an average needs only sums of
counts. A row is "Detection" (index 0) or a class (index 1 + label). With the counts of a row

    P = TP / (TP + 2 FP + FPd)    R = TP / (TP + 2 FN + FNd)    F = 2 TP / (2 TP + 2 FP + 2 FN + FPd + FNd)

where FP and FN are pairs whose other side has another class, FPd and FNd nuclei without a partner. Detection
has no FP and FN, so the same formulas are its usual P, R and F. F is the harmonic mean of P and R.

Undefined values: a row without truth has no P, R and F (NaN, printed NA): whatever was predicted, the fold
cannot tell how well the class is found. A row with truth of which nothing was predicted has P = R = F = 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from celldetr.evaluation.matching import Nuclei, Pairs

METRICS = ("strict", "hovernet_compat")
COUNTS = (
    "n_truth",  # true nuclei of the row
    "n_predicted",  # kept predictions of the row
    "n_paired",  # true nuclei of the row with a predicted partner
    "tp",  # pairs of equal class; for Detection: pairs, with those of inserted points
    "fp_paired",  # predictions of the class paired with another class
    "fn_paired",  # truth of the class paired with another class
    "fp_unpaired",  # predictions of the class without a partner
    "fn_unpaired",  # truth of the class without a partner
    "n_ignored",  # predictions of the class paired with a nucleus without a label
    "n_inserted",  # background points inserted (hovernet_compat only)
)
_COLUMN = {name: index for index, name in enumerate(COUNTS)}


def row_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the rows: Detection, then the classes with a capital first letter."""
    return ("Detection", *(name[:1].upper() + name[1:] for name in classes))


def count_images(
    truth: Nuclei,
    predicted: Nuclei,
    pairs: Pairs,
    n_classes: int,
    *,
    metric: str = "strict",
    radius: float = 12.0,
) -> NDArray[np.int64]:
    """Count per image what the scores need.

    Nuclei without a label (-1) count for Detection; for classes they are neither truth nor does a prediction
    paired with one count for or against its class (`n_ignored`).

    Parameters
    ----------
    truth, predicted
        Nuclei of the fold; predictions have a label each.
    pairs
        Result of `pair_nuclei` with the same radius.
    n_classes
        Number of classes K.
    metric
        ``strict`` inserts nothing. ``hovernet_compat`` gives each image that lacks truth or predictions one
        background point at (0, 0) on the empty side, as HoVer-Net and CellViT do. The point has no class: it
        can become or take a Detection pair, and turns the class error of its partner from unpaired to paired.
    radius
        Largest distance of a pair, px.

    Returns
    -------
    NDArray
        Counts (N, 1 + K, len(COUNTS)).

    Raises
    ------
    ValueError
        Unknown metric, or a label out of range.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    for name, nuclei, lowest in (("truth", truth, -1), ("predicted", predicted, 0)):
        if len(nuclei.labels) and (nuclei.labels.min() < lowest or nuclei.labels.max() >= n_classes):
            got = f"{nuclei.labels.min()} to {nuclei.labels.max()}"
            raise ValueError(f"{name} labels: got {got}, expected {lowest} to {n_classes - 1}")
    tally = _Tally(truth.n_images, n_classes)
    truth_image, predicted_image = truth.image, predicted.image
    true_label, predicted_label = truth.labels.astype(np.int64), predicted.labels.astype(np.int64)
    alone = np.ones(len(true_label), dtype=bool)
    alone[pairs.truth] = False
    spare = np.ones(len(predicted_label), dtype=bool)
    spare[pairs.predicted] = False

    tally.both("n_truth", truth_image, true_label)
    tally.both("n_predicted", predicted_image, predicted_label)
    tally.both("fn_unpaired", truth_image[alone], true_label[alone])
    tally.both("fp_unpaired", predicted_image[spare], predicted_label[spare])
    image = truth_image[pairs.truth]
    left, right = true_label[pairs.truth], predicted_label[pairs.predicted]
    equal, labelled = left == right, left >= 0
    tally.both("n_paired", image, left)
    tally.detection("tp", image)
    tally.by_class("tp", image[equal], left[equal])
    tally.by_class("fn_paired", image[~equal], left[~equal])
    tally.by_class("fp_paired", image[~equal & labelled], right[~equal & labelled])
    tally.by_class("n_ignored", image[~labelled], right[~labelled])
    if metric == "hovernet_compat":
        _insert_background(tally, truth, predicted, radius)
    return tally.counts


class _Tally:
    """Counts (N, 1 + K, len(COUNTS)) that are filled by field."""

    def __init__(self, n_images: int, n_classes: int) -> None:
        self.counts = np.zeros((n_images, 1 + n_classes, len(COUNTS)), dtype=np.int64)

    def detection(self, field: str, image: NDArray[np.int64], amount: int = 1) -> None:
        self.counts[:, 0, _COLUMN[field]] += amount * np.bincount(image, minlength=len(self.counts))

    def by_class(self, field: str, image: NDArray[np.int64], label: NDArray[np.int64], amount: int = 1) -> None:
        n_images, n_rows = self.counts.shape[:2]
        known = label >= 0
        cell = image[known] * (n_rows - 1) + label[known]
        found = np.bincount(cell, minlength=n_images * (n_rows - 1)).reshape(n_images, n_rows - 1)
        self.counts[:, 1:, _COLUMN[field]] += amount * found

    def both(self, field: str, image: NDArray[np.int64], label: NDArray[np.int64], amount: int = 1) -> None:
        self.detection(field, image, amount)
        self.by_class(field, image, label, amount)


def _insert_background(tally: _Tally, truth: Nuclei, predicted: Nuclei, radius: float) -> None:
    no_truth, no_predicted = np.diff(truth.ptr) == 0, np.diff(predicted.ptr) == 0
    empty = np.flatnonzero(no_truth & no_predicted)
    tally.detection("tp", empty)
    tally.detection("n_inserted", empty, 2)
    sides = (
        (predicted, no_truth & ~no_predicted, "fp_unpaired", "fp_paired", "fn_unpaired"),
        (truth, no_predicted & ~no_truth, "fn_unpaired", "fn_paired", "fp_unpaired"),
    )
    for nuclei, lone, unpaired, paired, background in sides:
        images = np.flatnonzero(lone)
        nearest = np.array([_nearest_to_origin(nuclei, int(image)) for image in images], dtype=np.int64)
        near = np.hypot(*nuclei.centres[nearest].T) <= radius
        label = nuclei.labels[nearest[near]].astype(np.int64)
        tally.detection("n_inserted", images)
        tally.detection(background, images[~near])
        tally.detection("tp", images[near])
        tally.both(unpaired, images[near], label, -1)
        tally.by_class(paired, images[near], label)


def _nearest_to_origin(nuclei: Nuclei, image: int) -> int:
    start, stop = nuclei.ptr[image], nuclei.ptr[image + 1]
    return int(start + np.hypot(*nuclei.centres[start:stop].T).argmin())


def scores(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Precision, recall and F of summed counts (formulas at the top of this module).

    Parameters
    ----------
    counts
        Sums over images (..., len(COUNTS)).

    Returns
    -------
    NDArray
        P, R, F (..., 3); NaN where there is no truth, 0 where there is truth and nothing was predicted.
    """
    values = {name: np.asarray(counts[..., index], dtype=np.float64) for name, index in _COLUMN.items()}
    tp = values["tp"]
    over = 2 * values["fp_paired"] + values["fp_unpaired"]
    under = 2 * values["fn_paired"] + values["fn_unpaired"]
    top = np.stack([tp, tp, 2 * tp], axis=-1)
    bottom = np.stack([tp + over, tp + under, 2 * tp + over + under], axis=-1)
    result = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return np.where(values["n_truth"][..., None] > 0, result, np.nan)
