"""What the tests of training share."""

import pytest
from tiny_training import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Give a store of 14 patches, every fifth without nuclei."""
    return make_store(tmp_path_factory.mktemp("stores") / "fold1.zarr", 14)


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    """Give such a store without classes."""
    return make_store(tmp_path_factory.mktemp("stores") / "slide.zarr", 14, classes=())
