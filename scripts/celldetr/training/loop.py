"""One training run: data in, model file out; goes on where it was interrupted."""

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from celldetr.config.experiment import Experiment
from celldetr.model.celldetr import CellDETR
from celldetr.model.deformable_attention import use_sampling
from celldetr.model.device import allow_tf32, resolve_precision, use_activation_checkpointing
from celldetr.model.sampling import choose_sampler
from celldetr.model.weights import initial_weights, load_exactly, model_settings, read_checkpoint, save_model
from celldetr.runtime.errors import ConfigError, InputError
from celldetr.runtime.files import naming
from celldetr.runtime.provenance import write_provenance
from celldetr.store import PatchStore
from celldetr.training.base import Stage
from celldetr.training.checkpoint import read_best, read_state
from celldetr.training.data import PatchData
from celldetr.training.errors import ProcessFailed
from celldetr.training.keeper import RunKeeper, last_path, signals_restored, write_log
from celldetr.training.lock import alone
from celldetr.training.processes import launch
from celldetr.training.run import Run
from celldetr.training.ssl import SslStage
from celldetr.training.supervised import SupervisedStage

STAGES: Mapping[str, type[Stage]] = {
    "supervised": SupervisedStage,
    "st": SupervisedStage,  # the same, on cell types of Xenium
    "ssl": SslStage,
}

log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    stores: Sequence[PatchStore],
    split: pd.DataFrame,
    run_dir: Path,
    *,
    initial: Path | None = None,
    backbone: Path | None = None,
    nucleus_threshold: float = 0.4,
    radius: float = 12.0,
    threads: int = 1,
    accelerator: str = "auto",
    code: str = "",
) -> Path:
    """Train a model, or go on with it where the run was interrupted.

    A run that is killed or told to stop (SIGTERM, SIGUSR1) leaves ``checkpoints/last.ckpt``; started again with the
    same arguments it goes on from there, on a CPU to the very same weights. A finished run writes its results again.

    Parameters
    ----------
    experiment
        Model and recipe.
    stores
        Patch stores that `split` names.
    split
        Table with columns ``store``, ``patch``, ``part``; parts ``train`` and ``val`` are used, others are not read.
    run_dir
        Folder for model.pt, log.jsonl, provenance.json, checkpoints/ and tensorboard/.
    initial
        Model file to start from. Parts that do not exist in it for another mode, other classes or without a projection
        head start afresh; parts of it that this model lacks are left out.
    backbone
        Weights of a torchvision ResNet for the backbone.
    nucleus_threshold, radius
        Smallest nucleus score, and largest distance (px) of a pair, in validation.
    threads
        CPU threads of all processes together.
    accelerator
        ``cuda``, ``cpu``, or ``auto``: the GPU if there is one.
    code
        Hash of the code (`celldetr.runtime.provenance.source_hash`), for telling a finished run that is out of date.

    Returns
    -------
    Path
        The model file.

    Raises
    ------
    InputError
        Stores, split, weights or the checkpoint do not fit the experiment.
    ConfigError
        Settings that this machine cannot follow.
    NonFinite
        A loss is not finite.
    Interrupted
        The run was stopped by a signal; its state is written.
    ProcessFailed
        A process of the run, or one that loads its patches, was killed.
    Occupied
        Another job trains in `run_dir`.
    """
    run = Run(
        experiment,
        stores,
        split,
        Path(run_dir),
        initial,
        backbone,
        nucleus_threshold,
        radius,
        threads,
        ("cuda" if torch.cuda.is_available() else "cpu") if accelerator == "auto" else accelerator,
        code,
    )
    _check(run)
    with alone(run.run_dir):
        if experiment.training.gpus > 1:
            launch(run)
        else:
            run_process(run)
    return run.run_dir / "model.pt"


def _check(run: Run) -> None:
    settings, classes = run.experiment.training, run.experiment.model.classes
    for store in run.stores:
        if run.experiment.stage != "ssl" and tuple(store.classes) != tuple(classes):
            raise InputError(
                f"{store.path}: got classes {list(store.classes)}, expected those of experiment {run.experiment.name}: "
                f"{list(classes)}; give it stores with these classes in this order"
            )
    if run.accelerator == "cuda" and torch.cuda.device_count() < settings.gpus:
        raise ConfigError(f"training.gpus: got {settings.gpus}, expected at most {torch.cuda.device_count()} here")
    if run.accelerator == "cpu" and settings.gpus > 1:
        log.warning("training.gpus: %d, without a GPU: as many processes share the CPU", settings.gpus)
    choose_sampler(run.accelerator, kernel=run.experiment.model.kernel, compiled=settings.compile)
    if settings.select == "best_val" and not (run.split["part"] == "val").any():
        raise InputError(
            "split: no patch has part 'val', and training.select is best_val; give it validation patches or set "
            "training.select: last"
        )


def run_process(run: Run) -> None:
    """Do the work of one process of a run; the first one writes the results."""
    settings = run.experiment.training
    torch.set_num_threads(max(1, run.threads // settings.gpus))
    allow_tf32(resolve_precision(settings.precision, run.accelerator) != "fp32")
    device = f"cuda:{run.rank}" if run.accelerator == "cuda" else "cpu"
    train_data, val_data = (
        PatchData(run.stores, run.split, part, cache=settings.cache, device=device) for part in ("train", "val")
    )
    if not len(train_data):
        raise InputError("split: no patch has part 'train'; there is nothing to train on")
    fingerprint = f"{train_data.fingerprint()}-{val_data.fingerprint()}"
    state = read_state(last_path(run.run_dir), run.experiment, fingerprint, run.code)
    stage = STAGES[run.experiment.stage](
        run.experiment,
        _model(run, state),
        train_data,
        val_data,
        nucleus_threshold=run.nucleus_threshold,
        radius=run.radius,
        first_step=state["step"] if state else 0,
    )
    keeper = RunKeeper(run.run_dir, run.experiment, fingerprint, run.code, state)
    if stage.step < stage.total_steps:
        with _quiet(), signals_restored(), naming(run.run_dir), _loaders_watched():
            _trainer(run, stage, keeper).fit(stage)
    if run.rank == 0:
        _finish(run, stage, keeper, device)


def _model(run: Run, state: Mapping[str, Any] | None) -> CellDETR:
    """Build the model with the weights that the run starts or goes on with."""
    settings = run.experiment.model
    torch.manual_seed(run.experiment.training.seed)
    model = CellDETR(settings)
    if state is not None:
        load_exactly(model, state["model"], last_path(run.run_dir))
    else:
        if run.backbone is not None:
            initial_weights(model, run.backbone)
        if run.initial is not None:
            _start_from(model, run.initial)
    use_activation_checkpointing(model, run.experiment.training.activation_checkpointing)
    form = use_sampling(model, run.accelerator, compiled=run.experiment.training.compile)
    if run.rank == 0:
        log.info("deformable sampling: %s", form)
    return model


def _start_from(model: CellDETR, path: Path) -> None:
    """Take over what a model of another kind, or of other classes, can give, and say what it cannot."""
    content, settings = read_checkpoint(path), model.settings
    theirs = model_settings(content, path) if "format" in content else settings
    fresh = []
    if (theirs.mode == "baseline") != (settings.mode == "baseline"):
        fresh += ["class_head", "representation", "decoder.class_embed"]
    elif theirs.classes != settings.classes:
        fresh += ["decoder.class_embed"] if settings.mode == "baseline" else ["class_head"]
    if theirs.projection != settings.projection:
        fresh += ["projection"]
    kept = initial_weights(model, path, fresh=fresh)
    if kept:
        log.info("%d tensors start afresh, not from %s: %s", len(kept), path, ", ".join(kept))
    unused = [name for name in content.get("state", {}) if name not in model.state_dict()]
    if unused:
        log.info("%d tensors of %s are left out, this model has no such part: %s", len(unused), path, ", ".join(unused))


def _trainer(run: Run, stage: Stage, keeper: RunKeeper) -> pl.Trainer:
    settings = run.experiment.training
    strategy: str | DDPStrategy = "auto"
    if settings.gpus > 1:
        backend = "nccl" if run.accelerator == "cuda" else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, broadcast_buffers=False)
    bf16 = resolve_precision(settings.precision, run.accelerator) == "bf16"
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=settings.gpus,
        strategy=strategy,
        plugins=[LightningEnvironment()],  # processes are ours, also inside a Slurm job
        precision="bf16-mixed" if bf16 else "32-true",
        max_epochs=settings.epochs - stage.step // stage.steps_per_epoch,
        logger=TensorBoardLogger(run.run_dir, name="tensorboard", version="", purge_step=stage.step + 1),
        callbacks=[keeper],
        limit_val_batches=1.0 if len(stage.val_data) else 0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=run.rank == 0 and sys.stderr.isatty(),
        num_sanity_val_steps=-1 if stage.measures_start and not keeper.history else 0,
        log_every_n_steps=1,
        default_root_dir=run.run_dir,
    )


@contextlib.contextmanager
def _loaders_watched() -> Iterator[None]:
    """Say what became of a loader process that was killed."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ProcessFailed(
            f"a process that loads patches was ended ({str(error).splitlines()[0]}), most likely because the memory "
            "was used up; give the run more mem_mb (--set-resources) or fewer training.workers, and start it again to "
            "go on"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about choices that are made here on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _finish(run: Run, stage: Stage, keeper: RunKeeper, device: str) -> None:
    """Write the results."""
    settings, history = run.experiment.training, keeper.history
    chosen: dict[str, Any] = {"epoch": settings.epochs, "score": None}
    if history and history[-1]["val"]:
        chosen["score"] = history[-1]["val"]["score"]
    if settings.select == "best_val" and keeper.best is not None:
        state, chosen = read_best(keeper.best_path)
        load_exactly(stage.model, state, keeper.best_path)
    extra = {"experiment": run.experiment.name, "seed": settings.seed, **chosen}
    save_model(run.run_dir / "model.pt", stage.model, run.experiment.model, extra)
    write_log(run.run_dir / "log.jsonl", history)
    write_provenance(
        run.run_dir / "provenance.json",
        settings=run.experiment.to_dict(),
        inputs=[path for path in (*(store.path for store in run.stores), run.initial, run.backbone) if path],
        seed=settings.seed,
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        processes=settings.gpus,
        patches={"train": len(stage.train_data), "val": len(stage.val_data)},
        data=keeper.data,
        chosen=chosen,
        training_seconds=round(math.fsum(line["seconds"] for line in history), 1),
    )
    log.info("wrote %s, the weights of epoch %d", run.run_dir / "model.pt", chosen["epoch"])
