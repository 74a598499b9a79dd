"""Tiers of the tests: each test has a marker named after its folder (unit, fuzz, workflow, faults, slurm)."""

from pathlib import Path

pytest_plugins = ["small_run"]


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])
