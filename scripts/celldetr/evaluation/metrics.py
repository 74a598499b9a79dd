"""Detection and class scores as HoVer-Net defines them for PanNuke (paper, 4.2).

Counts are kept per image: the score of a fold, or of a bootstrap resample of its images, needs only their sums. A row
is "Detection" (index 0) or a class (index 1 + label). With the counts of a row

    P = TP / (TP + 2 FP + FPd)    R = TP / (TP + 2 FN + FNd)    F = 2 TP / (2 TP + 2 FP + 2 FN + FPd + FNd)

where FP and FN count pairs whose partner has another class, FPd and FNd nuclei without a partner. Detection has no FP
and FN, so the formulas give its usual P, R and F. F is the harmonic mean of P and R.

P, R and F are undefined (NaN, printed NA) in a row without true nuclei, whatever was predicted. They are 0 in a row
with true nuclei and no predictions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from celldetr.evaluation.matching import NucleusCentres, Pairs

METRICS = ("strict", "hovernet_compat")
COUNTS = (
    "n_truth",  # true nuclei of the row
    "n_predicted",  # predictions of the row
    "n_paired",  # true nuclei of the row with a predicted partner
    "tp",  # pairs of equal class; for Detection: all pairs, including inserted points
    "fp_paired",  # predictions of the class paired with another class
    "fn_paired",  # truth of the class paired with another class
    "fp_unpaired",  # predictions of the class without a partner
    "fn_unpaired",  # truth of the class without a partner
    "n_ignored",  # predictions of the class paired with an unlabelled nucleus
    "n_inserted",  # background points inserted (hovernet_compat only)
)
_COLUMN = {name: index for index, name in enumerate(COUNTS)}


def row_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the row names: Detection, then the classes with a capital first letter."""
    return ("Detection", *(name[:1].upper() + name[1:] for name in classes))


def count_images(
    truth: NucleusCentres,
    predicted: NucleusCentres,
    pairs: Pairs,
    n_classes: int,
    *,
    metric: str = "strict",
    radius: float = 12.0,
) -> NDArray[np.int64]:
    """Count per image what the scores need.

    Unlabelled nuclei (-1) count for Detection. For the classes they are not truth, and a prediction paired with one
    counts neither for nor against its class (`n_ignored`).

    Parameters
    ----------
    truth, predicted
        Nuclei of the fold; every prediction has a label.
    pairs
        Result of `pair_nuclei` with the same radius.
    n_classes
        Number of classes K.
    metric
        ``strict`` inserts nothing. ``hovernet_compat`` gives each image that lacks truth or predictions one background
        point at (0, 0) on the empty side, as HoVer-Net and CellViT do. The point has no class. It can pair for
        Detection, and then the class error of its partner is counted as paired, not as unpaired.
    radius
        Largest distance of a pair, px.

    Returns
    -------
    NDArray
        Counts (N, 1 + K, len(COUNTS)).
    """
    assert metric in METRICS
    assert max(truth.labels.max(initial=-1), predicted.labels.max(initial=-1)) < n_classes
    tally = _Tally(truth.n_images, n_classes)
    truth_image, predicted_image = truth.image, predicted.image
    true_label, predicted_label = truth.labels.astype(np.int64), predicted.labels.astype(np.int64)
    missed = np.ones(len(true_label), dtype=bool)
    missed[pairs.truth] = False
    spurious = np.ones(len(predicted_label), dtype=bool)
    spurious[pairs.predicted] = False

    tally.both("n_truth", truth_image, true_label)
    tally.both("n_predicted", predicted_image, predicted_label)
    tally.both("fn_unpaired", truth_image[missed], true_label[missed])
    tally.both("fp_unpaired", predicted_image[spurious], predicted_label[spurious])
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
    """Counts (N, 1 + K, len(COUNTS)), filled field by field."""

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


def _insert_background(tally: _Tally, truth: NucleusCentres, predicted: NucleusCentres, radius: float) -> None:
    """Add one background point at (0, 0) to the empty side of each image that lacks truth or predictions."""
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


def _nearest_to_origin(nuclei: NucleusCentres, image: int) -> int:
    start, stop = nuclei.ptr[image], nuclei.ptr[image + 1]
    return int(start + np.hypot(*nuclei.centres[start:stop].T).argmin())


def scores(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Compute precision, recall and F of summed counts (formulas at the top of this module).

    Parameters
    ----------
    counts
        Sums over images (..., len(COUNTS)).

    Returns
    -------
    NDArray
        P, R, F (..., 3); NaN without true nuclei, 0 with true nuclei and no predictions.
    """
    values = {name: np.asarray(counts[..., index], dtype=np.float64) for name, index in _COLUMN.items()}
    tp = values["tp"]
    over = 2 * values["fp_paired"] + values["fp_unpaired"]
    under = 2 * values["fn_paired"] + values["fn_unpaired"]
    top = np.stack([tp, tp, 2 * tp], axis=-1)
    bottom = np.stack([tp + over, tp + under, 2 * tp + over + under], axis=-1)
    result = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return np.where(values["n_truth"][..., None] > 0, result, np.nan)
