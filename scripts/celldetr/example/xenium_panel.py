"""Genes, cell types and their subtypes: the tables that planted expression follows.

Gene symbols are those of markers that the field uses; the identifiers are made up, in the form of Ensembl's.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

MARKERS: Mapping[str, tuple[str, ...]] = {
    "T": ("CD3D", "CD3E", "CD3G", "TRAC", "CD2", "CD5", "IL7R", "BCL11B", "CD6", "LCK"),
    "Myeloid": ("CD68", "CD163", "LYZ", "CD14", "FCGR3A", "MARCO", "C1QA", "C1QB", "CSF1R", "ITGAX", "MRC1", "FCER1G"),
    "Malignant": ("MKI67", "TOP2A", "CEACAM6", "CEACAM5", "TACSTD2", "SOX4", "CLDN4", "ERBB2", "CCND1", "MUC1", "TP63"),
    "NK": ("NKG7", "GNLY", "KLRD1", "KLRF1", "NCAM1", "PRF1", "KLRC1", "XCL1"),
    "Mast": ("KIT", "TPSAB1", "TPSB2", "CPA3", "MS4A2", "HPGDS", "GATA2", "HDC"),
    "Fibroblast": ("COL1A1", "COL1A2", "DCN", "LUM", "PDGFRA", "PDGFRB", "FBLN1", "COL3A1", "ACTA2", "MFAP5", "FAP"),
    "Epithelial": ("SFTPC", "SFTPB", "NAPSA", "AGER", "FOXJ1", "SCGB1A1", "SCGB3A1", "LAMP3", "NKX2-1", "CAPS"),
    "Endothelial": ("PECAM1", "VWF", "CDH5", "CLDN5", "KDR", "ENG", "CLEC14A", "EMCN", "RAMP2", "PLVAP"),
    "B": ("MS4A1", "CD19", "BANK1", "CD79A", "CD22", "PAX5", "TCL1A", "FCRL1"),
    "Plasma": ("MZB1", "JCHAIN", "IGHG1", "XBP1", "DERL3", "TNFRSF17", "PRDM1", "SDC1", "IGKC"),
}
"""Genes that one type expresses far above the others."""

SHARED_MARKERS: Mapping[str, tuple[str, ...]] = {
    "PTPRC": ("T", "NK", "B", "Plasma", "Myeloid", "Mast"),
    "EPCAM": ("Malignant", "Epithelial"),
    "KRT7": ("Malignant", "Epithelial"),
    "KRT8": ("Malignant", "Epithelial"),
    "CDH1": ("Malignant", "Epithelial"),
    "GZMB": ("NK", "T"),
    "CCL5": ("NK", "T"),
    "CD8A": ("T", "NK"),
    "CD4": ("T", "Myeloid"),
    "HLA-DRA": ("Myeloid", "B"),
    "CD74": ("Myeloid", "B", "Epithelial"),
    "CD27": ("T", "Plasma", "B"),
    "VIM": ("Fibroblast", "Endothelial", "Myeloid"),
    "SPARC": ("Fibroblast", "Endothelial"),
    "CAV1": ("Endothelial", "Fibroblast"),
}
"""Genes that several types express."""

COMMON_GENES = ("ACTB", "B2M", "MALAT1", "TMSB4X", "EEF1A1", "FOS", "JUN", "HSPA1A", "NFKBIA", "SAT1", "CD44", "STAT1")
"""Genes that every cell expresses."""

PANEL: tuple[str, ...] = tuple(
    sorted({*(gene for genes in MARKERS.values() for gene in genes), *SHARED_MARKERS, *COMMON_GENES})
    + ["FOXP3", "CTLA4", "IL2RA", "CD8B", "POSTN", "MYH11", "CLEC9A", "CD1C", "S100A8", "CCL21"]
)
"""Genes that the instrument measures."""


@dataclass(frozen=True)
class Subtype:
    """One label of the reference.

    Attributes
    ----------
    type
        One of the ten types, or "-" when no type stands for it.
    tissue
        Share of the type's cells in the tissue.
    reference
        Share of the reference's cells.
    genes
        Genes that it expresses above the rest of its type.
    """

    type: str
    tissue: float
    reference: float
    genes: tuple[str, ...] = ()


SUBTYPES: Mapping[str, Subtype] = {
    "CD4-positive, alpha-beta T cell": Subtype("T", 0.45, 0.16, ("CD4", "IL7R")),
    "CD8-positive, alpha-beta T cell": Subtype("T", 0.35, 0.13, ("CD8A", "CD8B", "CCL5")),
    "regulatory T cell": Subtype("T", 0.20, 0.04, ("FOXP3", "CTLA4", "IL2RA")),
    "macrophage": Subtype("Myeloid", 0.60, 0.15, ("MARCO", "MRC1")),
    "classical monocyte": Subtype("Myeloid", 0.25, 0.08, ("S100A8", "CD14")),
    "conventional dendritic cell": Subtype("Myeloid", 0.15, 0.03, ("CLEC9A", "CD1C")),
    "malignant cell": Subtype("Malignant", 1.0, 0.09),
    "natural killer cell": Subtype("NK", 1.0, 0.06),
    "mast cell": Subtype("Mast", 1.0, 0.03),
    "lung fibroblast": Subtype("Fibroblast", 0.75, 0.03, ("DCN", "LUM")),
    "smooth muscle cell": Subtype("Fibroblast", 0.25, 0.02, ("ACTA2", "MYH11")),
    "pulmonary alveolar type 2 cell": Subtype("Epithelial", 0.55, 0.05, ("SFTPC", "LAMP3")),
    "ciliated columnar cell of tracheobronchial tree": Subtype("Epithelial", 0.45, 0.02, ("FOXJ1", "CAPS")),
    "vein endothelial cell": Subtype("Endothelial", 0.70, 0.02, ("PLVAP", "VWF")),
    "endothelial cell of lymphatic vessel": Subtype("Endothelial", 0.30, 0.01, ("CCL21",)),
    "B cell": Subtype("B", 1.0, 0.05),
    "plasma cell": Subtype("Plasma", 1.0, 0.03),
    "erythrocyte": Subtype("-", 0.0, 0.01),
}
"""Labels of the reference: names of the Cell Ontology. Its composition is not that of the tissue."""

REFERENCE_LABELS: Mapping[str, str] = {label: subtype.type for label, subtype in SUBTYPES.items()}
"""Label of the reference -> one of the ten types, or "-" for cells that are left out."""

LOOK_TYPES: Mapping[str, Mapping[str, float]] = {
    "neoplastic": {"Malignant": 1.0},
    "epithelial": {"Epithelial": 1.0},
    "connective": {"Fibroblast": 0.75, "Endothelial": 0.25},
    "inflammatory": {"T": 0.40, "Myeloid": 0.20, "B": 0.15, "Plasma": 0.12, "NK": 0.08, "Mast": 0.05},
    "necrotic": {"-": 1.0},
}
"""Look of a nucleus (PanNuke class) -> share of each type; dead cells have none."""


def gene_id(symbol: str) -> str:
    """Make up an identifier of a gene in the form of Ensembl's; the same in the sample and in the reference."""
    return f"ENSG{zlib.crc32(symbol.encode()):011d}"
