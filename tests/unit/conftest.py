"""What all unit tests share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def same_threads():
    """Give PyTorch back the threads that it had: training takes as many as it is told."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)
