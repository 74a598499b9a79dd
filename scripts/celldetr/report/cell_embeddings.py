"""The embeddings of cells as a map: those of similar cells lie beside each other (UMAP)."""

import anndata
import numpy as np
import scanpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from celldetr.cells.table import CellFile, embedding_values
from celldetr.report.cell_maps import DrawnCells
from celldetr.report.style import CASING, styled

SAMPLED = 6_000
"""Most cells on the map; from 8,192 on scanpy takes approximate neighbours, which compile for half a minute."""
FEWEST = 50
"""Fewest cells of which a map is made."""
_PAPER = "#C4C4C4"  # below the points: neither white nor black, which are colours of classes


def embedding_map(file: CellFile, cells: DrawnCells, seed: int) -> tuple[Figure | None, str]:
    """Draw the UMAP of a sample of cells, and describe it; without a figure, say why there is none."""
    if not file.info.width:
        return None, "There are no embeddings in the file."
    chosen = np.sort(np.random.default_rng(seed).permutation(len(cells))[:SAMPLED])
    column = file.take(cells.numbers[chosen], ["embedding"])["embedding"]
    embeddings = np.concatenate([np.empty((0, file.info.width)), *map(embedding_values, column.chunks)])
    whole = np.isfinite(embeddings).all(axis=1)
    chosen, embeddings = chosen[whole], embeddings[whole]
    if len(chosen) < FEWEST:
        return None, f"There is no UMAP of {len(chosen)} cells with an embedding; it takes at least {FEWEST}."
    sample = f"{len(chosen):,} cells, drawn from {len(cells):,}" if len(chosen) < len(cells) else "all cells"
    return umap_figure(umap_points(embeddings, seed), cells, chosen), (
        f"UMAP of the embeddings of {sample}, by scanpy: cells that look alike to the model lie near each other. "
        "Distances between groups mean little."
    )


def umap_points(embeddings: NDArray[np.floating], seed: int) -> NDArray[np.float64]:
    """Return the UMAP (n, 2) of embeddings (n, C) by scanpy: 15 nearest neighbours, Euclidean."""
    data = anndata.AnnData(embeddings.astype(np.float32))
    scanpy.pp.neighbors(data, use_rep="X", random_state=seed)
    scanpy.tl.umap(data, random_state=seed)
    return np.asarray(data.obsm["X_umap"], dtype=np.float64)


@styled
def umap_figure(points: NDArray[np.float64], cells: DrawnCells, chosen: NDArray[np.int64]) -> Figure:
    """Draw a UMAP (m, 2) of the `chosen` cells (m,), coloured by type, by the score of the type and of the nucleus."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    axes = figure.subplots(1, 3)
    x, y = points.T
    look = {"s": 9 if len(points) < 2000 else 4, "linewidths": 0.15, "edgecolors": CASING}
    axes[0].scatter(x, y, c=np.array(cells.colours)[cells.groups[chosen]], **look)
    axes[0].set_title("type")
    typed = cells.groups[chosen] < len(cells.names) - 1
    scores = {
        "score of the type": np.where(typed, cells.certainty[chosen], np.nan),
        "nucleus score": cells.nucleus_score[chosen],
    }
    for axis, (title, score) in zip(axes[1:], scores.items(), strict=True):
        known = np.isfinite(score)
        axis.scatter(x[~known], y[~known], c="white", **look)
        shown = axis.scatter(x[known], y[known], c=score[known], cmap="viridis", vmin=0, vmax=1, **look)
        axis.set_title(title + ("" if known.all() else " (white: none)"))
        figure.colorbar(shown, ax=axis, aspect=30, shrink=0.7)
    for axis in axes:
        axis.set(xticks=[], yticks=[], facecolor=_PAPER, xlabel="UMAP 1", ylabel="UMAP 2")
        axis.set_box_aspect(1)
    return figure
