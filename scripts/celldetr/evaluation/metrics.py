"""Detection and class scores as HoVer-Net defines them for PanNuke (paper, 4.2).

Counts are kept per image: the score of a fold, or of a bootstrap resample of its images, needs only their sums. A row
is "Detection" (index 0) or a class (index 1 + label). With the counts of a row

    P = TP / (TP + 2 FP + FPd)    R = TP / (TP + 2 FN + FNd)    F = 2 TP / (2 TP + 2 FP + 2 FN + FPd + FNd)

where FP and FN count pairs whose partner has another class, FPd and FNd nuclei without a partner. Detection has no FP
and FN, so the formulas give its usual P, R and F. F is the harmonic mean of P and R.

Metric ``strict``: P, R and F are undefined (NaN, printed NA) in a row without true nuclei, whatever was predicted. They
are 0 in a row with true nuclei and no predictions. Metric ``hovernet_compat`` is the published metric to the letter: a
score is undefined only where its formula is 0/0, so that predictions of a class without truth score 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from celldetr.evaluation.matching import NucleusCentres, Pairs

METRICS = ("strict", "hovernet_compat")
VALUES = ("precision", "recall", "f1")
TRAINED = "trained"
"""Column ``weights`` of frozen features: the model of the experiment; other values name a seed of random weights."""
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
        Result of `pair_nuclei` with the same `radius`, px.
    metric
        ``strict`` inserts nothing. ``hovernet_compat`` gives each image that lacks truth or predictions one background
        point at (0, 0) on the empty side, as HoVer-Net and CellViT do. The point has no class. It can pair for
        Detection, and then the class error of its partner is counted as paired, not as unpaired.

    Returns
    -------
    NDArray
        Counts (N, 1 + n_classes, len(COUNTS)).
    """
    assert metric in METRICS
    assert max(truth.labels.max(initial=-1), predicted.labels.max(initial=-1)) < n_classes
    counts = np.zeros((truth.n_images, 1 + n_classes, len(COUNTS)), dtype=np.int64)
    missed = np.setdiff1d(np.arange(len(truth.labels)), pairs.truth)
    spurious = np.setdiff1d(np.arange(len(predicted.labels)), pairs.predicted)
    _add_both(counts, "n_truth", truth.image, truth.labels)
    _add_both(counts, "n_predicted", predicted.image, predicted.labels)
    _add_both(counts, "fn_unpaired", truth.image[missed], truth.labels[missed])
    _add_both(counts, "fp_unpaired", predicted.image[spurious], predicted.labels[spurious])
    image, left, right = truth.image[pairs.truth], truth.labels[pairs.truth], predicted.labels[pairs.predicted]
    equal, labelled = left == right, left >= 0
    _add_both(counts, "n_paired", image, left)
    _add(counts, "tp", image)
    _add(counts, "tp", image[equal], left[equal])
    _add(counts, "fn_paired", image[~equal], left[~equal])
    _add(counts, "fp_paired", image[~equal & labelled], right[~equal & labelled])
    _add(counts, "n_ignored", image[~labelled], right[~labelled])
    if metric == "hovernet_compat":
        _insert_background(counts, truth, predicted, radius)
    return counts


def _add(
    counts: NDArray[np.int64],
    field: str,
    image: NDArray[np.integer],
    label: NDArray[np.integer] | None = None,
    amount: int = 1,
) -> None:
    """Add to a field of nuclei (n,): in the row of Detection, or of their class; class -1 has no row."""
    known = np.ones(len(image), dtype=bool) if label is None else label >= 0
    rows = np.zeros(len(image), dtype=np.int64) if label is None else 1 + label[known].astype(np.int64)
    np.add.at(counts[..., COUNTS.index(field)], (image[known], rows), amount)


def _add_both(
    counts: NDArray[np.int64], field: str, image: NDArray[np.integer], label: NDArray[np.integer], amount: int = 1
) -> None:
    """Add to a field of nuclei (n,) in the row of Detection and in those of their classes."""
    _add(counts, field, image, amount=amount)
    _add(counts, field, image, label, amount)


def _insert_background(
    counts: NDArray[np.int64], truth: NucleusCentres, predicted: NucleusCentres, radius: float
) -> None:
    """Add one background point at (0, 0) to the empty side of each image that lacks truth or predictions."""
    no_truth, no_predicted = np.diff(truth.ptr) == 0, np.diff(predicted.ptr) == 0
    empty = np.flatnonzero(no_truth & no_predicted)
    _add(counts, "tp", empty)
    _add(counts, "n_inserted", empty, amount=2)
    sides = (
        (predicted, no_truth & ~no_predicted, "fp_unpaired", "fp_paired", "fn_unpaired"),
        (truth, no_predicted & ~no_truth, "fn_unpaired", "fn_paired", "fp_unpaired"),
    )
    for nuclei, lone, unpaired, paired, background in sides:
        images = np.flatnonzero(lone)
        nearest = np.array([_nearest_to_origin(nuclei, int(image)) for image in images], dtype=np.int64)
        near = np.hypot(*nuclei.centres[nearest].T) <= radius
        label = nuclei.labels[nearest[near]]
        _add(counts, "n_inserted", images)
        _add(counts, background, images[~near])
        _add(counts, "tp", images[near])
        _add_both(counts, unpaired, images[near], label, -1)
        _add(counts, paired, images[near], label)


def _nearest_to_origin(nuclei: NucleusCentres, image: int) -> int:
    start, stop = nuclei.ptr[image], nuclei.ptr[image + 1]
    return int(start + np.hypot(*nuclei.centres[start:stop].T).argmin())


def scores(counts: NDArray[np.number], metric: str = "strict") -> NDArray[np.float64]:
    """Compute `VALUES` (..., 3) of counts summed over images (..., len(COUNTS)), see the top of this module."""
    value = dict(zip(COUNTS, np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0), strict=True))
    tp = value["tp"]
    over = 2 * value["fp_paired"] + value["fp_unpaired"]
    under = 2 * value["fn_paired"] + value["fn_unpaired"]
    top = np.stack([tp, tp, 2 * tp], axis=-1)
    bottom = np.stack([tp + over, tp + under, 2 * tp + over + under], axis=-1)
    ratio = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    if metric == "hovernet_compat":
        return ratio
    return np.where(value["n_truth"][..., None] > 0, np.nan_to_num(ratio), np.nan)
