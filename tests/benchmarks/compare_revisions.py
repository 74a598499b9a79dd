"""The data rules as they were at an older revision, against the working tree: the same inputs, in turn, in one run.

Usage: python tests/benchmarks/compare_revisions.py REVISION [--steps NAME ...] [--repeats N] [--workers N]. The
library and the scripts of the revision come out of git into a temporary folder. Each step runs in a process of its own,
once with each library; prints medians and their ratio, of wall time and of processor time (on a busy machine the
latter means more). The inputs are drawn.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from bench_patches import write_slide
from bench_slides import write_outlines

from celldetr.example.pannuke import write_fold

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SLIDE, NUCLEI = (51_200, 4_096), 90_000  # px and outlines of the drawn slide

PREPARE = """
import resource, runpy, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
FOLDER, SCRIPTS, WORKERS = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
OUT = FOLDER / "out"
def rule(script, given, outputs, wildcards=SimpleNamespace(), **params):
    outputs = SimpleNamespace(**{name: OUT / path for name, path in outputs.items()})
    given, params = SimpleNamespace(**given), SimpleNamespace(**params)
    job = SimpleNamespace(input=given, output=outputs, params=params, wildcards=wildcards, threads=WORKERS)
    main = runpy.run_path(SCRIPTS / script)["main"]
    return lambda: main(job)
def used():
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
"""
STEPS = {
    "convert_pannuke": """
pages = {"store": "fold1.zarr", "summary_tsv": "f.tsv", "summary_html": "f.html"}
work = rule("convert_pannuke.py", {"archive": FOLDER / "fold_1.zip"}, pages, fold=1, patch_size=256, mpp=0.25)
""",
    "extract_slide": """
from celldetr.config.slides import SlidePatchSettings
pages = {"store": "s.zarr", "summary_tsv": "s.tsv", "summary_html": "s.html", "picture": "s.png"}
work = rule("extract_slide.py", {"file": FOLDER / "slide.tif", "nuclei": FOLDER / "nuclei.parquet"}, pages,
            SimpleNamespace(slide="s"), settings=SlidePatchSettings().to_dict(), on_damage="stop", patch_size=256,
            mpp=0.25, slide_mpp=None, unit="px", tissue="t", group="g", seed=0)
""",
    "prediction of a slide, without the model": """
from celldetr.inference import detection as cells
def detector(images):
    centres = np.random.default_rng(0).uniform(0, 256, (25, 2))
    return [(np.concatenate([centres - 8, centres + 8], 1), np.linspace(0, 1, 25)) for _ in images]
def work():
    cells.detect_file(FOLDER / "slide.tif", detector, slide="s", slide_mpp=None, size=256, mpp=0.25, margin_um=8.0,
                      batch_size=16, on_damage="stop", workers=WORKERS)
""",
    "predictions of 2,600 patches, written and read": """
from celldetr.evaluation.predictions import PredictionsWriter, read_predictions
rng = np.random.default_rng(0)
boxes = np.sort(rng.uniform(0, 256, (60, 2, 2)), axis=1).reshape(60, 4).astype(np.float32)
scores = rng.random((60, 6), dtype=np.float32)
def work():
    with PredictionsWriter(OUT / "p.parquet", classes=tuple("abcde"), n_patches=2600, nucleus_threshold=0) as writer:
        for patch in range(2600):
            writer.append(np.full(60, patch), np.arange(60), boxes, scores[:, 0], scores[:, 1:])
    read_predictions(OUT / "p.parquet")
""",
    "annotate_xenium: 20,000 cells by TACCO and by correlation": """
from bench_celltypes import drawn
from celldetr.xenium.celltypes.annotate import annotate
from celldetr.config.xenium import CellTypeSettings
sample, reference, _ = drawn(20_000, 300)
annotate(sample[:500].copy(), reference, CellTypeSettings(), 0)  # compiles
work = lambda: annotate(sample, reference, CellTypeSettings(), 0)
""",
}
REPORT = """
before, start = used(), time.perf_counter()
work()
print("took", time.perf_counter() - start, used() - before)
"""


def measure(step: str, scripts: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Wall and processor seconds of a step with the library in a folder of scripts."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(scripts), str(HERE)))}
    command = [sys.executable, "-c", PREPARE + STEPS[step] + REPORT, str(folder), str(scripts), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{step} with {scripts}:\n{done.stderr}")
    wall, processor = done.stdout.rpartition("took ")[2].split()
    return float(wall), float(processor)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        archive = subprocess.run(
            ["git", "archive", told.revision, "scripts"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder / "old", filter="data")
        write_fold(folder / "fold_1.zip", 1, 200)
        write_slide(folder / "slide.tif", SLIDE)
        rng = np.random.default_rng(0)
        write_outlines(folder / "nuclei.parquet", rng.uniform(0, SLIDE, (NUCLEI, 2)), rng)
        libraries = {"old": folder / "old" / "scripts", "new": ROOT / "scripts"}
        for step in told.steps:
            runs = [
                [measure(step, scripts, folder, told.workers) for scripts in libraries.values()]
                for _ in range(told.repeats)
            ]
            old, new = (np.array([run[which] for run in runs]) for which in (0, 1))
            wall, processor = (statistics.median(new[:, at]) / statistics.median(old[:, at]) for at in (0, 1))
            print(f"{step}: {wall:.2f} times the time of {told.revision}, {processor:.2f} times its processor time, "
                  f"{statistics.median(new[:, 0]):.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
