"""Blocks of settings: frozen, typed, and refused with an error that names the key if a value is wrong."""

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from celldetr.runtime.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
MOST = 1_000_000_000
"""Largest integer of a setting without a limit of its own."""
Count = Annotated[int, Field(ge=1, le=MOST)]
NotNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
SmallCount = Annotated[int, Field(ge=1, le=100)]
Channels = Annotated[int, Field(ge=1, le=16_384)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bytes = Annotated[int, Field(ge=1, le=10**15)]
Mpp = Annotated[float, Field(gt=0.02, lt=20)]
"""Size of a pixel, um."""
Precision = Literal["auto", "bf16", "tf32", "fp32"]
PRECISION = "auto: bf16 on GPUs that have it, tf32 on other GPUs, fp32 on a CPU; fp32 never rounds to TF32"

MOST_VALUES = 100_000
_VALUES = "expected numbers, text, lists and mappings with text keys, without cycles"
_NO_GAIN = "it did not help on real tissue; remove the key"
REMOVED = {
    "registration.min_gain": "a refinement is kept if it brings nuclei clearly closer (refine: auto); remove the key",
    "evaluation.radius": "it was in px; give radius_um, in um, instead",
    "model.fast": "give model.kernel and training.precision instead",
    "model.sampling": "give model.kernel instead",
    "model.query_selection": _NO_GAIN,
    "training.average": _NO_GAIN,
    "training.denoising": _NO_GAIN,
    "training.recompute": "give training.activation_checkpointing instead",
    "losses.class_scale": "losses.classes is the whole weight; multiply it by what class_scale was, and remove that",
    "losses.repeats": _NO_GAIN,
    "readout": "give frozen_features instead",
}
"""Ends of keys that earlier revisions had -> what to do."""


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"got {list(values)}, expected each of them once")
    return values


EACH_ONCE = AfterValidator(_each_once)
Names = Annotated[tuple[str, ...], EACH_ONCE, Field(json_schema_extra={"uniqueItems": True})]
"""Names of experiments, each once."""
Splits = Annotated[
    tuple[Annotated[int, Field(ge=1, le=3)], ...],
    EACH_ONCE,
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
]
"""Splits of PanNuke, each once."""


class Settings(BaseModel):
    """A frozen block of settings; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Check and build settings from JSON-like values.

        Parameters
        ----------
        values
            Content of a YAML or JSON file.
        where
            Dotted path of this block in its file, for error messages.

        Raises
        ------
        ConfigError
            Unknown or missing keys, wrong types, values out of range; a line for each.
        """
        if sum(1 for _ in itertools.islice(_inside(values), MOST_VALUES)) == MOST_VALUES:
            raise ConfigError(f"{where or 'config'}: got {MOST_VALUES} values or more; does it repeat an anchor?")
        try:
            text = json.dumps(values, default=_not_json)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{where or 'config'}: got values that settings cannot hold ({error}); {_VALUES}"
            ) from error
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            lines = [_explain(cls, dict(problem), where) for problem in error.errors()]
            raise ConfigError("\n".join(dict.fromkeys(lines))) from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-like values that `from_dict` turns into equal settings."""
        return self.model_dump(mode="json")


def _inside(values: object) -> Iterable[object]:
    """Yield all values inside mappings and lists; without end if they hold themselves."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def _not_json(value: object) -> str:
    raise ConfigError(f"config: got {value!r}, expected a number, text, list or mapping; put it in quotes")


def _explain(cls: type[BaseModel], problem: Mapping[str, Any], where: str) -> str:
    path = [
        str(part) for part in problem["loc"] if not str(part).startswith(("function-", "literal[", "tuple[", "[key]"))
    ]
    key = ".".join([part for part in (where, *path) if part]) or "config"
    kind, got = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        for old, remedy in REMOVED.items():
            if f".{key}".endswith(f".{old}"):
                return f"{key}: this key was removed: {remedy}"
        near = difflib.get_close_matches(path[-1], sorted(_keys(cls)), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "json_invalid":
        return f"{key}: got values that settings cannot hold ({problem['ctx']['error']}); {_VALUES}"
    if kind == "missing":
        stands_alone = isinstance(got, Mapping) and got.get("base") == "none"
        remedy = "; or remove base: none, and the rest is as in the paper" if stands_alone else ""
        return f"{key}: missing; every configuration needs it{remedy}"
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    hint = _hint(got, kind) if isinstance(got, str) and kind in ("float_type", "int_type") else ""
    expected = re.sub("^(Input should be|[A-Z][a-z]+ should) ", "", problem["msg"])
    return f"{key}: got {got!r}, expected {expected}{hint}"


def _hint(text: str, kind: str) -> str:
    """Return how a number must be written that YAML reads as text."""
    try:
        value = float(text)
    except ValueError:
        return ""
    digits, e, exponent = text.strip().lower().partition("e")
    if not e:
        return "; write it without quotes"
    if kind == "int_type":
        return f"; write {value:.0f}"
    point, sign = "" if "." in digits else ".0", "" if exponent[0] in "+-" else "+"
    return f"; YAML reads {text} as text: write {digits}{point}e{sign}{exponent}"


def _keys(cls: type[BaseModel], seen: set[type] | None = None) -> set[str]:
    """Return all keys of a block and of the blocks inside it."""
    seen = seen or set()
    found = set(cls.model_fields)
    for item in cls.model_fields.values():
        for kind in [item.annotation, *getattr(item.annotation, "__args__", ())]:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
                seen.add(kind)
                found |= _keys(kind, seen)
    return found


def partial(cls: type[Settings]) -> type[Settings]:
    """Derive a block in which every key is optional, for settings that override shared ones."""
    fields: dict[str, Any] = {}
    for name, item in cls.model_fields.items():
        kind: Any = item.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            kind = partial(kind)
        elif item.metadata:
            kind = Annotated[(kind, *item.metadata)]
        fields[name] = (kind, Field(None, description=item.description))
    return create_model(f"Partial{cls.__name__}", __base__=Settings, **fields)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others: mappings are merged key by key, lists and values replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
