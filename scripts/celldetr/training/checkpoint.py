"""The state of a run: one file, written in one step, from which the run goes on at its very next step."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from celldetr.errors import InputError
from celldetr.experiment import Experiment
from celldetr.files import atomic
from celldetr.model.checkpoints import read_checkpoint

FORMAT = 2
FREE_SETTINGS = ("cache", "workers", "gpus", "compile", "recompute")
"""Settings of training that may change while a run is interrupted: they change nothing in its result."""

log = logging.getLogger(__name__)


def write_state(
    path: Path,
    *,
    experiment: Experiment,
    data: str,
    code: str,
    step: int,
    total_steps: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    average: Mapping[str, Any] | None,
    sums: Mapping[str, float],
    history: list[dict[str, Any]],
    best: Mapping[str, Any] | None,
) -> None:
    """Write the state of a run; until it is complete the file before it stays.

    Parameters
    ----------
    path
        File to write.
    experiment
        What the run was told.
    data
        Fingerprint of its patches.
    code
        Hash of the code of the run.
    step, total_steps
        Steps done, and steps of the whole run.
    model, optimizer
        Their states.
    average
        Moving average of the weights, if there is one.
    sums
        Sums of the losses of the unfinished epoch.
    history
        Lines of the log.
    best
        Epoch and score of the best epoch, if there is one.
    """
    content = {
        "training_format": FORMAT,
        "experiment": experiment.to_dict(),
        "data": data,
        "code": code,
        "step": step,
        "total_steps": total_steps,
        "model": dict(model),
        "optimizer": dict(optimizer),
        "average": None if average is None else dict(average),
        "sums": dict(sums),
        "history": history,
        "best": best,
    }
    with atomic(path) as temporary:
        torch.save(content, temporary)


def read_state(path: Path, experiment: Experiment, data: str, code: str) -> Mapping[str, Any] | None:
    """Read the state that a run left.

    The state of a finished run of the same settings, data and code gives its results again without training: the
    results may have been lost with the process that asked for them. That of a finished run of anything else is out of
    date. An unfinished run goes on, with corrected code too, but not with other settings or data.

    Returns
    -------
    Mapping or None
        None when the run starts afresh.

    Raises
    ------
    InputError
        The file is damaged, or that of an unfinished run of other settings or data.
    """
    if not path.exists():
        return None
    afresh = f"Delete {path} to start the run afresh"
    try:
        state = read_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}\n{afresh}, or put a whole copy of the file in its place") from error
    if state.get("training_format") != FORMAT:
        raise InputError(f"{path}: got no state of a run of format {FORMAT}. {afresh}")
    told = experiment.to_dict()
    for key in FREE_SETTINGS:
        told["training"].pop(key)
        state["experiment"]["training"].pop(key, None)
    changed = _differences(state["experiment"], told)
    if state["step"] >= state["total_steps"] and (changed or state["data"] != data or state["code"] != code):
        log.info("%s is of a finished run of other settings, data or code: starting afresh", path)
        return None
    if changed:
        shown = "\n  ".join(changed[:8])
        raise InputError(
            f"{path}: was written with other settings:\n  {shown}\n{afresh}, or go back to the settings it was "
            "written with to finish that run"
        )
    if state["data"] != data:
        raise InputError(
            f"{path}: was written with other patches or nuclei, or with another split. {afresh}, or give it the "
            "data it was written with"
        )
    log.info("going on from %s at step %d", path, state["step"])
    return state


def _differences(was: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        names = [*was, *(name for name in now if name not in was)]
        return [
            line
            for name in names
            for line in _differences(was.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if was == now else [f"{key}: was {was!r}, now {now!r}"]
