"""Cell types of a sample in two passes: the composition by correlation, the types by optimal transport."""

import importlib.metadata
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from pandas import DataFrame, Series
from scipy import sparse

from celldetr.config.classes import ST_TYPES
from celldetr.config.xenium import CellTypeSettings
from celldetr.runtime.errors import InputError
from celldetr.xenium.celltypes.annotators import correlation, tacco_ot, totals, transcript_shares
from celldetr.xenium.celltypes.genes import SharedGenes, shared_genes
from celldetr.xenium.celltypes.labels import best, label_cells, reason_counts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """Cell types of a sample.

    Attributes
    ----------
    table
        See `celldetr.xenium.celltypes.labels.label_cells`.
    genes
        Genes that panel and reference share.
    prior
        Composition that optimal transport started from: type -> share of the transcripts.
    """

    table: DataFrame
    genes: SharedGenes
    prior: Series


def annotate(cells: AnnData, reference: AnnData, settings: CellTypeSettings, seed: int) -> Annotation:
    """Annotate the cells of a sample.

    Parameters
    ----------
    cells
        Raw counts (csr_matrix) of a Xenium sample.
    reference
        Prepared reference; its held-out cells are not used.
    settings
        Settings.
    seed
        Of the parts that optimal transport works in.

    Raises
    ------
    InputError
        Too few genes in common, cell ids that occur twice, counts that are none, or no cell with a certain type.
    """
    _check_counts(cells)
    genes = shared_genes(cells, reference, settings.min_shared_genes)
    log.info("%d genes in common, by %s", len(genes.names), genes.by)
    here = on_genes(cells, genes.first, genes.names)
    fractions, second, prior = two_passes(
        here,
        on_genes(known_part(reference), genes.second, genes.names),
        reference.uns["composition"],
        settings,
        seed,
    )
    table = label_cells(fractions, second, totals(here).astype(np.int64), settings)
    for reason, number in reason_counts(table).items():
        log.info("%-20s %8d cells (%.1f %%)", reason, number, 100 * number / len(table))
    return Annotation(table, genes, prior)


def two_passes(
    cells: AnnData, reference: AnnData, composition: dict[str, int], settings: CellTypeSettings, seed: int
) -> tuple[DataFrame, DataFrame, Series]:
    """Annotate by correlation, then by optimal transport with the composition as prior.

    Parameters
    ----------
    cells, reference
        Raw counts of the shared genes.
    composition
        Type -> cells of the whole reference.
    settings, seed
        As for `annotate`.

    Returns
    -------
    tuple
        Fractions by optimal transport, fractions by correlation, prior (type -> share of the transcripts).
    """
    second = correlation(cells, reference)
    if settings.prior == "sample":
        prior = transcript_shares(best(second).astype(np.int64), totals(cells))
    else:
        prior = _reference_prior(reference, composition)
    log.info("composition (%s): %s", settings.prior, ", ".join(f"{name} {share:.3f}" for name, share in prior.items()))
    fractions = tacco_ot(cells, reference, prior, lamb=settings.lamb, seed=seed)
    return fractions, second, prior


def on_genes(cells: AnnData, places: np.ndarray, names: tuple[str, ...]) -> AnnData:
    """Restrict counts to some genes, renamed; the columns of obs are kept."""
    return AnnData(
        sparse.csr_matrix(cells.X[:, places], dtype=np.float32),
        obs=cells.obs,
        var=DataFrame(index=pd.Index(names)),
    )


def known_part(reference: AnnData) -> AnnData:
    """Cells of a prepared reference that annotate."""
    return reference[~reference.obs["held_out"].to_numpy(dtype=bool)]


def versions() -> dict[str, str]:
    """Versions of the packages that the types depend on."""
    return {name: importlib.metadata.version(name) for name in ("tacco", "anndata", "numpy", "scipy")}


def _reference_prior(reference: AnnData, composition: dict[str, int]) -> Series:
    """Shares of the transcripts that the whole reference would have: cells per type times transcripts per cell."""
    per_cell = Series(totals(reference), index=reference.obs["type"].astype(str)).groupby(level=0).mean()
    shares = Series({name: float(composition[name]) * per_cell.get(name, 0.0) for name in ST_TYPES})
    return shares / shares.sum()


def _check_counts(cells: AnnData) -> None:
    if not sparse.issparse(cells.X) or cells.X.format != "csr":
        raise InputError(f"counts of the sample: got {type(cells.X).__name__}, expected csr_matrix")
    values = cells.X.data
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
        raise InputError(
            "counts of the sample: got values that are negative or not whole, expected raw counts: use the matrix of "
            "the output folder as it is"
        )
    if not cells.obs_names.is_unique:
        raise InputError(f"cells of the sample: got {int(cells.obs_names.duplicated().sum())} ids twice, expected none")
