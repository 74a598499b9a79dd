"""Running Snakemake in tests."""

import pytest
from programs import ROOT, run


@pytest.fixture
def snakemake(tmp_path):
    """Call Snakemake on this workflow in a folder of the test's own."""

    def call(*arguments, config=ROOT / "config" / "example" / "config.yaml", **options):
        return run(
            "snakemake",
            *("--snakefile", ROOT / "workflow" / "Snakefile"),
            *("--configfile", config),
            *("--directory", tmp_path),
            *("--cores", 1),
            *arguments,
            **options,
        )

    return call
