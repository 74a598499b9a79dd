"""Several processes that share every batch of a run: one per device, started by `torch.distributed.run`'s launcher.

Each process computes the losses of its images, divided by the nuclei of the whole batch; the gradients are summed. So
any number of processes takes the same steps as one, apart from dropout masks and rounding.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, distributed, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import celldetr
from celldetr.model.weights import read_checkpoint
from celldetr.runtime import errors
from celldetr.runtime.errors import CellDETRError, Interrupted, ProcessFailed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_GRACE_SECONDS = "110"  # for the processes to write the state; the Slurm profile warns 120 s before a time limit


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them: its rank and their number."""

    rank: int = 0
    world: int = 1

    def sum(self, values: ArrayLike) -> NDArray[np.float64]:
        """Sum of an array (of any shape) over the processes."""
        summed = torch.tensor(values, dtype=torch.float64)
        if self.world > 1 and summed.numel():
            distributed.all_reduce(summed)
        return summed.numpy()

    def sum_each(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum of each of several numbers over the processes, in one transfer."""
        return dict(zip(values, self.sum(list(values.values())).tolist(), strict=True))

    def largest(self, number: int) -> int:
        """Largest of the processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradients by their sums over the processes, in one transfer."""
        if self.world == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))  # keeps its memory layout, on which the fused optimiser relies
            parameter.grad = gradient

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first one, whose statistics of normalisation are saved."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)


class StopSignals:
    """Context that remembers a stop signal (SIGTERM, SIGUSR1) instead of ending the process."""

    def __init__(self) -> None:
        self.received = 0  # number of the last signal; 0: none
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number


def launch(run: Any, processes: int, state_file: Path) -> None:
    """Run `celldetr.training.worker` in several processes and wait for them.

    The `run` (`celldetr.training.run.Run`) is pickled. A stop signal reaches all processes, which write the state of
    the run. If one process fails, the others are ended.

    Raises
    ------
    CellDETRError
        The error of the process that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="celldetr-") as folder, _launcher_settings():
        job = Path(folder) / "run.pickle"
        job.write_bytes(pickle.dumps(run))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=job.parent.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(number.name for number in (*STOP_SIGNALS, signal.SIGINT)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "celldetr.training.worker", str(job))
        except ChildFailedError as error:
            raise _error(*error.get_first_failure()) from error
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            step = read_checkpoint(state_file)["step"] if state_file.exists() else 0
            raise Interrupted(
                f"stopped by {error.sigval.name} after step {step}; {state_file} holds the state: start the run "
                "again to continue it"
            ) from error


@contextlib.contextmanager
def _launcher_settings() -> Iterator[None]:
    """Let processes import this library, keep the launcher quiet, and give signals back to their handlers."""
    library = str(Path(celldetr.__file__).parents[1])
    environment = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (library, environment.get("PYTHONPATH"))))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _GRACE_SECONDS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the launcher warns; every process sets its own threads
    launcher, events = logging.getLogger("torch.distributed.elastic"), logging.getLogger("torchelastic-events-null")
    level, events.disabled = launcher.level, True
    launcher.setLevel(logging.CRITICAL)  # its failures are raised as one error
    handled = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        launcher.setLevel(level)
        events.disabled = False
        os.environ.clear()
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handled.items():
                signal.signal(number, handler)


def _error(rank: int, failure: ProcessFailure) -> CellDETRError:
    """Return the error of a process if it is a `CellDETRError`, else `ProcessFailed`."""
    if isinstance(failure.message, dict):  # written by `record` in worker.py; its text is "NameOfTheError: text"
        name, _, text = failure.message["message"].partition(": ")
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, CellDETRError):
            return kind(text)
    how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with status {failure.exitcode}"
    return ProcessFailed(f"process {rank} of the run {how}; its output is above. Start the run again to continue it")


def join_group(device: str) -> Group:
    """Join the processes that `launch` started: on GPUs gradients travel by NCCL, everything else by gloo."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    return Group(distributed.get_rank(), distributed.get_world_size())


def _end_with_launcher(launcher: int) -> None:
    """Exit when the launcher dies, so that no orphan keeps training."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)
