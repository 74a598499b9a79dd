"""All that a process needs to know of its run, and how it is handed to other processes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from celldetr.config.experiment import Experiment
from celldetr.store import PatchStore, open_store
from celldetr.store.splits import read_split


@dataclass(frozen=True)
class Run:
    """A training run; what its parts mean says `celldetr.training.loop.train`. `rank` is the number of the process."""

    experiment: Experiment
    stores: Sequence[PatchStore]
    split: pd.DataFrame
    run_dir: Path
    initial: Path | None
    backbone: Path | None
    nucleus_threshold: float
    radius: float
    threads: int
    accelerator: str
    code: str
    rank: int = 0

    def write(self, folder: Path) -> Path:
        """Write what `read_run` reads, and return its file."""

        def text(path: Path | None) -> str | None:
            return None if path is None else str(Path(path).absolute())

        self.split.to_csv(folder / "split.tsv", sep="\t", index=False)
        job = {
            "experiment": self.experiment.to_dict(),
            "stores": [text(store.path) for store in self.stores],
            "split": str(folder / "split.tsv"),
            "run_dir": text(self.run_dir),
            "initial": text(self.initial),
            "backbone": text(self.backbone),
            "nucleus_threshold": self.nucleus_threshold,
            "radius": self.radius,
            "threads": self.threads,
            "accelerator": self.accelerator,
            "code": self.code,
        }
        path = folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        return path

    def of_rank(self, rank: int) -> "Run":
        """Return the same run for another process."""
        return replace(self, rank=rank)


def read_run(path: Path) -> Run:
    """Read a run that `Run.write` wrote; its stores were checked then."""
    job = json.loads(path.read_text(encoding="utf-8"))
    return Run(
        experiment=Experiment.from_dict(job["experiment"]),
        stores=[open_store(store, validate=False) for store in job["stores"]],
        split=read_split(job["split"]),
        run_dir=Path(job["run_dir"]),
        initial=Path(job["initial"]) if job["initial"] else None,
        backbone=Path(job["backbone"]) if job["backbone"] else None,
        nucleus_threshold=job["nucleus_threshold"],
        radius=job["radius"],
        threads=job["threads"],
        accelerator=job["accelerator"],
        code=job["code"],
    )
