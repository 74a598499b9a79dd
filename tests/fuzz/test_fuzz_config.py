"""Configurations: any change gives a configuration that is valid, or a message that names its keys."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import VALUES, mutations, refused, tries

from celldetr.config.workflow import Config
from celldetr.runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = {
    name: yaml.safe_load((ROOT / "config" / name).read_text(encoding="utf-8"))
    for name in ("config.yaml", "example/config.yaml")
}
LINE = re.compile(r"^.+: .*(unknown key|missing|expected|got|must|needs)", re.DOTALL)


def numbers(value):
    """All numbers inside a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    yield from [value] if isinstance(value, float) else []
    for item in inner:
        yield from numbers(item)


def check(values, places):
    """Return whether a configuration is refused, with a message for people."""
    error, found = refused(Config.from_dict, values)
    if error is None:
        assert all(math.isfinite(number) for number in numbers(found.model_dump()))
        for name, block in found.experiments.items():
            if block.stage != "zero_shot":
                told = found.experiment(name)
                assert type(told).from_dict(told.to_dict()) == told
        return False
    assert isinstance(error, ConfigError)
    text = str(error)
    assert "pydantic" not in text
    assert "validation error" not in text
    assert LINE.match(text), text
    if places and "zzz" in places[-1] and "settings cannot hold" not in text:
        assert "zzz" in text or "experiments." in text
    return True


@pytest.mark.parametrize("name", FILES)
@tries(140)
@given(data=st.data())
def test_a_changed_configuration_is_valid_or_refused_by_its_keys(name, data):
    values, places = data.draw(mutations(FILES[name]))
    check(values, places)


@tries(60)
@given(data=st.data())
def test_a_setting_of_a_wrong_kind_is_named(data):
    base = FILES["example/config.yaml"]
    blocks = [(key, inner) for key in ("model", "training", "evaluation", "patch", "pannuke") for inner in base[key]]
    block, key = data.draw(st.sampled_from(blocks))
    wrong = data.draw(st.sampled_from([{"zzz": 1}, [{}], None, "\x00", [], float("nan"), -(10**30)]))
    values = json.loads(json.dumps(base))
    if values[block][key] is not None:
        values[block][key] = wrong
    error, _ = refused(Config.from_dict, values)
    assert error is None or f"{block}.{key}" in str(error) or "experiments." in str(error)
    assert error is not None or not isinstance(wrong, dict)


@tries(40)
@given(values=VALUES)
def test_anything_else_is_refused(values):
    assert check(values, [])


def test_values_that_yaml_can_hold_and_settings_cannot():
    base = dict(FILES["example/config.yaml"])
    circle = []
    circle.append(circle)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    odd = [circle, deep, yaml.safe_load("2020-01-01"), {yaml.safe_load("2020-01-01"): 1}, {(1, 2): 3}, {1}, b"x"]
    for value in odd:
        error, _ = refused(Config.from_dict, {**base, "seed": value})
        assert isinstance(error, ConfigError), type(value)
