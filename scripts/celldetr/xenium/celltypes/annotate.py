"""Cell types of a sample: the certain types of two annotators, less the cells that are unlike their type."""

import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from pandas import DataFrame, Series

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.runtime.errors import InputError
from celldetr.xenium.celltypes.annotators import two_passes, types_with_counts
from celldetr.xenium.celltypes.genes import SharedGenes, shared_genes
from celldetr.xenium.celltypes.labels import (
    IMPRECISE,
    UNKNOWN,
    UNLIKE,
    best,
    label_cells,
    reason_counts,
    require_labels,
    withdraw,
)
from celldetr.xenium.celltypes.likeness import likeness
from celldetr.xenium.celltypes.precision import estimate_precision
from celldetr.xenium.celltypes.profiles import known_part, on_genes, totals
from celldetr.xenium.celltypes.unknown import unknown_types

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """Cell types of a sample."""

    table: DataFrame  # labels and fractions, see `label_cells`
    genes: SharedGenes
    prior: Series  # composition given to optimal transport: type -> share of the transcripts
    missing: tuple[str, ...]  # types of the ten that no cell can get: the reference has no counts of them
    unknown: list[dict[str, Any]]  # types that the reference lacks, see `UnknownTypes`
    precision: dict[str, float | None]  # estimated share of the labels of a type that are right
    unused: tuple[str, ...]  # types that are not used for training: estimated precision below the limit


def annotate(cells: AnnData, reference: AnnData, settings: CellTypeSettings, seed: int) -> Annotation:
    """Annotate the cells of a sample (raw counts, csr_matrix) by the cells of a reference that are not held out.

    Held-out cells show how much cells resemble their type, and how many labels of a type are right. Raises InputError
    if there are too few shared genes, duplicate cell ids, counts that are not raw, or no sure types.
    """
    values = cells.X.data
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
        raise InputError(
            "counts of the sample: got values that are negative or not whole, expected raw counts: use the matrix of "
            "the output folder as it is"
        )
    if not cells.obs_names.is_unique:
        raise InputError(f"cells of the sample: got {int(cells.obs_names.duplicated().sum())} duplicate ids")
    genes = shared_genes(cells, reference, settings.min_shared_genes)
    log.info("%d shared genes, by %s", len(genes.names), genes.by)
    here = on_genes(cells, genes.first, genes.names)
    there = on_genes(reference, genes.second, genes.names)
    types = set(types_with_counts(known_part(there)).obs["type"])
    there = there[there.obs["type"].isin(types).to_numpy()].copy()
    missing = tuple(name for name in ST_TYPES if name not in types)
    if missing:
        log.warning("the reference lacks %s: their cells get no label, or a wrong one", ", ".join(missing))
    fractions, second, prior = two_passes(here, known_part(there), settings, seed)
    table = label_cells(fractions, second, totals(here).astype(np.int64), settings)
    require_labels(table)
    first, labels = best(fractions), table["label"].to_numpy()
    alike = likeness(here, first, labels, there, settings.unlike_share or 1.0, seed)
    unknown = unknown_types(here, first, alike.score, alike.factors, there, settings, seed)
    table = withdraw(table, unknown.cells, UNKNOWN)
    if settings.unlike_share:
        table = withdraw(table, alike.score < -1, UNLIKE)
    sure = np.bincount(table["label"][table["label"] >= 0], minlength=len(ST_TYPES)).astype(np.float64)
    precision = estimate_precision(there, sure, totals(here), alike.factors, settings, seed)
    unused = tuple(name for name, value in precision.items() if value is not None and value < settings.min_precision)
    if unused:
        log.warning("not used for training, estimated precision below %.2f: %s", settings.min_precision, unused)
    table = withdraw(table, table["label"].isin([ST_TYPES.index(name) for name in unused]).to_numpy(), IMPRECISE)
    require_labels(table)
    for reason, number in reason_counts(table).items():
        log.info("%-20s %8d cells (%.1f %%)", reason, number, 100 * number / len(table))
    return Annotation(table, genes, prior, missing, unknown.found, precision, unused)


def versions() -> dict[str, str]:
    """Versions of the packages that the types depend on."""
    return {name: importlib.metadata.version(name) for name in ("tacco", "anndata", "numpy", "scipy")}
