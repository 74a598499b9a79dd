"""Settings of the systems that segment nuclei, and whether their packages are there."""

import subprocess
import sys

from celldetr.config.segmentation import PACKAGES

ASK = """
import sys
from celldetr.config.segmentation import missing_packages
sys.path[:] = sys.argv[1:]
print(*missing_packages(), "torch" in sys.modules)
"""


def test_missing_packages_are_found_without_importing_any(tmp_path):
    for name in PACKAGES[::2]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this package was imported')", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", ASK, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*PACKAGES[1::2], "False"]
