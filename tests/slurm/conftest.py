"""A cluster for the tests."""

import cluster as slurm
import pytest


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    """Start a cluster, with or without accounting, as the parameter says."""
    accounting = getattr(request, "param", False)
    try:
        slurm.check(accounting)
    except slurm.ClusterError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cluster")
    slurm.start(folder, accounting)
    yield accounting
    slurm.stop(folder)
