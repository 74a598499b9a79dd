"""PanNuke conversion at the official image size, against testing the same archive (`unzip -t`: inflating is the floor).

Usage: python tests/benchmarks/bench_conversion.py [--images N] [--archive fold_1.zip --fold 1]
Without an archive, one is drawn (synthetic tissue, float64, 256 x 256). Both run in turn as whole processes; medians.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from celldetr.example.pannuke import write_fold

CONVERT = """
import resource, sys
from celldetr.pannuke.convert import convert_fold
convert_fold(sys.argv[1], sys.argv[2], fold=int(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def timed(command: list[str]) -> tuple[float, str]:
    """Wall seconds and output of a program."""
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, output


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--fold", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = options.archive or Path(folder) / "fold_1.zip"
        if options.archive is None:
            write_fold(archive, options.fold, options.images)
        test = ["unzip", "-tq"] if shutil.which("unzip") else [sys.executable, "-m", "zipfile", "-t"]
        ratios, seconds, peak = [], [], 0
        for _ in range(options.repeats):
            floor, _ = timed([*test, str(archive)])
            taken, output = timed(
                [sys.executable, "-c", CONVERT, str(archive), f"{folder}/fold.zarr", str(options.fold)]
            )
            ratios.append(taken / floor)
            seconds.append(taken)
            peak = max(peak, int(output))
        print(f"{archive.stat().st_size / 1e6:.0f} MB archive; {' '.join(test)} in turn with the conversion")
        print(f"conversion / test: {statistics.median(ratios):.2f}   ({statistics.median(seconds):.1f} s)")
        print(f"peak memory of the conversion: {peak * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
