"""CellDETR: detection-guided cell representation learning from H&E images.

The scripts of the rules beside it import it; it imports nothing from Snakemake. Its subpackages depend on each other in
one direction: config, runtime; fetch, store, slides; pannuke, xenium, model; evaluation; training; inference; report.
Only model, training and inference import torch. tests/unit/test_rooms.py checks both.
"""

__version__ = "0.1.0"
