"""What all unit tests share."""

import os
import shutil
import sys

import pytest

if shutil.which("nvidia-smi") is None:  # Triton reads it once, whoever imports it first
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def same_threads():
    """Give PyTorch back the threads that it had: training takes as many as it is told."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)
