"""What keeps a run safe and visible: checkpoints, stopping on a signal, the log, and progress."""

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from celldetr.config.experiment import Experiment
from celldetr.model.weights import save_model
from celldetr.runtime.files import atomic
from celldetr.training.base import Stage
from celldetr.training.checkpoint import load_optimizer, write_state
from celldetr.training.data import Batch
from celldetr.training.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PROGRESS_SECONDS = 30.0
_SHOWN = {"class_f1": "class F", "retrieval": "retrieval", "spread": "spread"}

log = logging.getLogger(__name__)


class RunKeeper(pl.Callback):
    """Writes ``checkpoints/last.ckpt`` every epoch and on a stop signal, ``best.ckpt``, and ``log.jsonl``.

    Parameters
    ----------
    run_dir
        Folder of the run.
    experiment
        What the run is told.
    data
        Fingerprint of its patches.
    code
        Hash of its code.
    state
        State that the run goes on from.
    """

    def __init__(
        self, run_dir: Path, experiment: Experiment, data: str, code: str, state: Mapping[str, Any] | None
    ) -> None:
        self.run_dir = run_dir
        self.experiment = experiment
        self.data = data
        self.code = code
        self.state = state
        self.history: list[dict[str, Any]] = list(state["history"]) if state else []
        self.best: dict[str, Any] | None = dict(state["best"]) if state and state["best"] else None
        self.last, self.best_path = last_path(run_dir), run_dir / "checkpoints" / "best.ckpt"
        self._stop: signal.Signals | None = None
        self._epoch_started = self._shown = time.monotonic()
        self._epoch_step = self._shown_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the optimiser and the sums of the unfinished epoch."""
        if self.state is not None:
            load_optimizer(trainer.optimizers[0], self.state["optimizer"], self.last)
            _stage(pl_module).train_sums = dict(self.state["sums"])
            self.state = None

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what validation says of the model before training."""
        val = _stage(pl_module).val_summary()
        nothing = dict.fromkeys(("learning_rate", "train", "images_per_second"))
        line: dict[str, Any] = {"epoch": 0, "step": 0, **nothing, "val": val, "seconds": 0.0}
        self.history.append(line)
        if trainer.is_global_zero:
            write_log(self.run_dir / "log.jsonl", self.history)
            _to_tensorboard(trainer, line)
            log.info("%s", describe(line, self.experiment.training.epochs))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the stop signals (Lightning has installed its own by now)."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._receive)
        self._shown, self._shown_step = time.monotonic(), _stage(pl_module).step

    def _receive(self, number: int, frame: object) -> None:
        self._stop = signal.Signals(number)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._epoch_started, self._epoch_step = time.monotonic(), _stage(pl_module).step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Stop before the batch, if a signal was received.

        Raises
        ------
        Interrupted
            The state is written.
        """
        stage = _stage(pl_module)
        number = 0 if self._stop is None else int(self._stop)
        if trainer.world_size > 1:
            agreed = torch.tensor([number], device=stage.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            number = int(agreed)
        if number:
            self.write(trainer, stage)
            trainer.strategy.barrier()
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {stage.step} of {stage.total_steps}; "
                f"{self.last} holds the state, and the run goes on from there when it is started again"
            )
        self._show(stage)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the log and the checkpoints; validation has just been done."""
        stage = _stage(pl_module)
        seconds = time.monotonic() - self._epoch_started
        images = (stage.step - self._epoch_step) * stage.settings.batch_size
        line: dict[str, Any] = {
            "epoch": stage.step // stage.steps_per_epoch,
            "step": stage.step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train": stage.train_means(),
            "val": stage.val_summary() if len(stage.val_data) else None,
            "seconds": round(seconds, 2),
            "images_per_second": round(images / max(seconds, 1e-9), 2),
        }
        self.history.append(line)
        stage.train_sums = {}
        score = line["val"]["score"] if line["val"] else None
        # of equal scores the later one: early on all are 0
        better = score is not None and (self.best is None or score >= self.best["score"])
        if better:
            self.best = {"epoch": line["epoch"], "score": score}
        if trainer.is_global_zero:
            if better:
                save_model(self.best_path, stage.model, self.experiment.model, self.best)
            write_log(self.run_dir / "log.jsonl", self.history)
            _to_tensorboard(trainer, line)
            log.info("%s%s", describe(line, self.experiment.training.epochs), ", best so far" if better else "")
        self.write(trainer, stage)

    def write(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Write the state of the run; all processes take part, the first one writes."""
        stage.settle()
        sums = stage.reduced(stage.train_sums, mean=True)
        if trainer.is_global_zero:
            write_state(
                self.last,
                experiment=self.experiment,
                data=self.data,
                code=self.code,
                step=stage.step,
                total_steps=stage.total_steps,
                model=stage.model.state_dict(),
                optimizer=trainer.optimizers[0].state_dict(),
                sums=sums,
                history=self.history,
                best=self.best,
            )

    def _show(self, stage: Stage) -> None:
        seconds = time.monotonic() - self._shown
        steps = stage.step - self._shown_step
        if steps <= 0 or seconds < PROGRESS_SECONDS:
            return
        stage.settle()
        if stage.global_rank == 0:
            left = (stage.total_steps - stage.step) * seconds / steps / 60
            log.info(
                "epoch %d of %d, step %d of %d, loss %.3f, %.1f images/s, about %.0f min left",
                stage.step // stage.steps_per_epoch + 1,
                stage.settings.epochs,
                stage.step,
                stage.total_steps,
                stage.last_losses["loss"],
                steps * stage.settings.batch_size / seconds,
                left,
            )
        self._shown, self._shown_step = time.monotonic(), stage.step


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Give the stop signals back at the end to who had them."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def last_path(run_dir: Path) -> Path:
    """File that holds the state of a run."""
    return run_dir / "checkpoints" / "last.ckpt"


def describe(line: Mapping[str, Any], epochs: int) -> str:
    """Say in one line what an epoch brought."""
    parts, val = [], line["val"]
    if line["train"]:
        parts.append(f"train loss {line['train']['loss']:.3f}")
    if val:
        numbers = {name: val[key] for key, name in _SHOWN.items() if key in val}
        numbers = {"detection F": val["detection"]["f1"], **numbers}
        parts.append(f"validation loss {val['loss']:.3f}")
        parts += [f"{name} {'NA' if value is None else f'{value:.3f}'}" for name, value in numbers.items()]
    if line["images_per_second"]:
        parts.append(f"{line['images_per_second']:.1f} images/s")
    return f"epoch {line['epoch']} of {epochs}: {', '.join(parts)}"


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    """Write all lines of the log, so that none is there twice after a run went on."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")


def _to_tensorboard(trainer: pl.Trainer, line: Mapping[str, Any]) -> None:
    if trainer.logger is None or not line["val"]:
        return
    val = line["val"]
    values = {f"val/{name}": value for name, value in val.items() if isinstance(value, float)}
    values |= {f"val/detection_{name}": value for name, value in val["detection"].items() if value is not None}
    values |= {f"val/f1_{name}": value for name, value in val.get("f1", {}).items() if value is not None}
    trainer.logger.log_metrics(values, step=line["step"])


def _stage(module: pl.LightningModule) -> Stage:
    assert isinstance(module, Stage)
    return module
