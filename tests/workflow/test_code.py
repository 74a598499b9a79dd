"""The checks of the code: form, types, spelling, and what Snakemake's linter says."""

import pytest
from programs import ROOT, run

CHECKS = {
    "ruff": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "."),
    "mypy": ("mypy",),
    "snakefmt": ("snakefmt", "--check", "workflow/Snakefile", "workflow/rules"),
    "codespell": ("codespell",),
    "lint": ("snakemake", "--lint"),
    "lint of the example": ("snakemake", "--lint", "--configfile", "config/example/config.yaml"),
}


@pytest.mark.parametrize("command", CHECKS.values(), ids=list(CHECKS))
def test_clean(command):
    done = run(*command, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_scripts_are_thin():
    for script in sorted((ROOT / "scripts").glob("*.py")):
        lines = script.read_text(encoding="utf-8").count("\n")
        assert lines < 80, f"{script.name}: {lines} lines; algorithms belong into scripts/celldetr"
