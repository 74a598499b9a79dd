"""The training: one loop from the first step to the model file. Read `Training` from top to bottom.

A step is a batch of patches, its losses, their gradients summed over the processes, and an update. An epoch takes every
training patch once (or as many, drawn by weights), then validates, writes a line of the log and the state of the run
(checkpoints/last.ckpt), which a thread writes while the next epoch begins. Everything random in a step is a function of
the seed and the step (dropout: and the process), so a run that continues from its state ends with the same weights, on
a CPU to the bit.

On SIGTERM (scancel, the end of a job) or SIGUSR1 (a cluster's warning before it) the handler, `StopSignals` in
processes.py, only notes the signal; a step or validation that is under way is finished. Before its next step `fit` sees
the note, has the state written and raises `Interrupted`: the rule fails, and started again it continues with that step.
Several processes get the signal from their launcher and agree on the step at which they stop. SIGKILL leaves the last
state that was complete.
"""

import functools
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from celldetr.model.compiled import (
    RUNS_TO_CAPTURE,
    captures,
    compiles,
    forget_compiled,
    graph_use,
    no_more_compiling,
    uncompiled,
)
from celldetr.model.device import allow_tf32, resolve_precision
from celldetr.model.weights import load_exactly, read_checkpoint, save_model, save_weights
from celldetr.runtime.errors import CellDETRError, Interrupted
from celldetr.runtime.files import naming
from celldetr.runtime.provenance import write_provenance
from celldetr.store import open_store
from celldetr.training.data import (
    DROPOUT,
    Batch,
    PatchData,
    TrainingBatches,
    ValidationBatches,
    load_batches,
    random_stream,
)
from celldetr.training.prefetch import Prefetcher
from celldetr.training.processes import Group, StopSignals, launch
from celldetr.training.run import Run, check, identified
from celldetr.training.run_log import RunLog, write_log
from celldetr.training.run_state import BackgroundWriter, read_state, run_lock, snapshot, write_state

COMPILING_PAYS = 5_000
"""Steps of a run from which on ``compile: auto`` compiles: minutes against the 50 ms a step that it is to save."""

log = logging.getLogger(__name__)


def train(run: Run) -> Path:
    """Train a model, or continue its run if that was interrupted, and return the path of its model file.

    A run continues if nothing changed on which its result depends (`identified`); otherwise it starts anew.

    Raises
    ------
    InputError
        Stores, split, weights or the state of the run do not fit the experiment.
    ConfigError
        Settings that this machine cannot follow.
    NonFinite
        A loss is NaN or infinite.
    Interrupted
        A signal stopped the run; its state is written.
    ProcessFailed
        A process of the run, or one that loads its patches, was killed.
    Occupied
        Another job trains in `run_dir`.
    """
    if run.accelerator == "auto":
        run = replace(run, accelerator="cuda" if torch.cuda.is_available() else "cpu")
    stores = [open_store(path) for path in run.stores]
    check(run, stores)
    run = identified(run, stores)
    processes = run.experiment.training.gpus
    with run_lock(run.run_dir):
        if processes > 1:
            launch(run, processes, run.state_file)
        else:
            Training(run, run.accelerator, Group()).fit()
    return run.run_dir / "model.pt"


class Training:
    """One process of a run: everything that the loop needs, and the loop."""

    def __init__(self, run: Run, device: str, group: Group) -> None:
        self.run, self.device, self.group = run, device, group
        self.settings = settings = run.experiment.training
        torch.set_num_threads(max(1, run.threads // group.world))
        precision = resolve_precision(settings.precision, device)
        allow_tf32(precision != "fp32")
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
        stores, kind = [open_store(path) for path in run.stores], run.stage
        how: dict[str, Any] = {"cache": settings.cache, "device": device, "instances": kind.reads_instances}
        train, val = (PatchData(stores, run.split, part, **how) for part in ("train", "val"))
        weights = kind.patch_weights(run.experiment, train)
        self.batches = TrainingBatches(train, settings.batch_size, settings.seed, group.rank, group.world, weights)
        self.total_steps = settings.epochs * self.batches.steps_per_epoch
        pays = self.total_steps >= COMPILING_PAYS
        self.compiles = kind.compilable and compiles(settings.compile, device, "training.compile", pays=pays)
        self.prepared = Prefetcher(device, settings, compiled=self.compiles)
        state = read_state(run.state_file, run.identity)
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
        self.record = state["record"] if state else {**run.record, "device": name, "processes": group.world}

        weights_from = (None, None) if state else (run.backbone, run.initial)
        self.model = kind.build_model(run.experiment, train, *weights_from, device)
        self.stage = kind(run.experiment, self.model, train, val, run.scoring, group)
        self.optimizer = self.stage.make_optimizer()
        self.step: int = 0
        self.rate = 0.0  # learning rate of the last step
        self.slow_steps = 0  # of this epoch: they ran uncompiled, or captured CUDA graphs
        self.best: dict[str, Any] | None = None  # epoch and score
        if state:
            load_exactly(self.model, state["model"], run.state_file)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best = state["step"], state["best"]
        epochs = {key: state[key] for key in ("history", "sums", "seconds")} if state else {"history": [], "sums": {}}
        self.writer = BackgroundWriter()
        self.run_log = RunLog(run.run_dir, self.stage, self.batches.steps_per_epoch, self.step, **epochs)

    def fit(self) -> None:
        """Train to the end; rank 0 writes the results."""
        with StopSignals() as stop, closing(self.run_log), self.writer, naming(self.run.run_dir), self.compiled():
            if self.stage.validates_start and not self.run_log.history:
                self.run_log.pause()
                self.run_log.end_epoch(0, None, self.validate())
            while self.step < self.total_steps:
                epoch = self.step // self.batches.steps_per_epoch
                self.stage.train(epoch)
                self.run_log.start(self.step)
                rest_of_epoch = range(self.step, (epoch + 1) * self.batches.steps_per_epoch)
                for batch in self.prepared(load_batches(self.batches, rest_of_epoch, self.settings)):
                    if number := self.group.largest(stop.received):
                        self.save_state()
                        self.writer.check(wait=True)
                        raise Interrupted(
                            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.total_steps}; "
                            f"{self.run.state_file} holds the state: start the run again to continue it"
                        )
                    self.writer.check()
                    self.take_step(batch)
                self.run_log.pause()
                validation = self.validate() if len(self.stage.val_data) else None
                self.run_log.end_epoch(self.step, self.rate, validation)
                self.report_slow_steps()
                self.keep_best(epoch + 1, validation)
                self.save_state()
            self.writer.check(wait=True)
        if self.group.rank == 0:
            self.write_results()

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Run the steps of the block compiled, where the settings and the device allow it."""
        done = self.step == self.total_steps  # a finished run only writes its results
        if done or not self.compiles:
            yield
            return
        try:
            self.warm_up()
        except CellDETRError:
            raise
        except Exception as error:  # whatever a compiler, its cache or a driver may raise
            if self.settings.compile is True:
                raise
            self.stage.give_up_compiling()
            forget_compiled()
            reason = str(error).strip().split("\n")[0]
            log.warning("could not compile the step (%s): it runs as it is, at about half the speed", reason)
        self.optimizer.zero_grad()
        self.slow_steps = 0
        with no_more_compiling():
            yield

    def warm_up(self) -> None:
        """Compile the step and the validation for the sizes of the batches to come.

        It computes gradients and drops them. Sizes that the first three epochs of the run do not have run as they are,
        also after an interruption: dropout draws other masks where a step is compiled.
        """
        start, steps = time.monotonic(), self.batches.steps_of_sizes(min(3, self.settings.epochs))
        val = self.validation_batches()
        self.stage.compile(self.device)
        for run in range(1 + RUNS_TO_CAPTURE):
            with nullcontext() if run else uncompiled():  # the first run makes the constant tables
                self.stage.train(0)
                for batch in self.prepared(self.batches[step] for step in steps):
                    self.optimizer.zero_grad()
                    self.gradients(batch)
                self.optimizer.zero_grad()
                self.validate_batches(val[number] for number in val.numbers_of_sizes())
        sizes, seconds = len(steps) + len(val.numbers_of_sizes()), time.monotonic() - start
        log.info("compiled for %d sizes of batches in %.0f s%s", sizes, seconds, graph_use(self.device))

    def take_step(self, batch: Batch) -> None:
        """Losses of a prepared batch, gradients, update."""
        settings = self.settings
        factor = self.stage.learning_rate_factor(self.step, self.total_steps)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["base_lr"] * factor
        self.rate = self.optimizer.param_groups[0]["lr"]
        losses, total = self.gradients(batch)
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        self.group.sum_gradients(parameters)
        if settings.gradient_clip:
            clip_grad_norm_(parameters, settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.run_log.add_step(batch, losses, total, self.rate)

    def gradients(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Add those of a step to the gradients; return the losses and their weighted sum."""
        before = self.stage.uncompiled_calls, captures()
        torch.compiler.cudagraph_mark_step_begin()  # nobody reads what graphs have computed before
        seed = int(random_stream(self.settings.seed, batch.step, DROPOUT).integers(2**62)) + self.group.rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats the stack in each step on a CPU
        if self.device.startswith("cuda"):
            torch.cuda.manual_seed(seed)
        with self.autocast:
            losses, total = self.stage.training_losses(batch)
        total.backward()
        self.slow_steps += before != (self.stage.uncompiled_calls, captures())
        return losses, total

    def report_slow_steps(self) -> None:
        """Warn of steps of an epoch that did not run as they were compiled."""
        if self.slow_steps and self.group.rank == 0:
            text = "%d of the last %d steps ran uncompiled or captured CUDA graphs; a few of rare sizes are normal"
            log.warning(text, self.slow_steps, self.batches.steps_per_epoch)
        self.slow_steps = 0

    def validate(self) -> dict[str, Any]:
        """Validate on all validation patches, shared by the processes."""
        self.group.share_buffers(self.model)
        batches = self.validation_batches()
        self.stage.start_validation()
        self.validate_batches(load_batches(batches, range(len(batches)), self.settings))
        return self.stage.validation_summary()

    def validation_batches(self) -> ValidationBatches:
        """Patches that this process validates."""
        size, group = max(1, self.settings.batch_size // self.group.world), self.group
        return ValidationBatches(self.stage.val_data, size, group.rank, group.world)

    def validate_batches(self, batches: Iterable[Batch]) -> None:
        """Add batches to the validation."""
        self.model.eval()
        with torch.no_grad(), self.autocast:
            for batch in self.prepared(batches):
                torch.compiler.cudagraph_mark_step_begin()
                self.stage.validate(batch)

    def keep_best(self, epoch: int, validation: Mapping[str, Any] | None) -> None:
        """Choose the epoch with the best validation score, the later one of equal scores; its weights are kept."""
        score = validation["score"] if validation else None
        if score is None or (self.best is not None and score < self.best["score"]):
            return
        self.best = {"epoch": epoch, "score": score}
        if self.group.rank == 0:
            log.info("epoch %d is the best so far", epoch)

    def save_state(self) -> None:
        """Copy the state from which the run continues; all processes take part, a thread of rank 0 writes it."""
        seconds, sums = self.run_log.pause(), self.run_log.loss_sums()
        if self.group.rank == 0:
            state = {
                "record": self.record,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sums": sums,
                "seconds": seconds,
                "history": self.run_log.history,
                "best": self.best,
            }
            self.writer.submit(functools.partial(self.write_state, snapshot(state)))

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write a copied state; before it the weights of the best epoch, if that is the last one."""
        run, best = self.run, state["best"]
        best_file = run.best_file(best["epoch"]) if best else None
        if best_file is not None and best["epoch"] * self.batches.steps_per_epoch == state["step"]:
            save_weights(best_file, state["model"], self.stage.model_settings, best)
        write_state(run.state_file, run.identity, **state)
        for file in run.run_dir.glob("checkpoints/best*.ckpt"):
            if file != best_file:
                file.unlink()

    def write_results(self) -> None:
        """Write model.pt (weights of the chosen epoch), log.jsonl and provenance.json."""
        run, settings, history = self.run, self.settings, self.run_log.history
        chosen: dict[str, Any] = {"epoch": settings.epochs, "score": None}
        if history[-1]["val"]:
            chosen["score"] = history[-1]["val"]["score"]
        if settings.select == "best_val" and self.best is not None:
            best_file = run.best_file(self.best["epoch"])
            load_exactly(self.model, read_checkpoint(best_file)["state"], best_file)
            chosen = self.best
        extra = {"experiment": run.experiment.name, "seed": settings.seed, **chosen}
        data = self.stage.train_data
        extra |= {"trained_on": run.identity["trained_on"], "mpp": data.mpp, "patch_size": data.patch_size}
        save_model(run.run_dir / "model.pt", self.model, self.stage.model_settings, extra)
        write_log(run.run_dir / "log.jsonl", history)
        write_provenance(
            run.run_dir / "provenance.json",
            settings=run.experiment.to_dict(),
            seed=settings.seed,
            patches={"train": len(self.stage.train_data), "val": len(self.stage.val_data)},
            identity={key: value for key, value in run.identity.items() if key != "settings"},
            chosen=chosen,
            training_seconds=round(math.fsum(line["train_seconds"] for line in history), 1),
            **self.record,
        )
        log.info("wrote %s, the weights of epoch %d", run.run_dir / "model.pt", chosen["epoch"])
