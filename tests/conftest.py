"""Tiers of the tests: each test has a marker named after its folder, one of `TIERS`."""

import os
import shutil
from pathlib import Path

if shutil.which("nvidia-smi") is None:  # Triton reads it once, whoever imports it first
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["small_run"]


TIERS = ("slurm", "workflow", "faults", "baselines", "fuzz", "unit")
"""In the order in which they run: long ones first, so that no test process is left with them at the end."""


def pytest_collection_modifyitems(items):
    tiers = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    for item, tier in tiers.items():
        item.add_marker(tier)
    items.sort(key=lambda item: TIERS.index(tiers[item]))
