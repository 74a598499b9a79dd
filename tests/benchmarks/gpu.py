"""Everything worth knowing from a machine with a GPU, in one prepared run: parts with a limit and a log each.

Usage: python tests/benchmarks/gpu.py OUT [--seconds N] [--parts NAME ...] [--tiny]. Needs no network. Parts for which
no time is left are named; run them with --parts. --tiny: small models on the device that there is, to see that all
parts run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHOWN = 14
"""Last lines of a log that are printed."""
MODES = ("parallel", "ssl", "st", "baseline")
PARTS = {
    "training": (150, ["training_throughput.py", "--rounds", "4", "--compile", "no"]),
    "profile": (240, ["step_profile.py", "--rounds", "10"]),
    "prediction": (200, ["inference_throughput.py", "--rounds", "3"]),
    "sampling": (60, ["sampling_kernels.py", "--rounds", "5"]),
    "tests": (30, []),
    "epochs": (240, ["epoch_rates.py"]),
    "control": (240, ["epoch_rates.py", "--control"]),
    "combined": (240, ["step_profile.py", "--rounds", "10", "--compile", "combined"]),
    **{f"training_{mode}": (240, ["step_profile.py", "--rounds", "10", "--mode", mode]) for mode in MODES},
    "plain_step": (40, ["step_profile.py", "--rounds", "10", "--compile", "no"]),
    "ladder": (480, ["training_throughput.py", "--rounds", "4"]),
}
"""Seconds at most, and the program: the kernels of a step take a minute to write, and more to compile. The tests that
need a GPU are parts of their own, with that limit each."""


def run(name: str, limit: float, command: list[str], out: Path) -> int | None:
    """Run a part; its exit status, None: it took too long."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(HERE)]),
        "PYTHONUNBUFFERED": "1",
    }
    start, file = time.monotonic(), out / f"{name}.log"
    with file.open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, timeout=limit
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = None
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if "Warn" not in line]
    ended = "took too long" if status is None else f"status {status}"
    print(
        f"== {name}: {ended} after {time.monotonic() - start:.0f} s",
        *(x[:160] for x in lines[-SHOWN:]),
        sep="\n",
        flush=True,
    )
    return status


def gpu_tests(out: Path) -> list[str]:
    """Names of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/unit/model"]
    run("collect", 60, [*command, "tests/unit/training", "tests/unit/inference", "-k", "gpu or cuda"], out)
    lines = (out / "collect.log").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "::" in line and line.startswith("tests/")]


def main() -> int:
    """Run the parts in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the logs")
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = []
    for part in args.parts:
        limit, program = PARTS[part]
        if program:
            work.append(
                (part, limit, [sys.executable, HERE / program[0], *program[1:], *(["--tiny"] if args.tiny else [])])
            )
        else:
            test = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            found = gpu_tests(args.out)
            work += [
                (f"test_{number}", limit, [*test, name])
                for number, name in enumerate(found[: 2 if args.tiny else None])
            ]
    end, statuses = time.monotonic() + args.seconds, []
    for name, limit, command in work:
        left = end - time.monotonic()
        if left < 10:
            print(f"== {name}: no time left")
        statuses.append(
            run(name, min(limit * (4 if args.tiny else 1), left), command, args.out) if left >= 10 else None
        )
    return int(any(statuses) or None in statuses)


if __name__ == "__main__":
    sys.exit(main())
