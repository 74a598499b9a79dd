"""Quality of the cell types of a sample: counts, markers, agreement of the annotators, and a test with known types."""

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame
from sklearn.metrics import confusion_matrix, f1_score

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.xenium.celltypes.annotate import Annotation
from celldetr.xenium.celltypes.annotators import two_passes
from celldetr.xenium.celltypes.labels import FRACTIONS, IMPRECISE, REASONS, UNLIKE, best, label_cells, reason_counts
from celldetr.xenium.celltypes.profiles import known_part, log_normalise, on_genes, thin, totals, type_profiles

_MARKERS_PER_TYPE = 3
_MIN_SHARE = 1e-4  # of a cell's transcripts; damps the fold change of rare genes


def quality(
    cells: AnnData, reference: AnnData, annotation: Annotation, settings: CellTypeSettings, seed: int
) -> dict[str, Any]:
    """Compute all figures of quality, as JSON values; arguments as those of `annotate`, and its result.

    ``reasons`` are reason -> cells, ``labels`` type -> cells, ``composition`` shares of the cells, ``prior`` shares of
    the transcripts, ``unlike`` type -> share of its certain cells that are unlike it; ``missing_types``,
    ``unknown_types``, ``precision`` and ``unused_types`` are those of `Annotation`, ``reference_warnings`` those on the
    reference's mapping, the others those of `agreement`, `marker_figures` and `reannotate`.
    """
    table, genes = annotation.table, annotation.genes
    reasons = reason_counts(table)
    labels = table["label"].to_numpy()
    numbers = np.bincount(labels[labels >= 0], minlength=len(ST_TYPES))
    whole = np.array([float(reference.uns["composition"][name]) for name in ST_TYPES])
    here = on_genes(cells, genes.first, genes.names)
    known = on_genes(reference, genes.second, genes.names)
    return {
        "cells": len(table),
        "shared_genes": len(genes.names),
        "shared_by": genes.by,
        "reasons": reasons,
        "labelled_share": reasons["labelled"] / len(table),
        "labels": _by_type(numbers),
        "composition": {"sample": _by_type(numbers / numbers.sum()), "reference": _by_type(whole / whole.sum())},
        "prior": _by_type(annotation.prior.to_numpy()),
        "unlike": _unlike(table),
        "reference_warnings": str(reference.uns.get("warnings", "")).splitlines(),
        "missing_types": list(annotation.missing),
        "unknown_types": annotation.unknown,
        "precision": annotation.precision,
        "min_precision": settings.min_precision,
        "unused_types": list(annotation.unused),
        "agreement": agreement(annotation),
        "markers": marker_figures(here, known_part(known), labels),
        "reannotation": reannotate(known, totals(here), settings, seed),
    }


def _unlike(table: DataFrame) -> dict[str, float | None]:
    """Share of the certain cells of each type that are unlike it, among those and the labelled ones."""
    first, reason = best(table[list(FRACTIONS)]), table["reason"].to_numpy()
    certain = np.isin(reason, (REASONS[0], UNLIKE, IMPRECISE))
    return {name: _mean((reason == UNLIKE)[certain & (first == label)]) for label, name in enumerate(ST_TYPES)}


def agreement(annotation: Annotation) -> dict[str, Any]:
    """Share of the cells with counts whose types by both annotators agree; None without cells.

    Returns ``overall``, ``enough_transcripts`` (cells above the threshold of transcripts) and ``by_type`` (type by
    optimal transport -> share).
    """
    table = annotation.table
    first = best(table[list(FRACTIONS)])
    second = table["second_label"].to_numpy()
    known = (first >= 0) & (second >= 0)
    enough = known & (table["reason"] != "few transcripts").to_numpy()
    same = first == second
    return {
        "overall": _mean(same[known]),
        "enough_transcripts": _mean(same[enough]),
        "by_type": {name: _mean(same[known & (first == index)]) for index, name in enumerate(ST_TYPES)},
    }


def marker_figures(cells: AnnData, reference: AnnData, labels: NDArray[np.int8]) -> dict[str, Any]:
    """Marker genes of the reference's types, and their expression in the sample's labelled cells.

    `cells` and `reference` hold raw counts of the shared genes; labels (N,) are those of the sample. Returns ``genes``
    (G names, in the order of the types they mark), ``of`` (type of each), ``types`` (T names with labelled cells),
    ``share`` (T, G: share of the type's cells with the gene), ``mean`` (T, G: mean log-normalised expression, relative
    to the largest over the types).
    """
    profiles = type_profiles(reference)
    genes, of = [], []
    for name in profiles.index:  # largest fold changes over the best other type
        others = profiles.drop(index=name).max(axis=0)
        fold = np.log((profiles.loc[name] + _MIN_SHARE) / (others + _MIN_SHARE)).sort_values(ascending=False)
        chosen = [gene for gene in fold.index[:_MARKERS_PER_TYPE] if fold[gene] > 0]
        genes += chosen
        of += [name] * len(chosen)
    places = profiles.columns.get_indexer(pd.Index(genes))
    amount = totals(cells)
    shown = log_normalise(cells.X[:, places], amount, float(np.median(amount[amount > 0])))
    found = np.unique(labels[labels >= 0]).tolist()
    by_type = [shown[np.flatnonzero(labels == label)] for label in found]
    mean = np.vstack([rows.astype(np.float64).mean(axis=0) for rows in by_type])
    share = np.vstack([(rows > 0).mean(axis=0) for rows in by_type])
    return {
        "genes": genes,
        "of": of,
        "types": [ST_TYPES[label] for label in found],
        "share": np.asarray(share).round(4).tolist(),
        "mean": np.asarray(mean / np.maximum(mean.max(axis=0), 1e-9)).round(4).tolist(),
    }


def reannotate(
    reference: AnnData, transcripts: NDArray[np.float64], settings: CellTypeSettings, seed: int
) -> dict[str, Any]:
    """Annotate the held-out cells of the reference as if they were cells of the sample.

    Their counts of the shared genes are thinned to the totals (N,) of the sample's cells, `transcripts`. Returns
    ``confusion`` (10, 10: true type, type with the largest fraction; cells with counts), ``f1`` (type -> F1, None
    without cells), ``macro_f1`` (mean over the types with held-out cells), ``accuracy`` (of the cells with counts),
    ``cells``, ``without_counts``, ``labelled_share`` and ``labelled_accuracy`` (of the cells that pass the thresholds).
    """
    held = reference[reference.obs["held_out"].to_numpy(dtype=bool)]
    thinned = AnnData(thin(held.X, transcripts, np.random.default_rng(seed)), obs=held.obs, var=held.var)
    fractions, second, _ = two_passes(thinned, known_part(reference), settings, seed)
    truth = held.obs["type"].map(ST_TYPES.index).to_numpy(dtype=np.int64)
    found = best(fractions)
    seen = found >= 0
    every = np.arange(len(ST_TYPES))
    present = np.isin(every, truth)
    # a cell without counts (-1) is a false negative of its type and a false positive of none
    f1 = f1_score(truth, found, labels=every, average=None, zero_division=0)
    labels = label_cells(fractions, second, totals(thinned).astype(np.int64), settings)["label"].to_numpy()
    labelled = labels >= 0
    return {
        "cells": len(truth),
        "without_counts": int((~seen).sum()),
        "confusion": confusion_matrix(truth, found, labels=every).tolist(),
        "f1": {name: float(f1[index]) if present[index] else None for index, name in enumerate(ST_TYPES)},
        "macro_f1": _mean(f1[present]),
        "accuracy": _mean((found == truth)[seen]),
        "labelled_share": _mean(labelled),
        "labelled_accuracy": _mean((labels == truth)[labelled]),
    }


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _by_type(values: NDArray[Any]) -> dict[str, Any]:
    return dict(zip(ST_TYPES, values.tolist(), strict=True))
