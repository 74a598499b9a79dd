"""The state of a run: one file, written in one step, from which the run goes on at its very next step."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, ValidationError, model_validator
from torch import Tensor
from torch.optim import Optimizer

from celldetr.config.experiment import Experiment
from celldetr.model.weights import model_settings, read_checkpoint, write_checkpoint
from celldetr.runtime.errors import InputError

FORMAT = 3
FREE_SETTINGS = ("cache", "workers", "gpus", "compile", "activation_checkpointing")
"""Settings of training that may change while a run is interrupted: they change nothing in its result."""

log = logging.getLogger(__name__)


class _Block(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Losses(_Block):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | dict[str, float | None] | None]
    loss: float


class _Validation(_Losses):
    detection: dict[str, float | None]
    score: float | None


class _Line(_Block):
    """A line of the log."""

    model_config = ConfigDict(extra="forbid")
    epoch: int
    step: int
    learning_rate: float | None
    train: _Losses | None
    val: _Validation | None
    seconds: float
    images_per_second: float | None


class _Best(_Block):
    epoch: int
    score: float


class _Told(_Block):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]
    training: dict[str, JsonValue]


class _State(_Block):
    """What the state of a run is made of."""

    training_format: Literal[3]
    experiment: _Told
    data: str
    code: str
    step: NonNegativeInt
    total_steps: NonNegativeInt
    model: dict[str, Any]
    optimizer: dict[str, Any]
    sums: dict[str, float]
    history: list[_Line]
    best: _Best | None

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.step > self.total_steps:
            raise ValueError(f"step: got {self.step}, expected at most {self.total_steps}")
        return self


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
        "sums": dict(sums),
        "history": history,
        "best": best,
    }
    write_checkpoint(path, content)


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
    try:
        _State.model_validate(dict(state))
    except ValidationError as error:
        raise InputError(f"{path}: got no state of a run of format {FORMAT} ({_first(error)}). {afresh}") from error
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


def read_best(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Read the weights of the best epoch by their names, and which epoch and score they are of.

    Raises
    ------
    InputError
        The file is missing, damaged, or none of a training run.
    """
    content = read_checkpoint(path)
    model_settings(content, path)
    try:
        best = _Best.model_validate(content.get("extra"))
    except ValidationError as error:
        raise InputError(
            f"{path}: got no epoch of a run ({_first(error)}). Train it again without {path.parent}"
        ) from error
    return content["state"], best.model_dump()


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Give an optimiser the state that a run left in a file.

    Raises
    ------
    InputError
        It is not the state of this optimiser.
    """
    try:
        options = [{name: type(value) for name, value in group.items()} for group in optimizer.param_groups]
        optimizer.load_state_dict(dict(state))
        for group, wanted in zip(optimizer.param_groups, options, strict=True):
            if {name: type(value) for name, value in group.items()} != wanted:
                raise ValueError(f"options {sorted(group)}, expected {sorted(wanted)} of the same kinds")
            for parameter in group["params"]:
                _check_moments(optimizer.state.get(parameter, {}), parameter)
        if not any(optimizer.state.values()):
            raise ValueError("it holds no moments")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise InputError(
            f"{path}: optimizer: does not fit the model ({error}). Delete {path} to start the run afresh"
        ) from error


def _check_moments(moments: Mapping[str, Tensor], parameter: Tensor) -> None:
    shapes = {name: value.shape for name, value in moments.items()}
    wanted = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    if shapes and shapes != wanted:
        raise ValueError(f"moments of shapes {shapes}, expected {wanted}")
    if not all(value.isfinite().all() for value in moments.values()):
        raise ValueError("moments that are not finite")


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}"


def _differences(was: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        names = [*was, *(name for name in now if name not in was)]
        return [
            line
            for name in names
            for line in _differences(was.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if was == now else [f"{key}: was {was!r}, now {now!r}"]
