"""A training run: what it is made from, its identity, and what is checked before it starts."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import TrainedExperiment
from celldetr.model.compiled import compiles
from celldetr.model.weights import trained_on
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.provenance import origin, sha256
from celldetr.store import PatchStore, open_store
from celldetr.store.seen import groups_of, refuse_seen, seen_groups
from celldetr.store.splits import read_split, split_digest
from celldetr.training.stage import Stage

FREE_SETTINGS = ("cache", "workers", "gpus", "compile", "activation_checkpointing")
"""Settings of training that may change while a run is interrupted: its result differs by rounding at most, and with
another number of processes by their dropout masks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where; it can be sent to other processes."""

    experiment: TrainedExperiment  # model and recipe
    stage: type[Stage]  # losses and validation
    stores: tuple[Path, ...]  # patch stores that `split` names
    split: pd.DataFrame  # columns store, patch, part; parts train and val are used
    run_dir: Path  # folder for model.pt, log.jsonl, provenance.json, checkpoints/ and tensorboard/
    initial: Path | None = None  # model file to start from
    backbone: Path | None = None  # weights of a torchvision ResNet for the backbone
    trained_on: tuple[str, ...] | None = None  # what `initial` has seen, beside what it says itself; None: not known
    scoring: ScoringSettings = ScoringSettings()  # which detections count in validation, as in the test
    threads: int = 1  # CPU threads of all processes together
    accelerator: str = "auto"  # cuda, cpu, or auto: a GPU if there is one
    code: str = ""  # hash of the code (`celldetr.runtime.provenance.source_hash`)
    identity: Mapping[str, Any] = field(default_factory=dict)  # see `identified`
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state_file(self) -> Path:
        """State from which the run continues."""
        return self.run_dir / "checkpoints" / "last.ckpt"

    def best_file(self, epoch: int) -> Path:
        """Model of the best epoch so far; by its name it is that of the run and epoch that the state names."""
        run = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return self.run_dir / "checkpoints" / f"best{epoch}-{run}.ckpt"


def run_of_rule(
    snakemake: Any, read: Callable[[Mapping[str, Any]], TrainedExperiment], stages: Mapping[str, type[Stage]]
) -> Run:
    """Make the run of a training rule from its inputs, parameters and resources.

    `read` makes the experiment of the parameters; `stages` has its stage by name.
    """
    given, params = snakemake.input, snakemake.params
    initial, backbone = ([*map(Path, files), None][0] for files in (given.initial, given.backbone))
    recipe = {**params.experiment["training"], "workers": snakemake.resources.workers}
    experiment = read({**params.experiment, "training": recipe})
    return Run(
        experiment,
        stages[experiment.stage],
        tuple(map(Path, given.stores)),
        read_split(given.split, [open_store(path) for path in given.stores]),
        Path(snakemake.output.model).parent,
        initial=initial,
        backbone=backbone,
        trained_on=params.trained_on,
        scoring=ScoringSettings.from_dict(params.scoring),
        threads=snakemake.threads,
        code=params.code,
    )


def identified(run: Run, stores: Sequence[PatchStore]) -> Run:
    """Fill in the identity of a run, everything that its result depends on, and the record of its start.

    All inputs are hashed here, before training. Paths and `FREE_SETTINGS` are no part of the identity.

    Raises
    ------
    InputError
        The initial model has seen what this run's split tests, or does not say what it has seen.
    """
    settings = run.experiment.to_dict()
    settings["training"] = {key: x for key, x in settings["training"].items() if key not in FREE_SETTINGS}
    files = {str(path): sha256(path) for path in (run.initial, run.backbone) if path}
    seen = seen_groups(run.split, stores)
    if run.initial:
        before = trained_on(run.initial, run.trained_on, f"experiments.{run.experiment.name}.trained_on")
        tested = groups_of(run.split, stores, "test")
        refuse_seen(before, tested, split_digest(run.split), str(run.initial), f"the split of {run.experiment.name}")
        seen |= set(before)
    identity = {
        "settings": settings,
        "scoring": run.scoring.to_dict(),
        "stores": {store.path.stem: store.digest for store in stores},
        "split": split_digest(run.split),
        "initial": files.get(str(run.initial)),
        "backbone": files.get(str(run.backbone)),
        "trained_on": sorted(seen),
        "code": run.code,
    }
    inputs = {str(store.path): store.digest for store in stores} | files
    return replace(run, identity=identity, record={**origin(), "inputs": inputs})


def check(run: Run, stores: Sequence[PatchStore]) -> None:
    """Refuse what cannot be trained, before anything is written; see `celldetr.training.loop.train`."""
    experiment, settings, classes = run.experiment, run.experiment.training, run.experiment.classes
    for store in stores:
        if experiment.stage != "ssl" and tuple(store.classes) != tuple(classes):
            raise InputError(
                f"{store.path}: got classes {list(store.classes)}, expected those of experiment {experiment.name}, in "
                f"their order: {list(classes)}"
            )
    if run.accelerator == "cuda" and torch.cuda.device_count() < settings.gpus:
        raise ConfigError(f"training.gpus: got {settings.gpus}, expected at most {torch.cuda.device_count()} here")
    if run.accelerator == "cpu" and settings.gpus > 1:
        log.warning("training.gpus: %d, but there is no GPU: as many processes share the CPU", settings.gpus)
    compiles(settings.compile, run.accelerator, "training.compile")
    for part, needed in (("train", True), ("val", settings.select == "best_val")):
        if needed and not (run.split["part"] == part).any():
            raise InputError(
                f"split: got no patches of part {part!r}; add some"
                + (", or set training.select: last" if part == "val" else "")
            )
