"""These tests need the packages of the baselines; where one is missing, each file is skipped, and says so."""

import pytest

from celldetr.config.segmentation import missing_packages

MISSING = missing_packages()


class Skipped(pytest.Module):
    """A file of tests that is not imported."""

    def collect(self):
        pytest.skip(f"{', '.join(MISSING)} not installed; `make test-baselines` does it", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return Skipped.from_parent(parent, path=module_path) if MISSING else None
