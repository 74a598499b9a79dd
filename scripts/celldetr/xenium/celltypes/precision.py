"""Precision of the labels, estimated for each type from cells of known type as deep and as mixed as the sample."""

import logging

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.xenium.celltypes.annotators import two_passes
from celldetr.xenium.celltypes.labels import label_cells
from celldetr.xenium.celltypes.profiles import known_part, thin, totals

log = logging.getLogger(__name__)

_CELLS = 5000  # test cells
_EVEN = 0.1  # share of them that is spread evenly over the types
_LEAST = 10  # test cells that get a label, for an estimate of its precision
_STEPS = 100  # of Richardson-Lucy


def estimate_precision(
    reference: AnnData,
    numbers: NDArray[np.float64],
    transcripts: NDArray[np.float64],
    factors: NDArray[np.float64],
    settings: CellTypeSettings,
    seed: int,
) -> dict[str, float | None]:
    """Estimate for each type the share of its labels that are right; None if too few test cells get its label.

    Held-out cells of the reference are drawn with replacement, about as mixed as the labelled cells of the sample (ten
    `numbers`), thinned to its `transcripts` (N,) with the `factors` (G,) of its platform, and labelled like its cells.
    The labels of each true type and the numbers give the sample's composition, and this the precision. What the sample
    has and the reference lacks is not in this figure.
    """
    generator = np.random.default_rng(seed)
    held = reference[reference.obs["held_out"].to_numpy(dtype=bool)]
    kinds = held.obs["type"].map(ST_TYPES.index).to_numpy(dtype=np.int64)
    members = [np.flatnonzero(kinds == label) for label in range(len(ST_TYPES))]
    present = np.array([len(rows) > 0 for rows in members])
    if not numbers[present].sum() or not (transcripts > 0).any():
        return dict.fromkeys(ST_TYPES)
    shares = np.where(present, (1 - _EVEN) * numbers / numbers[present].sum() + _EVEN / present.sum(), 0.0)
    rows = np.concatenate(
        [generator.choice(own, round(_CELLS * share)) for own, share in zip(members, shares, strict=True) if share]
    )
    index = pd.RangeIndex(len(rows)).astype(str)
    cells = AnnData(thin(held.X[rows], transcripts, generator, factors), obs=DataFrame(index=index), var=held.var)
    fractions, second, _ = two_passes(cells, known_part(reference), settings, seed)
    labels = label_cells(fractions, second, totals(cells).astype(np.int64), settings)["label"].to_numpy()
    drawn_as = np.zeros((len(ST_TYPES), len(ST_TYPES)))
    np.add.at(drawn_as, (kinds[rows][labels >= 0], labels[labels >= 0]), 1)
    rates = drawn_as / np.maximum(np.bincount(kinds[rows], minlength=len(ST_TYPES)), 1)[:, None]
    expected = _unfold(rates, numbers)[:, None] * rates
    found = {
        name: float(expected[label, label] / expected[:, label].sum())
        if drawn_as[:, label].sum() >= _LEAST and expected[:, label].sum() > 0
        else None
        for label, name in enumerate(ST_TYPES)
    }
    log.info("estimated precision: %s", ", ".join(f"{k} {v:.2f}" for k, v in found.items() if v is not None))
    return found


def _unfold(rates: NDArray[np.float64], numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cells (T,) of each type that give `numbers` (T,) of labels at `rates` (true type, label); Richardson-Lucy."""
    cells = np.where(rates.sum(axis=1) > 0, numbers.sum() / len(numbers), 0.0)
    for _ in range(_STEPS):
        expected = cells @ rates
        ratio = np.where(expected > 0, numbers / np.maximum(expected, 1e-9), 0)
        cells = cells * (rates @ ratio) / np.maximum(rates.sum(axis=1), 1e-9)
    return cells
