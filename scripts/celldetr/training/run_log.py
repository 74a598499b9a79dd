"""What a run reports: log.jsonl (a line per epoch), TensorBoard curves, and lines of progress."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from celldetr.runtime.files import atomic
from celldetr.training.data import Batch
from celldetr.training.stage import Losses, Stage

CURVE_STEPS = 10
"""Steps between two points of the TensorBoard curves."""
PROGRESS_SECONDS = 30.0
_SHOWN = {"class_f1": "class F", "retrieval": "retrieval", "spread": "spread"}

log = logging.getLogger(__name__)


class RunLog:
    """Losses and validation scores of a run. All processes take part; rank 0 writes.

    A run that continues gives the steps done, the lines of the finished epochs (`history`), and of the unfinished epoch
    its loss sums and the seconds that it took so far.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: Stage,
        steps_per_epoch: int,
        step: int,
        history: list[dict[str, Any]],
        sums: Mapping[str, float],
        seconds: float = 0.0,
    ) -> None:
        self.history, self._stage, self._steps_per_epoch = history, stage, steps_per_epoch
        self._path, self._main = run_dir / "log.jsonl", stage.group.rank == 0
        self._curves = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1) if self._main else None
        self._sums = {name: value if self._main else 0.0 for name, value in sums.items()}  # summed over processes
        self._losses: dict[str, float] = {}  # of the last step, in this process
        self._loss = 0.0  # of the last step that the curves show, in all processes
        self._pending: tuple[Batch, Losses] | None = None
        self._seconds = seconds  # of training, up to the last pause
        self._since: float | None = None  # when the clock of training was started; None: it stands
        self._paused = time.monotonic()
        self._progress = (step, self._paused)

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        if self._curves is not None:
            self._curves.close()

    def add_step(self, batch: Batch, losses: Mapping[str, Tensor], total: Tensor, rate: float) -> None:
        """Take the losses of a step and its learning rate.

        On a GPU losses are read one step later, when they have arrived: reading them at once makes every step wait.

        Raises
        ------
        NonFinite
            A loss is NaN or infinite; names the patches.
        """
        self.flush_losses()
        self._pending = batch, Losses(losses, total)
        if not total.is_cuda:
            self.flush_losses()
        step = batch.step + 1
        if step % CURVE_STEPS == 0 or step == 1:
            self.flush_losses()
            shown = self._stage.group.sum_each(self._losses)
            self._loss = shown["loss"]
            self._add_curves({f"train/{name}": value for name, value in shown.items()}, step)
            self._add_curves({"learning_rate": rate}, step)
        if time.monotonic() - self._progress[1] > PROGRESS_SECONDS:
            self._report_progress(step)
            self._progress = (step, time.monotonic())

    def flush_losses(self) -> None:
        """Check and count the losses of the last step; see `add_step`."""
        if self._pending is None:
            return
        (batch, losses), self._pending = self._pending, None
        with self._stage.naming_patches(batch):
            self._losses = losses.values()
        for name, value in self._losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def loss_sums(self) -> dict[str, float]:
        """Losses summed over the steps of the epoch so far and over the processes."""
        self.flush_losses()
        return self._stage.group.sum_each(self._sums)

    def start(self, step: int) -> None:
        """Start the clock of training."""
        self._since = time.monotonic()
        self._progress = (step, self._since)

    def pause(self) -> float:
        """Stop the clock of training once the last step has ended; return its seconds in this epoch so far."""
        self.flush_losses()
        self._paused = time.monotonic()
        if self._since is not None:
            self._seconds += self._paused - self._since
            self._since = None
        return self._seconds

    def end_epoch(self, step: int, rate: float | None, validation: dict[str, Any] | None) -> None:
        """Write the line of the epoch that ends with this step; validation began at `pause`. Step 0: untrained."""
        seconds, validated = self._seconds, time.monotonic() - self._paused
        images = self._steps_per_epoch * self._stage.settings.batch_size
        line: dict[str, Any] = {
            "epoch": step // self._steps_per_epoch,
            "step": step,
            "learning_rate": rate,
            "train": {name: x / self._steps_per_epoch for name, x in self.loss_sums().items()} if step else None,
            "val": validation,
            "train_seconds": round(seconds, 2),
            "val_seconds": round(validated, 2) if validation else None,
            "images_per_second": round(images / max(seconds, 1e-9), 2) if step else None,
        }
        self.history.append(line)
        self._sums, self._seconds = {}, 0.0
        if self._main:
            write_log(self._path, self.history)
            self._add_curves(_validation_curves(validation or {}), step)
            log.info("%s", describe(line, self._stage.settings.epochs))

    def _add_curves(self, values: Mapping[str, float], step: int) -> None:
        if self._curves is not None:
            for name, value in values.items():
                self._curves.add_scalar(name, value, step)

    def _report_progress(self, step: int) -> None:
        rate = (step - self._progress[0]) / (time.monotonic() - self._progress[1])
        epochs, images = self._stage.settings.epochs, self._stage.settings.batch_size
        total, epoch = epochs * self._steps_per_epoch, step // self._steps_per_epoch + 1
        if self._main:
            text = "epoch %d of %d, step %d of %d, loss %.3f, %.1f images/s, about %.0f min left"
            log.info(text, epoch, epochs, step, total, self._loss, rate * images, (total - step) / rate / 60)


def describe(line: Mapping[str, Any], epochs: int) -> str:
    """Line of the log as text."""
    parts, val = [], line["val"]
    if line["train"]:
        parts.append(f"train loss {line['train']['loss']:.3f}")
    if val:
        numbers = {name: val[key] for key, name in _SHOWN.items() if key in val}
        numbers = {"detection F": val["detection"]["f1"], **numbers}
        if "loss" in val:
            parts.append(f"validation loss {val['loss']:.3f}")
        parts += [f"{name} {'NA' if value is None else f'{value:.3f}'}" for name, value in numbers.items()]
    if line["images_per_second"]:
        parts.append(f"{line['images_per_second']:.1f} images/s in {line['train_seconds']:.1f} s of training")
    if line["val_seconds"] is not None:
        parts.append(f"{line['val_seconds']:.1f} s of validation")
    return f"epoch {line['epoch']} of {epochs}: {', '.join(parts)}"


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole log anew, so that no line is there twice after a run continued."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")


def _validation_curves(val: Mapping[str, Any]) -> dict[str, float]:
    values = {f"val/{name}": value for name, value in val.items() if isinstance(value, float)}
    values |= {f"val/detection_{name}": x for name, x in val.get("detection", {}).items() if x is not None}
    return values | {f"val/f1_{name}": x for name, x in val.get("f1", {}).items() if x is not None}
