"""Names of the classes, in the order of their labels, and how those of one data set become those of another."""

import re
from collections.abc import Mapping

PANNUKE_CLASSES = ("neoplastic", "inflammatory", "connective", "necrotic", "epithelial")
"""PanNuke, in the order of the channels of its masks."""

ST_TYPES = (
    *("T", "Myeloid", "Malignant", "NK", "Mast"),
    *("Fibroblast", "Epithelial", "Endothelial", "B", "Plasma"),
)
"""Cell types that are read from gene expression (paper, figure 5)."""

ST_TO_PANNUKE: Mapping[str, str] = {
    "Malignant": "neoplastic",
    "Epithelial": "epithelial",
    "Fibroblast": "connective",
    "Endothelial": "connective",
    "T": "inflammatory",
    "NK": "inflammatory",
    "B": "inflammatory",
    "Plasma": "inflammatory",
    "Myeloid": "inflammatory",
    "Mast": "inflammatory",
}
"""PanNuke class of each cell type (paper, 4.4); necrotic nuclei have none.

In zero-shot transfer the score of a class is the largest of its types (`celldetr.inference.predict.predict_fold`).
"""


def column_name(name: str) -> str:
    """Return the name of a class, or of a column with it, as SpatialData takes it: no signs but ``_``, ``-``, ``.``."""
    return re.sub(r"[^\w.-]", "_", name)
