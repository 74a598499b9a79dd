"""Running programs of this environment in tests, and the text of the rules."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


RULES = {
    block.partition(":")[0]: block
    for file in sorted((ROOT / "workflow" / "rules").glob("*.smk"))
    for block in re.split(r"\n\s*rule ", file.read_text(encoding="utf-8"))[1:]
}
"""Text of each rule by name."""


def run(*arguments, cwd=ROOT, timeout=2000, environment=None):
    """Run a program of this environment; return its completed process with all output in `stdout`."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=ENVIRONMENT | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
