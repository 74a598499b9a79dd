"""CellDETR: detection-guided cell representation learning from H&E images.

The package is imported by the rule scripts beside it and imports nothing from Snakemake. What the data rules use
(`store`, `download`, `data`, `evaluation`) never import torch.
"""

__version__ = "0.1.0"
